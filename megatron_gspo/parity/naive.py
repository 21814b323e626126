"""The losses once more, a token at a time and in float64: what the product's own are held against.

Written from the papers that each function names, with ratios formed and clipped as the papers write them; shares
nothing with ``megatron_gspo.algorithm``.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch


@dataclass(frozen=True)
class Response:
    """One response; lists have an entry for each trained token."""

    new: list[torch.Tensor]
    """log pi_theta, scalars, differentiable."""
    old: list[float]
    ref: list[float]
    rollout: list[float]
    """log mu, the engine's."""
    advantages: list[float]
    chosen: list[bool] = field(default_factory=list)
    """Tokens that the algorithm treats apart; empty: none."""

    @property
    def log_w(self) -> list[torch.Tensor]:
        """log w_t by token."""
        return [new - old for new, old in zip(self.new, self.old, strict=True)]

    @property
    def mean_log_w(self) -> torch.Tensor:
        """log s_i, arXiv 2507.18071 eq. 7."""
        return torch.stack(self.log_w).sum() / len(self.new)


@dataclass(frozen=True)
class Token:
    """What one token adds to the objective of its response, whose tokens are averaged."""

    term: torch.Tensor
    low: bool = False
    """On the clipped branch, with the ratio below the range."""
    high: bool = False


@dataclass(frozen=True)
class NaiveTerm:
    """One response's part of a loss."""

    loss: torch.Tensor
    """Scalar float64, differentiable, with its KL term."""
    kl: float
    """The KL term, without its coefficient."""
    log_ratio: float
    """log s_i."""
    low: list[bool]
    high: list[bool]

    @property
    def clipped(self) -> list[bool]:
        """By token: on the clipped branch."""
        return [low or high for low, high in zip(self.low, self.high, strict=True)]


def naive_weights(
    groups: Sequence[int], lengths: Sequence[int] = (), aggregation: str = "paper", longest: int = 1
) -> list[float]:
    """Each response's weight, from the groups and lengths of all of its mini-batch; a token's is that over |y|."""
    sizes, prompts = Counter(groups), len(set(groups))
    if aggregation == "paper":
        return [1.0 / (prompts * sizes[group]) for group in groups]
    if aggregation == "token-mean":
        return [length / sum(lengths) for length in lengths]
    if aggregation == "token-sum":
        return [length / (prompts * sizes[group] * longest) for group, length in zip(groups, lengths, strict=True)]
    tokens: Counter[int] = Counter()
    for group, length in zip(groups, lengths, strict=True):
        tokens[group] += length
    return [length / (prompts * tokens[group]) for group, length in zip(groups, lengths, strict=True)]


def naive_term(name: str, response: Response, settings: Mapping[str, Any], weight: float, kl_coef: float) -> NaiveTerm:
    """weight / |y| sum_t [ -term_t + kl_coef k_t ], term_t by the formula of ``FORMULAS[name]``.

    k_t = pi_t / pi_old_t (pi_ref_t / pi_t - log(pi_ref_t / pi_t) - 1), arXiv 2512.02556.
    """
    tokens = FORMULAS[name](response, settings)
    objective = torch.stack([token.term for token in tokens]).sum()
    kl = torch.zeros_like(objective)
    for new, old, ref in zip(response.new, response.old, response.ref, strict=True):
        log_ref = ref - new
        kl = kl + torch.exp(new - old) * (torch.exp(log_ref) - log_ref - 1)
    share = weight / len(tokens)
    return NaiveTerm(
        loss=share * (kl_coef * kl - objective),
        kl=share * float(kl.detach()),
        log_ratio=float(response.mean_log_w.detach()),
        low=[token.low for token in tokens],
        high=[token.high for token in tokens],
    )


def distance_to_clipping(log_ratio: float, clip: float) -> float:
    """How far a log-ratio lies from the nearer end of the clip range."""
    return min(abs(log_ratio - math.log1p(-clip)), abs(log_ratio - math.log1p(clip)))


