"""A mini-batch's metrics once more, from whole responses in one process: what a run's sums are held against.

Written from docs/metrics.md; shares nothing with ``megatron_gspo.algorithm.metrics``.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

QUANTILES = {"p01": 0.01, "p05": 0.05, "p50": 0.5, "p95": 0.95, "p99": 0.99}


@dataclass(frozen=True)
class Measured:
    """One response of a mini-batch; arrays are [R] float64, by token."""

    new: np.ndarray
    old: np.ndarray
    ref: np.ndarray
    rollout: np.ndarray
    entropy: np.ndarray
    advantages: list[float]
    low: list[bool]
    high: list[bool]
    loss: float


@dataclass(frozen=True)
class Metric:
    """A number, and what its error is relative to."""

    value: float
    scale: float
    """At least 1 for what is made of ratios and logprobs, whose own roundings are relative to 1."""


def naive_metrics(responses: Sequence[Measured], loads: Mapping[int, np.ndarray]) -> dict[str, Metric]:
    """By the names of ``metrics.jsonl``.

    ``loads``: of each MoE layer, [experts] how many tokens of prompts and responses each expert got.
    """
    m, n = len(responses), sum(len(response.new) for response in responses)
    log_s = [float(np.mean(response.new - response.old)) for response in responses]
    s = [math.exp(value) for value in log_s]
    log_w = np.concatenate([response.new - response.old for response in responses])
    low = [token for response in responses for token in response.low]
    high = [token for response in responses for token in response.high]
    with_advantage = sum(a != 0 for response in responses for a in response.advantages)
    log_rho = np.concatenate([response.old - response.rollout for response in responses])
    rho = np.exp(log_rho)
    log_r = np.concatenate([response.ref - response.new for response in responses])
    values = {
        "ratio/mean": sum(s) / m,
        **{f"ratio/{name}": float(np.quantile(s, share)) for name, share in QUANTILES.items()},
        "ratio/abs_log_mean": sum(map(abs, log_s)) / m,
        "ratio/token_log_rms": math.sqrt(float(np.mean(log_w**2))),
        "ratio/ess": sum(s) ** 2 / (m * sum(value**2 for value in s)),
        "clip/frac_tokens": (sum(low) + sum(high)) / n,
        "clip/frac_low": sum(low) / n,
        "clip/frac_high": sum(high) / n,
        "clip/frac_sequences": sum(any(r.low) or any(r.high) for r in responses) / m,
        "clip/frac_tokens_nonzero_adv": (sum(low) + sum(high)) / with_advantage,
        "entropy": float(np.mean(np.concatenate([response.entropy for response in responses]))),
        "kl/engine_k1": float(np.mean(-log_rho)),
        "kl/engine_k3": float(np.mean(rho - 1 - log_rho)),
        "kl/engine_tail": float(np.mean(np.maximum(rho, 1 / rho) > 2)),
        "kl/ref_k1": float(np.mean(-log_r)),
        "kl/ref_k3": float(np.mean(np.exp(log_r) - 1 - log_r)),
    }
    if loads:
        values["expert/load_max"] = max(float(load.max() / load.mean()) for load in loads.values())
    metrics = {name: Metric(value, max(abs(value), 1.0)) for name, value in values.items()}
    losses = [response.loss for response in responses]
    return metrics | {"loss": Metric(sum(losses), sum(map(abs, losses)))}
