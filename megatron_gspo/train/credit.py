"""Credit that waits for the passes: rewards less the KL to the reference, and advantages by a critic's values."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import islice

import numpy as np
import torch

from megatron_gspo.algorithm.advantages import credit_by_response
from megatron_gspo.algorithm.gae import generalised_advantages, lambdas
from megatron_gspo.algorithm.ratios import expand
from megatron_gspo.batching.packing import shard_positions, unshard_tokens
from megatron_gspo.errors import MegatronGspoError, NonFiniteError
from megatron_gspo.megatron.groups import device
from megatron_gspo.parallel.exchange import agree, broadcast_object, gather_objects, gather_pieces
from megatron_gspo.parallel.sums import reduce_token_sums
from megatron_gspo.train.batch import Key, Minibatch
from megatron_gspo.train.learner import Learner
from megatron_gspo.types import PackedBatch, TokenShard


@dataclass(frozen=True)
class Credited:
    """An outer step's mini-batches with the advantages that they are trained with."""

    minibatches: list[Minibatch]
    metrics: dict[str, float]
    """On every rank."""


def give_credit(run: Learner, minibatches: list[Minibatch]) -> Credited:
    """Advantages where they need what the passes have made: ``algorithm.kl_reward_coef`` and a critic. Collective."""
    algorithm = run.config.algorithm
    if not algorithm.credit_waits:
        return Credited(minibatches, {})
    error: Exception | None = None
    shards, metrics = [shard for minibatch in minibatches for shard in minibatch.shards], None
    if run.groups.is_last_stage:
        try:
            batches = [batch for minibatch in minibatches for batch in minibatch.batches]
            shards, metrics = _by_values(run, batches, shards) if algorithm.uses_critic else _by_response(run, shards)
        except MegatronGspoError as caught:  # on every rank of the stage, and the other stages wait for it
            error = caught
    agree(error, run.groups.world)
    told: dict[str, float] = broadcast_object(metrics, run.groups.last_stage_rank, run.groups.pipeline)
    if run.critic is not None and run.config.critic.normalise:
        run.critic.scale.update(told["critic/returns"], told["critic/returns_squared"])
        shards = _in_units_of_the_head(run, shards)
    rest = iter(shards)
    return Credited([each.with_shards(islice(rest, len(each.shards))) for each in minibatches], told)


def token_rewards(run: Learner, shard: TokenShard) -> torch.Tensor:
    """[T_local] float64: r_t - kl_reward_coef (log pi_old - log pi_ref), the k1 estimate of a token (arXiv
    2203.02155, eq. 2); 0 where the mask is False."""
    coef = run.config.algorithm.kl_reward_coef
    rewards_T = shard.rewards_T.double()
    if coef:
        rewards_T = rewards_T - coef * (shard.old_logprobs_T.double() - shard.ref_logprobs_T.double())
    return torch.where(shard.mask_T, rewards_T, 0.0)


# --------------------------------------------------------------------------------------------------------- by response


def _by_response(run: Learner, shards: Sequence[TokenShard]) -> tuple[list[TokenShard], dict[str, float]]:
    """The algorithm's credit over rewards less the KL of each whole response. Collective over the last stage."""
    mine: dict[Key, tuple[float, float, int]] = {}
    for shard in shards:
        given_T, kept_T = torch.where(shard.mask_T, shard.rewards_T.double(), 0.0), token_rewards(run, shard)
        penalty_S = run.sequence_sum(given_T - kept_T, shard.sequence_T, shard.num_sequences)
        rows = zip(shard.rewards_S.tolist(), penalty_S.tolist(), shard.lengths_S.tolist(), strict=True)
        mine |= dict(zip(shard.samples, rows, strict=True))
    every = {key: row for part in gather_objects(mine, run.groups.data) for key, row in part.items()}
    every.pop((-1, -1), None)  # dummies
    groups: dict[int, list[Key]] = {}
    for key in sorted(every):
        groups.setdefault(key[0], []).append(key)
    rewards = {group: np.array([every[key][0] - every[key][1] for key in keys]) for group, keys in groups.items()}
    lengths = {group: np.array([every[key][2] for key in keys]) for group, keys in groups.items()}
    given = credit_by_response(run.config.algorithm.credit, rewards, lengths)
    advantage_of = {key: float(a) for group, keys in groups.items() for key, a in zip(keys, given[group], strict=True)}
    penalties = [penalty for _, penalty, _ in every.values()]
    metrics = {"reward/kl_penalty": float(np.mean(penalties))} if penalties else {}
    return [_with_advantages(shard, advantage_of) for shard in shards], metrics


def _with_advantages(shard: TokenShard, advantage_of: dict[Key, float]) -> TokenShard:
    advantages_S = shard.advantages_S.new_tensor([advantage_of.get(key, 0.0) for key in shard.samples])
    advantages_T = torch.where(shard.mask_T, expand(advantages_S, shard.sequence_T), 0.0)
    return shard.replace(advantages_S=advantages_S, advantages_T=advantages_T)


# ----------------------------------------------------------------------------------------------------------- by values


@dataclass(frozen=True)
class _Chain:
    """GAE of one micro-batch: this rank's tokens, [T_local] float64."""

    advantages_T: torch.Tensor
    returns_T: torch.Tensor


def _by_values(
    run: Learner, batches: Sequence[PackedBatch], shards: Sequence[TokenShard]
) -> tuple[list[TokenShard], dict[str, float]]:
    """GAE over the critic's values. Collective over the last stage."""
    chains = [_chain(run, batch, shard) for batch, shard in zip(batches, shards, strict=True)]
    _check_finite(run, shards, chains)
    mean, std = _moments(run, shards, chains) if run.config.critic.whiten else (0.0, 1.0)
    credited = [_with_chain(run, shard, chain, mean, std) for shard, chain in zip(shards, chains, strict=True)]
    return credited, _metrics(run, shards, chains)