def _clipped(ratio: torch.Tensor, advantage: float, settings: Mapping[str, Any]) -> Token:
    """min(r A, clip(r, 1 - low, 1 + high) A), and not below dual_clip A where A < 0 (arXiv 1912.09729)."""
    low, high, most = 1 - settings["clip_low"], 1 + settings["clip_high"], settings.get("dual_clip")
    bounded = ratio.clamp(low, high)
    is_clipped = bool(bounded * advantage < ratio * advantage)
    term = torch.minimum(ratio * advantage, bounded * advantage)
    if most is not None and advantage < 0 and float(ratio) > most:
        return Token(torch.zeros_like(term) + most * advantage, high=True)
    return Token(term, is_clipped and bool(ratio < low), is_clipped and bool(ratio > high))


def _gspo(response: Response, settings: Mapping[str, Any]) -> list[Token]:
    """arXiv 2507.18071, eq. 5: one term for the response, which each of its tokens states here."""
    ratio = torch.exp(response.mean_log_w)
    return [_clipped(ratio, advantage, settings) for advantage in response.advantages]


def _gspo_token(response: Response, settings: Mapping[str, Any]) -> list[Token]:
    """arXiv 2507.18071, eq. 13 and 14."""
    value = torch.exp(response.mean_log_w).detach()
    ratios = [value * torch.exp(log_w - log_w.detach()) for log_w in response.log_w]
    return [_clipped(ratio, a, settings) for ratio, a in zip(ratios, response.advantages, strict=True)]


def _clipped_tokens(response: Response, settings: Mapping[str, Any]) -> list[Token]:
    """arXiv 1707.06347, eq. 7."""
    return [
        _clipped(torch.exp(log_w), a, settings) for log_w, a in zip(response.log_w, response.advantages, strict=True)
    ]


def _cispo(response: Response, settings: Mapping[str, Any]) -> list[Token]:
    """arXiv 2506.13585, eq. 4 and 5."""
    tokens = []
    for new, log_w, advantage in zip(response.new, response.log_w, response.advantages, strict=True):
        ratio = math.exp(float(log_w))
        bounded = min(max(ratio, 1 - settings["clip_low"]), 1 + settings["clip_high"])
        tokens.append(Token(bounded * advantage * new, ratio < bounded, ratio > bounded))
    return tokens


def _gmpo(response: Response, settings: Mapping[str, Any]) -> list[Token]:
    """arXiv 2507.20673: the geometric mean of min(|w A|, |clip(w) A|), with the sign of A."""
    product, decisions = torch.ones_like(response.new[0]), []
    for log_w, advantage in zip(response.log_w, response.advantages, strict=True):
        ratio = torch.exp(log_w)
        bounded = ratio.clamp(math.exp(-settings["log_clip_low"]), math.exp(settings["log_clip_high"]))
        is_clipped = bool(bounded * advantage < ratio * advantage)
        decisions.append((is_clipped and float(ratio) < 1, is_clipped and float(ratio) > 1))
        product = product * (bounded if is_clipped else ratio) ** (1 / len(response.new))
    return [Token(product * a, *flags) for a, flags in zip(response.advantages, decisions, strict=True)]


def _sapo(response: Response, settings: Mapping[str, Any]) -> list[Token]:
    """arXiv 2511.20347, eq. 6 and 7."""
    tokens = []
    for log_w, advantage in zip(response.log_w, response.advantages, strict=True):
        tau = settings["tau_positive"] if advantage > 0 else settings["tau_negative"]
        tokens.append(Token(4 / tau / (1 + torch.exp(-tau * (torch.exp(log_w) - 1))) * advantage))
    return tokens


def _luspo(response: Response, settings: Mapping[str, Any]) -> list[Token]:
    """arXiv 2602.05261: GSPO's term times |y|."""
    return [Token(len(response.new) * token.term, token.low, token.high) for token in _gspo(response, settings)]


