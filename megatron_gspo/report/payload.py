"""What the report's page is drawn from: runs as plain JSON values, without markup.

Files count steps from 0, the page as the terminal from 1 (``metrics.counted``): 0 is before any training.
"""

from __future__ import annotations

import json
import math
import re
import tomllib
from collections.abc import Iterable, Sequence
from dataclasses import asdict
from itertools import pairwise
from typing import Any

from megatron_gspo.errors import ConfigError
from megatron_gspo.report.charts import SECTIONS
from megatron_gspo.report.drawing import Chart, for_families
from megatron_gspo.report.metrics import (
    COMPONENT,
    INITIAL,
    METRICS,
    TIME_PARTS,
    Record,
    by_outer_step,
    counted,
    finite,
    row_of,
    seconds,
)
from megatron_gspo.report.rundir import RunDirectory, read_lines
from megatron_gspo.report.samples import number, rollouts

CURVE_POINTS = 2000
"""A longer curve keeps the smallest and the largest value of half as many stretches: no spike is lost."""
BARS = 120
"""More outer steps than so many share a bar of the time split, which then shows their mean."""


def payload(runs: Sequence[RunDirectory]) -> dict[str, Any]:
    """Everything that the page's script reads."""
    described = [run_payload(run, label, len(runs)) for run, label in zip(runs, labels(runs), strict=True)]
    recorded = {name for run in described for name in run["steps"]["series"]}
    shown = recorded - idle_components(described)
    sections = [
        {
            "question": section.question,
            "charts": [
                asdict(chart) | {"flat": is_flat(chart, [run["steps"]["series"] for run in described])}
                for chart in (for_families(chart, shown) for chart in section.charts)
                if drawn(chart, shown)
            ],
        }
        for section in SECTIONS
    ]
    return {
        "runs": described,
        "sections": [section for section in sections if section["charts"]],
        "metrics": {
            name: [m.unit, m.meaning, m.look_for]
            for name, m in METRICS.items()
            if name in {row_of(metric) for metric in recorded}
        },
    }


def idle_components(described: Sequence[dict[str, Any]]) -> set[str]:
    """Components of the reward that are 0 at every step of every run: a line on the axis hides others. None where all
    are, since then their chart is folded away as a whole."""
    values: dict[str, set[float]] = {}
    for run in described:
        for name, curve in run["steps"]["series"].items():
            if row_of(name) == COMPONENT:
                values.setdefault(name, set()).update(curve["y"])
    idle = {name for name, seen in values.items() if seen == {0.0}}
    return idle if len(idle) < len(values) else set()


def in_order(recorded: Iterable[str]) -> list[str]:
    """The recorded metrics that have a row in ``METRICS``, in its order, and layers in theirs."""
    rows = {row: place for place, row in enumerate(METRICS)}
    return sorted(
        (name for name in recorded if row_of(name) in rows), key=lambda name: (rows[row_of(name)], len(name), name)
    )


def drawn(chart: Chart, recorded: set[str]) -> bool:
    """Whether a run has something to draw in the chart."""
    return any(curve.metric in recorded for curve in chart.curves)


def is_flat(chart: Chart, series: Sequence[dict[str, Any]]) -> bool:
    """Whether all that the chart would draw is 0 at every step of every run: the page names it and folds it away."""
    if chart.kind == "time":
        return False
    for name in (curve.metric for curve in chart.curves):
        level = 1.0 if chart.kind == "ratio" and name.startswith("ratio/") else 0.0  # what is drawn is s_i - 1
        if any(value != level for of_run in series if name in of_run for value in of_run[name]["y"]):
            return False
    return True


def run_payload(run: RunDirectory, label: str, of: int = 1) -> dict[str, Any]:
    """One run of ``of``: its curves by optimizer step and by outer step, its time split, its rollouts."""
    lines = run.metrics()
    outer = by_outer_step(lines)
    return {
        "label": label,
        "clip": clip_range(run),
        "resumed": resumed_at(run, lines),
        "steps": {"step": [counted(line["step"]) for line in lines], "series": curves(lines)},
        "outer": {
            "outer_step": [counted(line["outer_step"]) for line in outer],
            "hours": hours(outer),
            "series": curves(outer),
        },
        "bars": time_bars([line for line in outer if line["outer_step"] != INITIAL]),
        "rollouts": rollouts(run, share=of),
    }


def curves(lines: Sequence[Record]) -> dict[str, dict[str, Any]]:
    """Metric -> ``y``, its values, and ``rows``, the lines that they stand on (all lines where it is absent).

    ``thinned`` marks a curve that has more values than the page: its means would be means of extremes.
    """
    found: dict[str, dict[str, Any]] = {}
    recorded = {name for line in lines for name in line}
    for name in in_order(recorded):
        rows = [row for row, line in enumerate(lines) if finite(line.get(name))]
        points = thinned([(row, lines[row][name]) for row in rows])
        if points:
            y = [number(value) for _, value in points]
            found[name] = {"y": y} if len(y) == len(lines) else {"y": y, "rows": [row for row, _ in points]}
            if len(points) < len(rows):
                found[name]["thinned"] = True
    return found


