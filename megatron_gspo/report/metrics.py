"""The metric names of ``metrics.jsonl``: unit and kind of each.

docs/metrics.md says what they mean; a test keeps both equal.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

Record = dict[str, Any]
"""One line of ``metrics.jsonl``: step, outer_step, minibatch, and metric -> float; what was not measured is absent."""

PLACE = ("step", "outer_step", "minibatch")
"""What says where a line belongs."""

INITIAL = -1
"""``step`` and ``outer_step`` of the evaluation before any training."""


@dataclass(frozen=True)
class Metric:
    unit: str
    combine: Literal["mean", "last"] = "mean"
    """An outer step's value: the mean over its mini-batches, or the last line that has one. "last" is for what an
    outer step has one of (rewards, lengths, times, evaluations) and for s_i, furthest from pi_old in the last one."""


METRICS: dict[str, Metric] = {
    "reward/mean": Metric("reward", "last"),
    "reward/std": Metric("reward", "last"),
    "reward/zero_std_groups": Metric("fraction", "last"),
    "loss": Metric("1"),
    "grad_norm": Metric("1"),
    "lr": Metric("1"),
    "ratio/mean": Metric("1", "last"),
    "ratio/p01": Metric("1", "last"),
    "ratio/p05": Metric("1", "last"),
    "ratio/p50": Metric("1", "last"),
    "ratio/p95": Metric("1", "last"),
    "ratio/p99": Metric("1", "last"),
    "ratio/abs_log_mean": Metric("nats/token", "last"),
    "ratio/token_log_rms": Metric("nats", "last"),
    "ratio/ess": Metric("fraction", "last"),
    "clip/frac_tokens": Metric("fraction"),
    "clip/frac_sequences": Metric("fraction"),
    "clip/frac_low": Metric("fraction"),
    "clip/frac_high": Metric("fraction"),
    "clip/frac_tokens_nonzero_adv": Metric("fraction"),
    "noise/abs_log_ratio_p50": Metric("nats/token", "last"),
    "noise/abs_log_ratio_p99": Metric("nats/token", "last"),
    "entropy": Metric("nats/token"),
    "kl/engine_k1": Metric("nats/token"),
    "kl/engine_k3": Metric("nats/token"),
    "kl/engine_tail": Metric("fraction"),
    "route/drift": Metric("fraction"),
    "route/engine_mismatch": Metric("fraction"),
    "replay/coverage": Metric("fraction"),
    "expert/load_max": Metric("multiple of mean"),
    "length/mean": Metric("tokens", "last"),
    "length/mean_positive": Metric("tokens", "last"),
    "length/mean_negative": Metric("tokens", "last"),
    "length/truncated": Metric("fraction", "last"),
    "dropped/responses": Metric("responses", "last"),
    "eval/accuracy": Metric("fraction", "last"),
    "eval/greedy_accuracy": Metric("fraction", "last"),
    "eval/reward": Metric("reward", "last"),
    "eval/rewarded": Metric("fraction", "last"),
    "tokens_per_s": Metric("tokens/s", "last"),
    "time/rollout": Metric("s", "last"),
    "time/reward": Metric("s", "last"),
    "time/logprobs": Metric("s", "last"),
    "time/train": Metric("s", "last"),
    "time/sync": Metric("s", "last"),
}

TIME_PARTS = ("rollout", "reward", "logprobs", "train", "sync")


def clean(metrics: Mapping[str, Any]) -> dict[str, float]:
    """Drops None and non-finite values: strict JSON has no NaN, and a mean over nothing was not measured."""
    values = {name: float(value) for name, value in metrics.items() if value is not None}
    return {name: value for name, value in values.items() if math.isfinite(value)}


def by_outer_step(records: Iterable[Record]) -> list[Record]:
    """One record an outer step, in order: each metric combined as ``METRICS`` says (unknown ones as the mean)."""
    groups: dict[int, list[Record]] = {}
    for record in records:
        groups.setdefault(record["outer_step"], []).append(record)
    return [combine(groups[outer_step]) for outer_step in sorted(groups)]


def combine(lines: Sequence[Record]) -> Record:
    """The lines of one outer step as one record; ``step`` and ``minibatch`` are the last line's."""
    combined: Record = {}
    for name in {name: None for line in lines for name in line}:
        values = [line[name] for line in lines if name in line]
        last = name in PLACE or METRICS.get(name, Metric("")).combine == "last"
        combined[name] = values[-1] if last else sum(values) / len(values)
    return combined


def seconds(record: Record) -> float:
    """Seconds of an outer step: the sum of its time split."""
    return sum(record.get(f"time/{part}", 0.0) for part in TIME_PARTS)
