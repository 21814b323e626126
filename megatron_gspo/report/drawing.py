"""What a chart of the report is, and what of it a run has."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Literal

from megatron_gspo.report.metrics import COMPONENT, FAMILIES, LAYER, SOURCE_FAMILIES, SUITE, row_of

SHOWN_LAYERS = 8
"""Of a model with more layers, evenly spread ones are drawn, the first and the last among them."""


@dataclass(frozen=True)
class Curve:
    """A metric in a chart."""

    metric: str
    label: str
    markers: bool = False
    """For metrics that few lines have."""
    magnitude: bool = False
    """Draws |value|: for signed metrics on a log axis."""


@dataclass(frozen=True)
class Chart:
    """A picture with its curves and how to read them."""

    title: str
    unit: str
    """Title of the y axis."""
    curves: tuple[Curve, ...]
    note: str = ""
    """One sentence under the title: how to read it."""
    log: bool = False
    zero: bool = False
    """The y axis starts at 0."""
    kind: Literal["lines", "ratio", "time"] = "lines"
    """"ratio": bands of s_i - 1 with the clip range; "time": stacked seconds of an outer step."""


@dataclass(frozen=True)
class Section:
    """A question, and the charts that answer it."""

    question: str
    """What its charts answer; their heading."""
    charts: tuple[Chart, ...]


def for_families(chart: Chart, recorded: Iterable[str]) -> Chart:
    """The chart with a curve a layer, a component, a source or a suite, where one stands for all of them."""
    if not any(curve.metric.endswith(FAMILIES) or curve.metric.startswith(SUITE) for curve in chart.curves):
        return chart
    curves = []
    for curve in chart.curves:
        chosen = sorted(name for name in recorded if row_of(name) == curve.metric)
        if curve.metric.endswith(LAYER):
            names = sorted(chosen, key=len)  # layer_100 is after layer_99
            last = max(1, min(SHOWN_LAYERS, len(names)) - 1)
            chosen = list(dict.fromkeys(names[round(i * (len(names) - 1) / last)] for i in range(last + 1) if names))
        curves += [replace(curve, metric=name, label=_member(curve, name)) for name in chosen]
    return replace(chart, curves=tuple(curves))


def _member(curve: Curve, name: str) -> str:
    if curve.metric == COMPONENT:
        return name.rpartition("/")[2]
    if curve.metric in SOURCE_FAMILIES:
        return name.split("/")[1]
    if curve.metric.startswith(SUITE):
        return f"{name.split('/')[1]} {curve.label}".strip()
    return f"{curve.label} {int(name.rpartition('_')[2])}"
