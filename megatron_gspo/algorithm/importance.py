"""Corrections for the gap between the engine that draws and the trainer that learns: rho = pi_old / mu.

Responses are drawn from mu, the engine's policy; a loss's ratio is held against pi_old, the trainer's at the same
weights. Where the two differ (precision, kernels, other experts), the gradient is that of another distribution. A
weight rho on each token or response takes that back; because rho has a heavy tail, rules bound it, and those that
leave tokens out altogether bias the gradient in another way. ``docs/corrections.md`` has the rules' bias and variance.

    level         rho of a token                                               known as
    "token"       pi_old_t / mu_t                                              TIS; IcePop, with rule "mask"
    "sequence"    prod_t pi_old_t / mu_t, one weight for the whole response    what verl, TRL and NeMo-RL call sequence
    "geometric"   (prod_t pi_old_t / mu_t)^(1/|y|)                             what AReaL and ms-swift call sequence

    rule          weight
    "truncate"    min(rho, high)
    "clip"        min(max(rho, low), high)
    "mask"        rho where low <= rho <= high, else 0
    "drop"        1 where low <= rho <= high, else 0
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple, cast

import torch

from megatron_gspo.algorithm.correction import Correction
from megatron_gspo.algorithm.ratios import expand, masked_log_ratio
from megatron_gspo.named import find_named
from megatron_gspo.types import SequenceSum, TokenShard

SUM_BOUND = 20.0
"""A response's summed log rho is kept within +- this: e^20 is 5e8."""

Rule = Callable[[torch.Tensor, float, float], torch.Tensor]
"""(log rho, low, high) -> weights >= 0, elementwise; 0 leaves the token out."""


def truncate(log_rho: torch.Tensor, low: float, high: float) -> torch.Tensor:
    """min(rho, high)."""
    return log_rho.clamp(max=math.log(high)).exp()


def clip(log_rho: torch.Tensor, low: float, high: float) -> torch.Tensor:
    """rho within [low, high]."""
    return log_rho.clamp(_log(low), math.log(high)).exp()


def mask(log_rho: torch.Tensor, low: float, high: float) -> torch.Tensor:
    """rho inside [low, high], 0 outside."""
    return _inside(log_rho, low, high) * truncate(log_rho, low, high)


def drop(log_rho: torch.Tensor, low: float, high: float) -> torch.Tensor:
    """1 inside [low, high], 0 outside."""
    return _inside(log_rho, low, high).to(log_rho.dtype)


RULES: dict[str, Rule] = {"truncate": truncate, "clip": clip, "mask": mask, "drop": drop}


class Corrected(NamedTuple):
    """The weights of one micro-batch's tokens."""

    weights_T: torch.Tensor
    """[T_local]; 0 where a token is left out, 1 where nothing is corrected and where the mask is False."""
    log_rho_T: torch.Tensor
    """[T_local] log(pi_old / mu) of trained tokens, 0 elsewhere; what metrics are made of."""
    log_rho_level_T: torch.Tensor
    """[T_local] log rho at the level of the settings: what the band is about."""


def rule_named(name: str) -> Rule:
    """An entry of ``RULES``, or ``module:function`` (``file.py:function``). Raises ConfigError for what is neither."""
    if name in RULES:
        return RULES[name]
    return cast(Rule, find_named(name, "correction.rule"))


def correct(shard: TokenShard, settings: Correction, sequence_sum: SequenceSum) -> Corrected:
    """The weights that ``[correction]`` gives a micro-batch's tokens.

    Args:
        shard: with ``old_logprobs_T`` and ``rollout_logprobs_T``.
        settings: what is corrected, and how.
        sequence_sum: sums over each sequence's tokens on all ranks.
    """
    old_T, mu_T = shard.old_logprobs_T, shard.rollout_logprobs_T
    log_rho_T = masked_log_ratio(old_T, mu_T.to(old_T.dtype), shard.mask_T)
    estimates_T = {
        "k1": log_rho_T.abs(),
        "k2": log_rho_T.square() / 2,
        "k3": torch.expm1(log_rho_T) - log_rho_T,
    }
    rare_T = (log_rho_T < _log(settings.veto)) & shard.mask_T
    counted_T = shard.mask_T.to(log_rho_T.dtype)
    rows_T = [log_rho_T, counted_T, rare_T.to(log_rho_T.dtype), *estimates_T.values()]
    sums_S = sequence_sum(torch.stack(rows_T), shard.sequence_T, shard.num_sequences)
    lengths_S = sums_S[1].clamp(min=1)
    level_T = {
        "token": log_rho_T,
        "sequence": expand(sums_S[0].clamp(-SUM_BOUND, SUM_BOUND), shard.sequence_T),
        "geometric": expand(sums_S[0] / lengths_S, shard.sequence_T),
    }[settings.level]
    weights_T = torch.ones_like(log_rho_T)
    if settings.rule != "off":
        weights_T = rule_named(settings.rule)(level_T, settings.low, settings.high)
    if settings.reject != "off":
        which = list(estimates_T).index(settings.reject)
        mean_T = expand(sums_S[3 + which] / lengths_S, shard.sequence_T)
        estimate_T = estimates_T[settings.reject] if settings.reject_level == "token" else mean_T
        weights_T = weights_T.masked_fill(estimate_T > settings.reject_above, 0.0)
    weights_T = weights_T.masked_fill(expand(sums_S[2] > 0, shard.sequence_T), 0.0)
    return Corrected(torch.where(shard.mask_T, weights_T, 1.0), log_rho_T, level_T)


def _inside(log_rho: torch.Tensor, low: float, high: float) -> torch.Tensor:
    return (log_rho >= _log(low)) & (log_rho <= math.log(high))


def _log(value: float) -> float:
    return math.log(value) if value > 0 else -math.inf