def thinned(points: Sequence[tuple[int, float]]) -> Sequence[tuple[int, float]]:
    """At most ``CURVE_POINTS`` of them: the extremes of even stretches, in their order."""
    if len(points) <= CURVE_POINTS:
        return points
    stretches = CURVE_POINTS // 2
    edges = [round(i * len(points) / stretches) for i in range(stretches + 1)]
    kept: list[tuple[int, float]] = []
    for start, end in pairwise(edges):
        stretch = points[start:end]
        kept += sorted({min(stretch, key=lambda point: point[1]), max(stretch, key=lambda point: point[1])})
    return kept


def time_bars(outer: Sequence[Record]) -> dict[str, Any]:
    """Seconds of each part: the mean over ``every`` outer steps from ``outer_step`` on."""
    every = max(1, math.ceil(len(outer) / BARS))
    stretches = [outer[i : i + every] for i in range(0, len(outer), every)]
    parts = {f"time/{part}": [_mean(stretch, f"time/{part}") for stretch in stretches] for part in TIME_PARTS}
    return {"every": every, "outer_step": [counted(stretch[0]["outer_step"]) for stretch in stretches], "parts": parts}


def hours(outer: Sequence[Record]) -> list[float] | None:
    """Hours of work up to the end of each outer step, summed from its time split; None where no times were written."""
    total, sums = 0.0, []
    for record in outer:
        total += seconds(record)
        sums.append(float(f"{total / 3600:.6g}"))
    return sums if total else None


def resumed_at(run: RunDirectory, lines: Sequence[Record]) -> list[dict[str, int]]:
    """After which steps the run was taken up again, counted from 1: the later ``starts`` of its manifest, and where its
    file steps back."""
    outer_steps, last = set(later_starts(run)), (INITIAL, INITIAL)
    for line in read_lines(run.metrics_file):
        step, outer_step = line.get("step"), line.get("outer_step")
        if isinstance(step, int) and isinstance(outer_step, int):
            if INITIAL < step <= last[0] and outer_step <= last[1]:  # a skipped outer step's number comes twice
                outer_steps.add(outer_step)
            last = step, outer_step
    first = {line["outer_step"]: line["step"] for line in reversed(lines)}
    return [{"outer_step": number, "step": first[number]} for number in sorted(outer_steps & first.keys())]


def later_starts(run: RunDirectory) -> list[int]:
    """The outer steps at which the run was started again, as its manifest has them."""
    starts = run.manifest().get("starts")
    later = starts[1:] if isinstance(starts, list) else []
    return [
        start["outer_step"] for start in later if isinstance(start, dict) and isinstance(start.get("outer_step"), int)
    ]


def clip_range(run: RunDirectory) -> tuple[float, float] | None:
    """(clip_low, clip_high) of a loss that clips s_i; None for others, and where nothing says."""
    config = run.config()
    return config.algorithm.clip_range() if config is not None and config.algorithm.clips == "responses" else None


def settings(run: RunDirectory) -> dict[str, str]:
    """``section.key`` -> value as text, as ``config.toml`` has it; empty when it cannot be read."""
    try:
        tree = tomllib.loads(run.config_file.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return {}
    return dict(flatten(tree))


def labels(runs: Sequence[RunDirectory]) -> list[str]:
    """The directories' names, with as many parents before them as it takes to tell them apart."""
    parts = [run.path.resolve().parts for run in runs]
    if len(set(parts)) < len(parts):
        raise ConfigError(f"a run is named twice: {', '.join(str(run.path) for run in runs)}")
    depth = 1
    while len({part[-depth:] for part in parts}) < len(parts):
        depth += 1
    return ["/".join(part[-depth:]) for part in parts]


def flatten(tree: dict[str, Any], prefix: str = "") -> list[tuple[str, str]]:
    """``section.key`` and its value as text, of a tree of settings."""
    rows: list[tuple[str, str]] = []
    for key, value in tree.items():
        if isinstance(value, dict):
            rows += flatten(value, f"{prefix}{key}.")
        else:
            rows.append((prefix + key, value if isinstance(value, str) else json.dumps(value, default=str)))
    return rows


def to_json(value: Any) -> str:
    """JSON that may stand inside a ``<script>`` element: no character of it can end the element or break UTF-8."""
    text = json.dumps(value, ensure_ascii=False, allow_nan=False, separators=(",", ":"))
    return re.sub("[<>&\u2028\u2029\ud800-\udfff]", lambda match: f"\\u{ord(match[0]):04x}", text)


def _mean(records: Sequence[Record], name: str) -> float | None:
    values = [value for record in records if (value := number(record.get(name))) is not None]
    return number(sum(values) / len(values), digits=6) if values else None