def _vespo(response: Response, settings: Mapping[str, Any]) -> list[Token]:
    """arXiv 2602.10693."""
    log_w = max(sum(min(max(float(value), -20.0), 20.0) for value in response.log_w), math.log(1e-8))
    tokens = []
    for new, advantage in zip(response.new, response.advantages, strict=True):
        sign = "negative" if advantage < 0 else "positive"
        k, strength = settings[f"k_{sign}"], settings[f"lambda_{sign}"]
        phi = math.exp(log_w) ** k * math.exp(strength * (1 - math.exp(log_w)))
        tokens.append(Token(phi * advantage * new))
    return tokens


def _gpg(response: Response, settings: Mapping[str, Any]) -> list[Token]:
    """arXiv 2504.02546."""
    return [Token(a * new) for new, a in zip(response.new, response.advantages, strict=True)]


def _clip_cov(response: Response, settings: Mapping[str, Any]) -> list[Token]:
    """arXiv 2505.22617, eq. 11."""
    marks = response.chosen or [False] * len(response.new)
    return [
        Token(0 * log_w if mark else torch.exp(log_w) * a, mark and a < 0, mark and a > 0)
        for log_w, a, mark in zip(response.log_w, response.advantages, marks, strict=True)
    ]


def _kl_cov(response: Response, settings: Mapping[str, Any]) -> list[Token]:
    """arXiv 2505.22617, eq. 13."""
    marks = response.chosen or [False] * len(response.new)
    return [
        Token(torch.exp(log_w) * a - (settings["coefficient"] * log_w.abs() if mark else 0.0))
        for log_w, a, mark in zip(response.log_w, response.advantages, marks, strict=True)
    ]


def _distill(response: Response, settings: Mapping[str, Any]) -> list[Token]:
    """PPO's term with the teacher's advantage over pi_old."""
    tokens = []
    for log_w, ref, old, own in zip(response.log_w, response.ref, response.old, response.advantages, strict=True):
        tokens.append(_clipped(torch.exp(log_w), ref - old + settings["reward_coef"] * own, settings))
    return tokens


def _sft(response: Response, settings: Mapping[str, Any]) -> list[Token]:
    """Maximum likelihood."""
    return [Token(new) for new in response.new]


def _dppo(response: Response, settings: Mapping[str, Any]) -> list[Token]:
    """arXiv 2602.04879."""
    anchor = response.rollout if settings["anchor"] == "engine" else response.old
    tokens = []
    for new, log_mu, advantage in zip(response.new, anchor, response.advantages, strict=True):
        moved = math.exp(float(new)) - math.exp(log_mu)
        low, high = moved < -settings["clip_low"] and advantage < 0, moved > settings["clip_high"] and advantage > 0
        weight = 0.0 if low or high else min(math.exp(float(new)) / math.exp(log_mu), settings["max_ratio"])
        tokens.append(Token(weight * advantage * new, low, high))
    return tokens


FORMULAS: dict[str, Callable[[Response, Mapping[str, Any]], list[Token]]] = {
    "gspo": _gspo,
    "gspo-token": _gspo_token,
    "grpo": _clipped_tokens,
    "ppo": _clipped_tokens,
    "dapo": _clipped_tokens,
    "dr-grpo": _clipped_tokens,
    "reinforce++": _clipped_tokens,
    "reinforce++-baseline": _clipped_tokens,
    "rloo": _clipped_tokens,
    "cispo": _cispo,
    "gmpo": _gmpo,
    "sapo": _sapo,
    "luspo": _luspo,
    "vespo": _vespo,
    "dppo": _dppo,
    "gpg": _gpg,
    "clip-cov": _clip_cov,
    "kl-cov": _kl_cov,
    "distill": _distill,
    "sft": _sft,
}
"""By the names of ``algorithm.catalog``."""