def _chain(run: Learner, batch: PackedBatch, shard: TokenShard) -> _Chain:
    """GAE needs whole sequences: every rank of the token group puts them together, and keeps its own part of them."""
    settings, boundaries = run.config.critic, batch.cu_seqlens
    rewards_T, values_T = (
        unshard_tokens(gather_pieces(values, run.groups.token), boundaries, run.groups.shard)
        for values in (token_rewards(run, shard), torch.where(shard.mask_T, shard.values_T.double(), 0.0))
    )
    chain = rewards_T, values_T, batch.mask_T, batch.sequence_T
    lam_S = lambdas(batch.lengths_S, settings.lam, settings.lam_alpha)
    advantages_T = generalised_advantages(*chain, gamma=settings.gamma, lam_S=lam_S)
    towards_T = advantages_T
    if settings.value_lam is not None:
        of_values_S = torch.full_like(lam_S, settings.value_lam)
        towards_T = generalised_advantages(*chain, gamma=settings.gamma, lam_S=of_values_S)
    own = shard_positions(boundaries, run.groups.shard)
    return _Chain(advantages_T[own], (towards_T + values_T)[own])


def _check_finite(run: Learner, shards: Sequence[TokenShard], chains: Sequence[_Chain]) -> None:
    """Raises NonFiniteError on every rank of the stage."""
    bad = [
        key
        for shard, chain in zip(shards, chains, strict=True)
        for key, sum_S in zip(
            shard.samples,
            run.sequence_sum(
                (shard.mask_T & ~torch.isfinite(chain.returns_T)).double(), shard.sequence_T, shard.num_sequences
            ).tolist(),
            strict=True,
        )
        if sum_S
    ]
    found = [key for part in gather_objects(bad, run.groups.data) for key in part]
    if found:
        group, sample = min(found)
        raise NonFiniteError(f"prompt {group} of this outer step, response {sample}: a critic's value is not finite")


def _with_chain(run: Learner, shard: TokenShard, chain: _Chain, mean: float, std: float) -> TokenShard:
    dtype = shard.advantages_T.dtype
    whitened_T = (chain.advantages_T - mean) / std if std else torch.zeros_like(chain.advantages_T)
    advantages_T = torch.where(shard.mask_T, whitened_T, 0.0)
    sums_S = run.sequence_sum(advantages_T, shard.sequence_T, shard.num_sequences)
    return shard.replace(
        advantages_T=advantages_T.to(dtype),
        advantages_S=(sums_S / shard.lengths_S.clamp(min=1)).to(dtype),
        values_T=torch.where(shard.mask_T, shard.values_T, 0.0).to(dtype),
        returns_T=torch.where(shard.mask_T, chain.returns_T, 0.0).to(dtype),
    )


def _in_units_of_the_head(run: Learner, shards: Sequence[TokenShard]) -> list[TokenShard]:
    """Values and returns as the head is to give them, by the moments as they are now."""
    assert run.critic is not None
    mean, std = run.critic.scale.mean, run.critic.scale.std
    return [
        shard.replace(values_T=(shard.values_T - mean) / std, returns_T=(shard.returns_T - mean) / std)
        for shard in shards
    ]


def _metrics(run: Learner, shards: Sequence[TokenShard], chains: Sequence[_Chain]) -> dict[str, float]:
    """``critic/*`` of the values before the update, over trained tokens. Collective over the last stage."""

    def plain(shard: TokenShard, chain: _Chain) -> tuple[torch.Tensor, ...]:
        return torch.ones_like(chain.returns_T), chain.returns_T, chain.returns_T.square(), shard.values_T.double()

    count, returns, squared, values = _sums(run, shards, chains, plain)
    n = max(count, 1.0)
    mean, error = returns / n, (returns - values) / n

    def centred(shard: TokenShard, chain: _Chain) -> tuple[torch.Tensor, ...]:
        residual_T = chain.returns_T - shard.values_T.double() - error
        return (chain.returns_T - mean).square(), residual_T.square()

    spread, unexplained = _sums(run, shards, chains, centred)
    metrics = {"critic/returns": mean, "critic/returns_squared": squared / n, "critic/values": values / n}
    return metrics | ({"critic/explained_variance": 1.0 - unexplained / spread} if spread else {})


def _moments(run: Learner, shards: Sequence[TokenShard], chains: Sequence[_Chain]) -> tuple[float, float]:
    """(mean, population deviation) of advantages over trained tokens. Collective over the last stage."""
    count, total = _sums(run, shards, chains, lambda _, c: (torch.ones_like(c.advantages_T), c.advantages_T))
    mean = total / max(count, 1.0)
    (squares,) = _sums(run, shards, chains, lambda _, c: ((c.advantages_T - mean).square(),))
    return mean, float(np.sqrt(squares / max(count, 1.0)))


def _sums(
    run: Learner,
    shards: Sequence[TokenShard],
    chains: Sequence[_Chain],
    rows: Callable[[TokenShard, _Chain], tuple[torch.Tensor, ...]],
) -> list[float]:
    """Float64 sums of rows [T_local] over the trained tokens of all ranks of the stage. Collective there."""
    parts = []
    for shard, chain in zip(shards, chains, strict=True):
        counted_T = shard.mask_T & expand(shard.weights_S > 0, shard.sequence_T)
        parts.append(torch.where(counted_T, torch.stack(rows(shard, chain)), 0.0).sum(dim=1))
    return reduce_token_sums(torch.stack(parts).sum(dim=0).to(device()), stage=run.groups.tensor_data).tolist()
