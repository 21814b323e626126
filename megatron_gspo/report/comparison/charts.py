"""The charts of the comparison's page, as JSON values: one entry a chart, drawn by ``templates/comparison.js``.

A chart whose metrics no finished cell has is left out.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from megatron_gspo.algorithm.comparison import Mean, mean_over_seeds
from megatron_gspo.report.comparison.analysis import COSTS, Analysis, Ratio, Result, cold_starts
from megatron_gspo.report.comparison.cells import Cell, Comparison, short_names
from megatron_gspo.report.comparison.collapses import collapse_step
from megatron_gspo.report.comparison.sentences import p_text, sample, signed, times_text
from megatron_gspo.report.samples import number

DIGITS = 4
QUANTILES = ("p01", "p05", "p50", "p95", "p99")


@dataclass(frozen=True)
class Curve:
    """A metric over outer steps, one curve an arm with a band over its seeds."""

    title: str
    unit: str
    metric: str
    note: str = ""
    log: bool = False
    zero: bool = False
    share: bool = False
    """Whether its values end at 1."""


ZERO = "Zero lies below a log axis and leaves a gap; a band that reaches it ends at the bottom."
REWARD = (
    Curve("Reward on training prompts", "reward", "reward/mean", share=True),
    Curve("Held-out accuracy", "accuracy (0 to 1)", "eval/accuracy", share=True),
)
CLIPPING = (
    Curve("Clipped tokens", "share of tokens (log)", "clip/frac_tokens", ZERO, log=True),
    Curve("Clipped sequences", "share of sequences (log)", "clip/frac_sequences", ZERO, log=True),
)
POLICY = (
    Curve("Distance from π_old by token", "RMS of token log-ratios, nats (log)", "ratio/token_log_rms", log=True),
    Curve("Entropy", "nats per token", "entropy", zero=True),
    Curve("Gradient norm", "norm before clipping (log)", "grad_norm", log=True),
    Curve("Response length, advantage > 0", "tokens per response", "length/mean_positive"),
    Curve("Response length, advantage < 0", "tokens per response", "length/mean_negative"),
)
ROUTING = (
    Curve(
        "Routing drift",
        "share of choices changed",
        "route/drift",
        "Since π_old, in the last mini-batch of an outer step.",
        zero=True,
    ),
    Curve("Tokens with a changed layer", "share of tokens", "route/drift_tokens", zero=True, share=True),
    Curve("Engine ≠ trainer, by choice", "share of choices", "route/engine_mismatch", zero=True, share=True),
    Curve("Engine ≠ trainer, by token", "share of tokens", "route/engine_mismatch_tokens", zero=True, share=True),
    Curve("Replayed routes", "share (0 to 1)", "replay/coverage", share=True),
    Curve("Expert load", "fullest expert / mean", "expert/load_max", zero=True),
)
ENGINE = (
    Curve(
        "Engine gap, k3", "nats per token (log)", "kl/engine_k3", "k3 below 1e-3 is usually taken as healthy.", log=True
    ),
    Curve(
        "Engine gap, tail",
        "share of tokens",
        "kl/engine_tail",
        "Tokens whose probabilities differ more than twofold.",
        zero=True,
    ),
)
TIME = (
    Curve("Time of training", "seconds per outer step", "time/train", zero=True),
    Curve("Throughput", "tokens per second", "tokens_per_s", zero=True),
)


def sections(comparison: Comparison, analysis: Analysis) -> list[dict[str, Any]]:
    """The page's sections with their charts, in reading order; sections without a chart are left out."""
    over_steps = lambda curves: [curve_chart(comparison, curve) for curve in curves]  # noqa: E731
    found = [
        ("Reward", [*over_steps(REWARD), collapse_chart(comparison), *final_charts(comparison, analysis)]),
        ("Clipping", [
            *over_steps(CLIPPING), *ratio_charts(analysis),
            profile_chart(comparison, "clip/frac_tokens", "Clipped tokens by mini-batch", "share (log)", log=True),
        ]),
        ("Ratios, entropy, gradients, lengths", [quantile_chart(comparison), *over_steps(POLICY)]),
        ("Routing", [
            *over_steps(ROUTING),
            profile_chart(comparison, "route/drift", "Routing drift by mini-batch", "share of choices changed"),
            layer_chart(comparison, "route/drift", "Routing drift by layer"),
            layer_chart(comparison, "route/engine_mismatch", "Engine ≠ trainer by layer"),
        ]),
        ("Engine gap", over_steps(ENGINE)),
        ("What replay costs", [*cost_charts(analysis), *over_steps(TIME)]),
    ]  # fmt: skip
    kept = [{"question": question, "charts": [chart for chart in charts if chart]} for question, charts in found]
    return [section for section in kept if section["charts"]]


