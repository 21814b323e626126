"""What a comparison keeps of one cell: a run's metrics in a few kilobytes, small enough to commit."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from megatron_gspo.report.metrics import INITIAL, Record, by_outer_step
from megatron_gspo.report.rundir import RunDirectory
from megatron_gspo.report.samples import number

VERSION = 1
DIGITS, LAYER_DIGITS = 4, 3
NEAR_ONE = {"ratio/p01", "ratio/p05", "ratio/p50", "ratio/p95", "ratio/p99", "ratio/ess"}
"""Of these the distance from 1 matters: they keep ``NEAR_ONE_DIGITS``."""
NEAR_ONE_DIGITS = 8

KEPT = (
    "reward/mean", "reward/zero_std_groups", "eval/accuracy", "eval/greedy_accuracy", "grad_norm", "entropy", "lr",
    "ratio/p01", "ratio/p05", "ratio/p50", "ratio/p95", "ratio/p99",
    "ratio/abs_log_mean", "ratio/token_log_rms", "ratio/ess",
    "clip/frac_tokens", "clip/frac_sequences", "noise/abs_log_ratio_p99",
    "kl/engine_k1", "kl/engine_k3", "kl/engine_tail",
    "route/drift", "route/drift_tokens", "route/engine_mismatch", "route/engine_mismatch_tokens",
    "replay/coverage", "expert/load_max",
    "length/mean", "length/mean_positive", "length/mean_negative", "length/truncated", "dropped/responses",
    "tokens_per_s", "time/rollout", "time/reward", "time/logprobs", "time/train", "time/sync",
)  # fmt: skip
"""One value an outer step, combined over mini-batches as docs/metrics.md says; absent where a run has none."""
LAYERS = ("route/drift/layer_", "route/engine_mismatch/layer_")
"""The same of every metric that begins so: one a layer."""
BY_MINIBATCH = (
    "clip/frac_tokens",
    "clip/frac_sequences",
    "route/drift",
    "ratio/p01",
    "ratio/p99",
    "ratio/abs_log_mean",
)
"""Also kept by place in the outer step, as means over outer steps: what grows from the first mini-batch to the last."""


def digest(run_dir: Path, cell: Mapping[str, Any]) -> dict[str, Any]:
    """The cell's JSON: ``cell`` as given, how the run ended, its series by outer step and its profile by mini-batch.

    ``cell``: arm, loss, replay, dense, seed, cold_start, wall_s, peak_memory_mb (None where not measured).
    Raises DataError when ``run_dir`` holds no run. A run without a line of metrics gives empty series.
    """
    run = RunDirectory.open(run_dir)
    manifest, config, lines = run.manifest(), run.config(), run.metrics()
    trained = [line for line in lines if line["outer_step"] != INITIAL]
    initial = next((line for line in lines if line["outer_step"] == INITIAL), {})
    outer = by_outer_step(trained)
    return {
        "version": VERSION,
        "cell": dict(cell),
        "status": str(manifest.get("status") or "unknown"),
        "error": str(manifest.get("error") or ""),
        "outer_steps": config.train.outer_steps if config else None,
        "clip_range": manifest.get("clip_range"),
        "versions": manifest.get("versions") or {},
        "initial": {name: number(initial[name], DIGITS) for name in KEPT if name in initial},
        "outer_step": [record["outer_step"] for record in outer],
        "series": series(outer),
        "by_minibatch": by_minibatch(trained),
    }


def series(outer: Sequence[Record]) -> dict[str, list[float | None]]:
    """Metric -> a value an outer step; None where that step has none."""
    recorded = {name for record in outer for name in record}
    digits = {name: _digits(name) for name in KEPT if name in recorded}
    digits |= {name: LAYER_DIGITS for name in sorted(recorded) if name.startswith(LAYERS)}
    return {name: [number(record.get(name), kept) for record in outer] for name, kept in digits.items()}


def by_minibatch(lines: Sequence[Record]) -> dict[str, list[float | None]]:
    """Metric -> its mean over outer steps at mini-batch 0, 1, ...; None where no step has one there."""
    places = range(1 + max((line["minibatch"] for line in lines), default=-1))
    found: dict[str, list[float | None]] = {}
    for name in BY_MINIBATCH:
        values = [[line[name] for line in lines if line["minibatch"] == place and name in line] for place in places]
        if any(values):
            found[name] = [number(sum(at) / len(at), _digits(name)) if at else None for at in values]
    return found


def _digits(name: str) -> int:
    return NEAR_ONE_DIGITS if name in NEAR_ONE else DIGITS
