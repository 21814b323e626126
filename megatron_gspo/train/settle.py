"""After the passes, before training: what a mini-batch's tokens weigh once engine and trainer are both known."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from megatron_gspo.algorithm.importance import Corrected, correct
from megatron_gspo.megatron.groups import device
from megatron_gspo.parallel.exchange import broadcast_object, gather_objects
from megatron_gspo.parallel.sums import StageTotals, reduce_token_sums
from megatron_gspo.train.batch import Key, Minibatch, weights_of
from megatron_gspo.train.learner import Learner
from megatron_gspo.types import TokenShard

SUMS = ("tokens", "weight", "weight_squared", "left_out", "out_of_band", "rho_squared", "log_mu", "log_old")
"""Over trained tokens."""


@dataclass(frozen=True)
class Settled:
    """A mini-batch with the weights that its tokens are trained with."""

    minibatch: Minibatch
    metrics: dict[str, float]
    """``correction/*``; on every rank."""


def settle(run: Learner, minibatch: Minibatch) -> Settled:
    """Corrects the tokens of a mini-batch, which hold old logprobs, as ``[correction]`` says, and lets the algorithm
    look at the whole of it. Collective."""
    metrics, shards = None, list(minibatch.shards)
    if run.groups.is_last_stage:
        metrics, shards = _corrected(run, shards)
        shards = run.config.algorithm.prepare(shards, StageTotals(run.groups.tensor_data, device()))
    if run.config.correction.weighs:
        metrics = broadcast_object(metrics, run.groups.last_stage_rank, run.groups.pipeline)
    return Settled(minibatch.with_shards(shards), metrics or {})


def _corrected(run: Learner, shards: list[TokenShard]) -> tuple[dict[str, float], list[TokenShard]]:
    """On the last stage. Collective there."""
    settings = run.config.correction
    if settings.bypass:
        return {}, [_held_against_engine(shard) for shard in shards]
    if not settings.weighs:
        return {}, shards
    corrected = [correct(shard, settings, run.sequence_sum) for shard in shards]
    metrics = _metrics(run, shards, corrected)
    settled = [_with_weights(run, shard, each) for shard, each in zip(shards, corrected, strict=True)]
    return metrics, _shrunk(run, settled) if settings.denominator == "shrink" else settled


def _held_against_engine(shard: TokenShard) -> TokenShard:
    """log mu in the place of log pi_old, which metrics still read where there was a pass of it."""
    known = {TokenShard.trainer_logprobs_T: shard.old_logprobs_T} if TokenShard.old_logprobs_T in shard else {}
    return shard | known | {TokenShard.old_logprobs_T: shard.rollout_logprobs_T.to(shard.advantages_T.dtype)}


def _with_weights(run: Learner, shard: TokenShard, corrected: Corrected) -> TokenShard:
    weights_T = corrected.weights_T.to(shard.advantages_T.dtype)
    counted_T = torch.where(shard.mask_T, weights_T, 0.0)
    sums_S = run.sequence_sum(counted_T, shard.sequence_T, shard.num_sequences)
    return shard | {
        TokenShard.corrections_T: weights_T,
        TokenShard.corrections_S: sums_S / shard.lengths_S.clamp(min=1),
    }


def _shrunk(run: Learner, shards: Sequence[TokenShard]) -> list[TokenShard]:
    """Tokens of weight 0 as if they had never been trained: out of masks, lengths and their mini-batch's weights."""
    masks = [shard.mask_T & (shard.corrections_T > 0) for shard in shards]
    lengths = [
        run.sequence_sum(mask_T.to(torch.float64), shard.sequence_T, shard.num_sequences).long()
        for mask_T, shard in zip(masks, shards, strict=True)
    ]
    kept: dict[Key, int] = {}
    for shard, lengths_S in zip(shards, lengths, strict=True):
        kept |= {key: length for key, length in zip(shard.samples, lengths_S.tolist(), strict=True) if length}
    everyone = {key: length for part in gather_objects(kept, run.groups.data) for key, length in part.items()}
    weights = weights_of({key: everyone[key] for key in sorted(everyone)}, run.config)
    settled = []
    for shard, mask_T, lengths_S in zip(shards, masks, lengths, strict=True):
        weights_S = shard.weights_S.new_tensor([weights.get(key, 0.0) for key in shard.samples])
        total_S = shard.corrections_S * shard.lengths_S.clamp(min=1)
        settled.append(
            shard.replace(
                mask_T=mask_T, lengths_S=lengths_S, weights_S=weights_S, corrections_S=total_S / lengths_S.clamp(min=1)
            )
        )
    return settled


def _metrics(run: Learner, shards: Sequence[TokenShard], corrected: Sequence[Corrected]) -> dict[str, float]:
    """On the last stage's ranks. Collective there."""
    settings = run.config.correction
    total = torch.zeros(len(SUMS), dtype=torch.float64, device=device())
    responses = torch.zeros(2, dtype=torch.float64, device=device())
    for shard, each in zip(shards, corrected, strict=True):
        weights_T, log_rho_T = each.weights_T.double(), each.log_rho_T.double()
        low = math.log(settings.low) if settings.low else -math.inf
        outside_T = (each.log_rho_level_T < low) | (each.log_rho_level_T > math.log(settings.high))
        rows_T = torch.stack(
            [
                torch.ones_like(weights_T),
                weights_T,
                weights_T.square(),
                (weights_T == 0).double(),
                outside_T.double(),
                torch.exp(2 * log_rho_T),
                shard.rollout_logprobs_T.double(),
                shard.old_logprobs_T.double(),
            ]
        )
        total += torch.where(shard.mask_T, rows_T, 0.0).sum(dim=1)
        weight_S = run.sequence_sum(torch.where(shard.mask_T, weights_T, 0.0), shard.sequence_T, shard.num_sequences)
        real_S = shard.weights_S > 0
        responses += torch.stack([real_S.sum(), (real_S & (weight_S == 0)).sum()]).double()
    sums = dict(zip(SUMS, reduce_token_sums(total, stage=run.groups.tensor_data).tolist(), strict=True))
    count, left_out = reduce_token_sums(responses, stage=run.groups.data).tolist()
    n = max(sums["tokens"], 1.0)
    return {
        "correction/weight": sums["weight"] / n,
        "correction/ess": sums["weight"] ** 2 / (n * sums["weight_squared"]) if sums["weight_squared"] else 0.0,
        "correction/masked_tokens": sums["left_out"] / n,
        "correction/masked_sequences": left_out / max(count, 1.0),
        "correction/out_of_band": sums["out_of_band"] / n,
        "correction/chi2": sums["rho_squared"] / n - 1.0,
        "correction/ppl_engine": math.exp(-sums["log_mu"] / n),
        "correction/ppl_trainer": math.exp(-sums["log_old"] / n),
    }
