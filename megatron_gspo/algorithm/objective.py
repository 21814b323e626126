"""The whole training objective of a micro-batch: a policy loss by name, a KL term, and a check for finite numbers."""

from __future__ import annotations

from dataclasses import replace
from importlib import import_module
from typing import Protocol, cast

import torch

from megatron_gspo.algorithm.catalog import LOSSES
from megatron_gspo.algorithm.kl import kl_loss
from megatron_gspo.errors import ConfigError
from megatron_gspo.types import LossOutput, SequenceSum, TokenShard


class Loss(Protocol):
    """A policy loss. Its value is a sum over sequences that is complete on every rank (see ``LossOutput``)."""

    def __call__(
        self,
        shard: TokenShard,
        new_logprobs_T: torch.Tensor,
        *,
        clip_low: float,
        clip_high: float,
        sequence_sum: SequenceSum,
    ) -> LossOutput: ...


def resolve_loss(name: str) -> Loss:
    """Imports the loss that ``algorithm/catalog.py`` lists under ``name``. Raises ConfigError for any other name."""
    if name not in LOSSES:
        raise ConfigError(f'"{name}" is not a policy loss (known: {", ".join(LOSSES)})')
    module, _, function = LOSSES[name].function.partition(":")
    return cast(Loss, getattr(import_module(module), function))


def policy_objective(
    shard: TokenShard,
    new_logprobs_T: torch.Tensor,
    *,
    loss: Loss,
    clip_low: float,
    clip_high: float,
    kl_loss_coef: float,
    sequence_sum: SequenceSum,
) -> LossOutput:
    """The policy loss plus ``kl_loss_coef`` times the KL to the reference; the KL is not formed when that is 0."""
    output = loss(shard, new_logprobs_T, clip_low=clip_low, clip_high=clip_high, sequence_sum=sequence_sum)
    if kl_loss_coef == 0:
        return output
    kl_S = kl_loss_coef * kl_loss(shard, new_logprobs_T, sequence_sum)
    return replace(output, loss=output.loss + kl_S.sum(), loss_S=output.loss_S + kl_S.detach())


def find_non_finite(values_T: torch.Tensor, mask_T: torch.Tensor, shard: TokenShard) -> tuple[int, int] | None:
    """(group, sample) of the first response with a NaN or an infinity at an unmasked position; None when all is well.

    Masked positions are not looked at. ``values_T`` and ``mask_T`` are [T_local].
    """
    bad_T = mask_T & ~torch.isfinite(values_T)
    if not bool(bad_T.any()):
        return None
    return shard.samples[int(shard.sequence_T[bad_T][0])]