def curve_chart(comparison: Comparison, curve: Curve) -> dict[str, Any] | None:
    """A metric over outer steps."""
    bands = {
        arm.name: band(
            comparison, arm.name, lambda cell: dict(zip(cell.outer_step, cell.series(curve.metric), strict=False))
        )
        for arm in comparison.arms
    }
    chart = _bands(curve.title, curve.unit, bands, "outer step", curve.note, curve.log, curve.zero, (curve.metric,))
    values = [value for cell in comparison.cells for value in cell.values(curve.metric)] if curve.share else []
    unit = all(0 <= value <= 1 for value in values)  # a reward may have another range
    return chart and chart | {"share": curve.share and unit, "signed": not unit}


def profile_chart(
    comparison: Comparison, metric: str, title: str, unit: str, log: bool = False
) -> dict[str, Any] | None:
    """A metric over the mini-batches of an outer step, mean over outer steps."""
    bands = {
        arm.name: band(comparison, arm.name, lambda cell: dict(enumerate(cell.by_minibatch(metric))))
        for arm in comparison.arms
    }
    note = "Mean over outer steps. The first mini-batch is trained at π_old itself, where this is exactly 0."
    return _bands(title, unit, bands, "mini-batch of the outer step", note, log, not log, (metric,))


def layer_chart(comparison: Comparison, metric: str, title: str) -> dict[str, Any] | None:
    """A routing metric over layers, mean over outer steps."""
    bands = {arm.name: band(comparison, arm.name, lambda cell: layer_means(cell, metric)) for arm in comparison.arms}
    return _bands(title, "share of choices", bands, "layer, from 0", "Mean over outer steps.", False, True, (metric,))


def layer_means(cell: Cell, metric: str) -> dict[int, float | None]:
    """Layer -> mean over outer steps."""
    prefix = f"{metric}/layer_"
    names = [
        name
        for name in cell.digest.get("series") or {}
        if name.startswith(prefix) and name.removeprefix(prefix).isdecimal()
    ]
    return {
        int(name.removeprefix(prefix)): sum(values) / len(values) for name in names if (values := cell.values(name))
    }


def collapse_chart(comparison: Comparison) -> dict[str, Any] | None:
    """The share of cells that have not collapsed, by outer step; None when no cell has."""
    fallen = {
        (cell.arm, cell.seed): step
        for cell in comparison.cells
        if cell.finished and (step := collapse_step(cell)) is not None
    }
    if not fallen:
        return None
    curves = []
    for index, arm in enumerate(comparison.arms):
        cells = comparison.of(arm.name)
        steps = sorted({step for cell in cells.values() for step in cell.outer_step})
        times = [fallen.get((arm.name, seed)) for seed in cells]
        standing = [sum(time is None or time > step for time in times) / len(times) for step in steps]
        curves.append({"arm": index, "x": steps, "y": [number(share, DIGITS) for share in standing], "n": len(cells)})
    note = "A cell has collapsed once its five-step mean reward is under half of its peak."
    return _chart(
        "bands", "Cells that have not collapsed", "share of cells", note, curves=curves, xtitle="outer step", zero=True
    )


def band(comparison: Comparison, arm: str, points: Callable[[Cell], dict[int, float | None]]) -> dict[str, Any] | None:
    """Mean, 95% interval, extremes over an arm's cells at each x, and each cell's own values."""
    cells = comparison.of(arm)
    values = {seed: {x: y for x, y in points(cell).items() if y is not None} for seed, cell in cells.items()}
    places = sorted({x for of_seed in values.values() for x in of_seed})
    if not places:
        return None
    starts = dict(zip(cells, cold_starts(comparison, (arm,), list(cells)), strict=True))
    at = [{seed: of_seed[x] for seed, of_seed in values.items() if x in of_seed} for x in places]
    means = [mean_over_seeds(list(here.values()), [starts[seed] for seed in here]) for here in at]
    return {
        "x": places,
        "y": [number(mean.value, DIGITS) for mean in means],
        "low": [number(mean.low, DIGITS) for mean in means],
        "high": [number(mean.high, DIGITS) for mean in means],
        "min": [number(min(here.values()), DIGITS) for here in at],
        "max": [number(max(here.values()), DIGITS) for here in at],
        "n": len(cells),
        "seeds": {seed: [number(of_seed.get(x), DIGITS) for x in places] for seed, of_seed in values.items()},
    }


def final_charts(comparison: Comparison, analysis: Analysis) -> list[dict[str, Any] | None]:
    """The final rewards of each arm's seeds, and the differences between arms."""
    short = short_names([cell.cold_start for cell in comparison.cells])
    steps = analysis.final_steps
    groups = [
        {
            "arm": index,
            "points": [
                [number(value, DIGITS), f"seed {seed}, {short[comparison.of(arm.name)[seed].cold_start]}"]
                for seed, value in analysis.outcomes["reward"][arm.name].items()
            ],
            **_interval(analysis.arms[arm.name]["final"]["reward"]),
        }
        for index, arm in enumerate(comparison.arms)
        if analysis.outcomes["reward"][arm.name]
    ]
    if not groups:
        return []
    note = f"Mean of the last {steps} outer steps. A point is a seed, the bar the mean with its 95% interval."
    dots = _chart("dots", "Final reward by arm", "final reward (0 to 1)", note, groups=groups)
    rows = [row(comparison, result) for result in analysis.results if result.outcome == "reward" and result.mean]
    note = "Difference within a seed: mean and 95% interval. Right of 0 the first is higher. Filled: shown."
    forest = _chart("forest", "Differences in final reward", "difference in final reward", note, rows=rows, reference=0)
    return [dots, forest if rows else None]


