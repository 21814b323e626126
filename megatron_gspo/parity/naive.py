"""The losses once more, a token at a time and in float64: what the product's own are held against.

Written from arXiv 2507.18071, with ratios formed and clipped as the paper writes them; shares nothing with
``megatron_gspo.algorithm``.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class NaiveTerm:
    """One response's part of a loss."""

    loss: torch.Tensor
    """Scalar float64, differentiable."""
    log_ratio: float
    """log s_i, eq. 7."""
    clipped: list[bool]
    """By token: on the clipped branch."""


def naive_term(
    name: str,
    new_R: torch.Tensor,
    old_R: torch.Tensor,
    advantages_R: list[float],
    weight: float,
    clip_low: float,
    clip_high: float,
) -> NaiveTerm:
    """-weight / |y| sum_t min(r_t A_t, clip(r_t, 1 - clip_low, 1 + clip_high) A_t).

    r_t is s_i for "gspo" (eq. 5 and 7), sg[s_i] pi_t / sg[pi_t] for "gspo-token" (eq. 13 and 14), and pi_t / pi_old_t
    for "grpo" and "ppo" (eq. 2).
    """
    length = len(old_R)
    log_w = [new_R[t].double() - float(old_R[t]) for t in range(length)]
    mean = torch.stack(log_w).sum() / length
    objective, clipped = torch.zeros((), dtype=torch.float64, device=new_R.device), []
    for t in range(length):
        if name == "gspo":
            ratio = torch.exp(mean)
        elif name == "gspo-token":
            ratio = torch.exp(mean).detach() * torch.exp(log_w[t] - log_w[t].detach())
        else:
            ratio = torch.exp(log_w[t])
        bounded = ratio.clamp(1 - clip_low, 1 + clip_high)
        advantage = advantages_R[t]
        clipped.append(bool(bounded * advantage < ratio * advantage))
        objective = objective + torch.minimum(ratio * advantage, bounded * advantage)
    return NaiveTerm(-weight / length * objective, float(mean.detach()), clipped)


def distance_to_clipping(log_ratio: float, clip_low: float, clip_high: float) -> float:
    """How far a log-ratio lies from the nearer end of the clip range."""
    return min(abs(log_ratio - math.log1p(-clip_low)), abs(log_ratio - math.log1p(clip_high)))
