"""Forward passes before training: each makes columns of every micro-batch.

Adding one is a function here and an entry in ``PASSES``, or ``module:function`` of your own; the algorithm that needs
it names it (``Algorithm.passes``).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, cast

import torch

from megatron_gspo.errors import ConfigError
from megatron_gspo.named import find_named
from megatron_gspo.types import Column, Columns, PackedBatch

if TYPE_CHECKING:
    from megatron_gspo.train.learner import Learner  # which imports Megatron

Made = Sequence[Mapping[Column, torch.Tensor]]
"""By micro-batch, this rank's part of what a pass has made; empty but on the last stage."""
Pass = Callable[["Learner", Sequence[PackedBatch]], Made]
"""(run, micro-batches) -> columns. Collective."""


def reference_pass(run: Learner, batches: Sequence[PackedBatch]) -> Made:
    """log pi_ref of every token, by the frozen reference; its routers choose for themselves."""
    assert run.reference is not None
    return [{Columns.ref_logprobs_T: logprobs_T} for logprobs_T, _ in run.reference.logprobs(batches)]


def value_pass(run: Learner, batches: Sequence[PackedBatch]) -> Made:
    """The critic's V of the state that each token was drawn in, before the update."""
    assert run.critic is not None
    return [{Columns.values_T: values_T} for values_T in run.critic.values(batches)]


PASSES: dict[str, Pass] = {"reference": reference_pass, "values": value_pass}


def needs_old_pass(run: Learner, outer_step: int) -> bool:
    """Whether anything reads what pi_old's own pass gives: always, unless ``correction.bypass`` puts the engine's
    policy in its place, and neither routes nor a KL in the reward are held against the trainer's. Equal on all ranks.
    """
    config, replay = run.config, run.config.replay
    drifts = run.policy.shape.num_experts > 0 and replay.measures_drift(outer_step)
    reads_routes = replay.asks_for_routes(outer_step) or drifts
    return not config.correction.bypass or bool(config.algorithm.kl_reward_coef) or reads_routes


def find_pass(name: str) -> Pass:
    """An entry of ``PASSES``, or ``module:function``. Raises ConfigError for what is neither."""
    if name in PASSES:
        return PASSES[name]
    if ":" not in name:
        raise ConfigError(f'pass "{name}" is none (known: {", ".join(PASSES)}, or module:function)')
    return cast(Pass, find_named(name, "pass"))