def row(comparison: Comparison, result: Result) -> dict[str, Any]:
    """A contrast as a row of a forest plot."""
    assert result.mean is not None
    text = f"{signed(result.mean.value)} ({p_text(result)}; {sample(result.mean)})"
    shown = result.verdict in ("higher", "lower")
    return {
        "label": result.contrast.name,
        "arms": _indices(comparison, result.contrast.arms),
        "text": text,
        "shown": shown,
    } | _interval(result.mean)


def ratio_charts(analysis: Analysis) -> list[dict[str, Any] | None]:
    """How many times as much one loss clips as another."""
    names = {"clip/frac_tokens": "tokens", "clip/frac_sequences": "sequences"}
    rows = [
        _ratio_row(ratio, analysis, f"{ratio.name}, {names[ratio.metric]}") for ratio in analysis.clipping if ratio.mean
    ]
    note = "How many times as much one loss clips as another: geometric mean over seeds with 95% interval."
    return (
        [
            _chart(
                "forest",
                "Clip fraction between losses",
                "ratio of clip fractions (log)",
                note,
                rows=rows,
                reference=1,
                log=True,
            )
        ]
        if rows
        else []
    )


def cost_charts(analysis: Analysis) -> list[dict[str, Any]]:
    """A forest plot for each of ``COSTS``."""
    note = (
        "Against the same loss without replay, geometric mean over seeds. Cells that shared the machine make it noisy."
    )
    found = []
    for metric, what in COSTS.items():
        rows = [_ratio_row(ratio, analysis, ratio.name) for ratio in analysis.costs if ratio.metric == metric]
        if rows:
            found.append(_chart("forest", f"Replay: {what}", "ratio (1: no cost)", note, rows=rows, reference=1))
    return found


def quantile_chart(comparison: Comparison) -> dict[str, Any] | None:
    """Quantiles of s_i - 1 by arm, mean over seeds and outer steps, with the clip range of a loss that clips s_i."""
    groups = []
    for index, arm in enumerate(comparison.arms):
        cells = list(comparison.of(arm.name).values())
        values = {name: [value for cell in cells for value in cell.values(f"ratio/{name}")] for name in QUANTILES}
        if all(values.values()):
            means = {name: number(sum(at) / len(at) - 1, DIGITS) for name, at in values.items()}
            groups.append({"arm": index, "clip": clip_range(arm.loss, cells), **means})
    note = (
        "Last mini-batch of an outer step, mean over outer steps and seeds. Thin bar: 98% of the sequences, thick bar: "
        "90%, dot: median; dashes: the clip range of a loss that clips s_i."
    )
    metrics = tuple(f"ratio/{name}" for name in QUANTILES)
    return _chart("quantiles", "Sequence ratio", "s_i − 1", note, groups=groups, metrics=metrics) if groups else None


def clip_range(loss: str, cells: Sequence[Cell]) -> list[float] | None:
    """Of a loss that clips s_i; None of others."""
    from megatron_gspo.algorithm.catalog import find

    if find(loss).clips != "responses":
        return None
    return next((list(found) for cell in cells if (found := cell.digest.get("clip_range"))), None)


def _bands(
    title: str,
    unit: str,
    bands: dict[str, Any],
    xtitle: str,
    note: str,
    log: bool,
    zero: bool,
    metrics: tuple[str, ...],
) -> dict[str, Any] | None:
    curves = [{"arm": index, **found} for index, found in enumerate(bands.values()) if found]
    if not curves:
        return None
    return _chart("bands", title, unit, note, curves=curves, xtitle=xtitle, log=log, zero=zero, metrics=metrics)


def _chart(kind: str, title: str, unit: str, note: str, **more: Any) -> dict[str, Any]:
    return {
        "kind": kind,
        "title": title,
        "unit": unit,
        "note": note,
        "log": False,
        "zero": False,
        "metrics": (),
        **more,
    }


def _ratio_row(ratio: Ratio, analysis: Analysis, label: str) -> dict[str, Any]:
    assert ratio.mean is not None
    arms = [list(analysis.arms).index(arm) for arm in ratio.arms]
    return {
        "label": label,
        "arms": arms,
        "text": f"{times_text(ratio.mean.value)} ({sample(ratio.mean)})",
        "shown": True,
    } | _interval(ratio.mean)


def _interval(mean: Mean) -> dict[str, float | None]:
    return {"value": number(mean.value, DIGITS), "low": number(mean.low, DIGITS), "high": number(mean.high, DIGITS)}


def _indices(comparison: Comparison, names: Sequence[str]) -> list[int]:
    order = [arm.name for arm in comparison.arms]
    return [order.index(name) for name in names]
