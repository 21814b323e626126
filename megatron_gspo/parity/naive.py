"""The losses once more, a token at a time and in float64: what the product's own are held against.

Written from arXiv 2507.18071 and, for the KL term, arXiv 2512.02556, with ratios formed and clipped as the papers
write them; shares nothing with ``megatron_gspo.algorithm``.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class NaiveTerm:
    """One response's part of a loss."""

    loss: torch.Tensor
    """Scalar float64, differentiable, with its KL term."""
    kl: float
    """The KL term, without its coefficient."""
    log_ratio: float
    """log s_i, eq. 7."""
    low: list[bool]
    """By token: on the clipped branch, with the ratio below the range."""
    high: list[bool]
    """The same above it."""

    @property
    def clipped(self) -> list[bool]:
        return [low or high for low, high in zip(self.low, self.high, strict=True)]


def naive_weights(groups: Sequence[int]) -> list[float]:
    """1 / (P G_p) of each response of a mini-batch, from the groups of all of them."""
    sizes = Counter(groups)
    return [1.0 / (len(sizes) * sizes[group]) for group in groups]


def naive_term(
    name: str,
    new_R: torch.Tensor,
    old_R: torch.Tensor,
    ref_R: torch.Tensor,
    advantages_R: list[float],
    weight: float,
    clip: float,
    kl_coef: float,
) -> NaiveTerm:
    """weight / |y| sum_t [ -min(r_t A_t, clip(r_t, 1 - clip, 1 + clip) A_t) + kl_coef k_t ].

    r_t is s_i for "gspo" (eq. 5 and 7), sg[s_i] pi_t / sg[pi_t] for "gspo-token" (eq. 13 and 14), and pi_t / pi_old_t
    for "grpo" and "ppo" (eq. 2). k_t = pi_t / pi_old_t (pi_ref_t / pi_t - log(pi_ref_t / pi_t) - 1).
    """
    length = len(old_R)
    log_w = [new_R[t].double() - float(old_R[t]) for t in range(length)]
    mean = torch.stack(log_w).sum() / length
    objective = torch.zeros((), dtype=torch.float64, device=new_R.device)
    kl, low, high = torch.zeros_like(objective), [], []
    for t in range(length):
        if name == "gspo":
            ratio = torch.exp(mean)
        elif name == "gspo-token":
            ratio = torch.exp(mean).detach() * torch.exp(log_w[t] - log_w[t].detach())
        else:
            ratio = torch.exp(log_w[t])
        bounded = ratio.clamp(1 - clip, 1 + clip)
        advantage = advantages_R[t]
        is_clipped = bool(bounded * advantage < ratio * advantage)
        low.append(is_clipped and bool(ratio < 1 - clip))
        high.append(is_clipped and bool(ratio > 1 + clip))
        objective = objective + torch.minimum(ratio * advantage, bounded * advantage)
        log_ref = float(ref_R[t]) - new_R[t].double()
        kl = kl + torch.exp(log_w[t]) * (torch.exp(log_ref) - log_ref - 1)
    share = weight / length
    return NaiveTerm(share * (kl_coef * kl - objective), share * float(kl.detach()), float(mean.detach()), low, high)


def distance_to_clipping(log_ratio: float, clip: float) -> float:
    """How far a log-ratio lies from the nearer end of the clip range."""
    return min(abs(log_ratio - math.log1p(-clip)), abs(log_ratio - math.log1p(clip)))
