"""What the engine computes, held against what the trainer computes, before anything is learned from it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from megatron_gspo.algorithm.metrics import ENGINE_SUMS, engine_gap_sums
from megatron_gspo.config import RunConfig
from megatron_gspo.errors import EngineMismatchError
from megatron_gspo.megatron.groups import Groups, device
from megatron_gspo.parallel.exchange import broadcast_object
from megatron_gspo.parallel.sums import reduce_token_sums
from megatron_gspo.types import TokenShard


@dataclass
class EngineGate:
    """Opens when the first responses after a start agree with the trainer, and watches from then on.

    An engine that computes another model, by a setting that it ignores, weights that no sync reached or a wrong dtype,
    draws from another distribution than is trained; nothing else need fail.
    """

    limit: float | None
    """Of ``kl/engine_k3``, nats per token; None compares nothing."""
    stops: bool
    """Whether the run stops where a later step exceeds ``limit``, rather than warn of it."""
    opened: bool = False
    warned: bool = False

    def check(self, shards: Sequence[Sequence[TokenShard]], groups: Groups, outer_step: int) -> list[str]:
        """Measures an outer step's shards, by mini-batch, which hold old logprobs; returns what to warn of. Collective.
        ``outer_step`` counts from 0, and is said from 1.

        Raises EngineMismatchError on every rank where the run must not go on.
        """
        if self.limit is None:
            return []
        warning = self.judge(measure_gap([shard for parts in shards for shard in parts], groups), outer_step)
        return [warning] if warning else []

    def judge(self, gap: Gap, outer_step: int) -> str | None:
        """``check`` of what was measured."""
        if self.limit is None or not gap.tokens:
            return None
        first, self.opened = not self.opened, True
        if gap.k3 <= self.limit:  # False for NaN
            self.warned = False
            return None
        if not gap.uncertain:
            raise EngineMismatchError(
                f"outer step {outer_step + 1}: the engine's logprobs of all {gap.tokens:.0f} tokens are exactly 0, "
                f"probability 1, and the trainer's are not: it does not compute them"
            )
        said = (
            f"outer step {outer_step + 1}: the engine's logprobs are not the trainer's: kl/engine_k3 is {gap.k3:.2g} "
            f"nats per token over {gap.tokens:.0f} tokens, above {self.limit:g}, and {gap.tail:.0%} of the tokens "
            f"differ twofold"
        )
        if first or self.stops:
            raise EngineMismatchError(f"{said}{ADVICE}")
        warned, self.warned = self.warned, True
        return None if warned else f"warning: {said} (docs/sync.md)"


ADVICE = (
    ": it computes another model, or holds other weights. See docs/sync.md, 'When the engine disagrees'; if the gap is "
    "wanted, raise rollout.max_engine_k3"
)


@dataclass(frozen=True)
class Gap:
    """The distance from the engine's mu to the trainer's pi_old, over the response tokens of an outer step."""

    tokens: float
    k3: float
    """Mean of rho - 1 - log rho, rho = pi_old / mu: an estimate of KL(mu || pi_old), nats per token."""
    tail: float
    """Share of tokens with rho above 2 or below 1/2."""
    uncertain: float = 1.0
    """Share of tokens to which the engine gave another logprob than exactly 0."""


def make_gate(config: RunConfig) -> EngineGate:
    """The gate that the configuration asks for."""
    return EngineGate(config.engine_k3_limit, config.rollout.on_engine_drift == "stop")


def measure_gap(shards: Sequence[TokenShard], groups: Groups) -> Gap:
    """Of an outer step's shards; on every rank. Collective: a sum of five numbers."""
    gap = None
    if groups.is_last_stage:
        sums = torch.zeros(len(ENGINE_SUMS) + 1, dtype=torch.float64, device=device())
        for shard in shards:
            uncertain_T = shard.mask_T & (shard.rollout_logprobs_T != 0)
            sums += torch.cat([engine_gap_sums(shard), uncertain_T.sum().double().reshape(1)])
        tokens, _, k3, tail, uncertain = reduce_token_sums(sums, stage=groups.tensor_data).tolist()
        gap = Gap(tokens, *(sum_ / max(tokens, 1.0) for sum_ in (k3, tail, uncertain)))
    found: Gap = broadcast_object(gap, groups.last_stage_rank, groups.pipeline)
    return found
