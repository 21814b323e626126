"""What a sweep says of how stable arms are: the value at which half of an arm's runs collapse, and their ratios."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from itertools import combinations
from typing import Any

from megatron_gspo.algorithm.stability import Half, Runs, half_with_interval, ratio_with_interval
from megatron_gspo.report.comparison.cells import Comparison
from megatron_gspo.report.comparison.collapses import collapse_step


@dataclass(frozen=True)
class Family:
    """An arm at every value of the sweep."""

    name: str
    counts: tuple[tuple[float, int, int], ...]
    """(value, collapsed, runs), ascending."""
    half: Half

    @property
    def short(self) -> str:
        """The half in a table's cell."""
        return f"{self.half.value:.3g}" if self.half.is_inside else self.text().removeprefix("half of its runs ")

    def text(self) -> str:
        """Where half of the runs collapse, as far as the runs say it."""
        if not any(collapsed for _, collapsed, _ in self.counts):
            return f"none of its runs collapsed up to {self.half.above:g}"
        if self.half.value > self.half.above:
            return f"half of its runs collapse above {self.half.above:g}, the largest value"
        if self.half.value < self.half.below:
            return f"half of its runs collapse below {self.half.below:g}, the smallest value"
        return f"half of its runs collapse at {self.half.value:.3g} ({bounds(self.half)})"


@dataclass(frozen=True)
class Ratio:
    """One arm's half over another's."""

    name: str
    value: float
    low: float
    high: float

    @property
    def apart(self) -> bool:
        """Whether the interval leaves 1 out."""
        return not self.low <= 1 <= self.high

    def text(self) -> str:
        """One clause with the interval."""
        verdict = "apart" if self.apart else "no difference shown"
        return f"{self.name}: {self.value:.3g} times ({self.low:.3g} to {self.high:.3g}): {verdict}"


@dataclass(frozen=True)
class Stability:
    """What a sweep says of all arms."""

    setting: str
    families: tuple[Family, ...]
    ratios: tuple[Ratio, ...]

    def as_json(self) -> dict[str, Any]:
        """As JSON values."""
        families = [asdict(family) | {"text": family.text()} for family in self.families]
        for family in families:
            family["half"] = {n: v if math.isfinite(v) else None for n, v in family["half"].items()}
        return {"setting": self.setting, "families": families, "ratios": [asdict(ratio) for ratio in self.ratios]}

    def sentences(self) -> list[str]:
        """A sentence an arm, and one a ratio."""
        said = [f"{family.name}: {family.text()}, of {self.setting}." for family in self.families]
        return said + [f"{ratio.text()}." for ratio in self.ratios]

    def rows(self) -> list[list[str]]:
        """Of the table: arm, collapses at each value, half, interval."""
        return [
            [
                family.name,
                *(f"{collapsed} of {runs}" for _, collapsed, runs in family.counts),
                f"{family.half.value:.3g}"
                if family.half.is_inside
                else family.text().removeprefix("half of its runs "),
                bounds(family.half),
            ]
            for family in self.families
        ]

    @property
    def values(self) -> list[float]:
        """Of the setting, ascending."""
        return sorted({value for family in self.families for value, _, _ in family.counts})


def bounds(half: Half) -> str:
    """The interval as far as it lies among the values that were run."""
    low = f"{half.low:.3g}" if half.low >= half.below else f"below {half.below:g}"
    high = f"{half.high:.3g}" if half.high <= half.above else f"above {half.above:g}"
    return f"{low} to {high}"


def stability_of(comparison: Comparison) -> Stability:
    """Of the cells that have finished; pairs of arms differ in the loss or in the replay mode, not in both."""
    runs = {family: runs_of(comparison, family) for family in dict.fromkeys(arm.family for arm in comparison.arms)}
    runs = {family: found for family, found in runs.items() if found}
    starts = {cell.seed: cell.cold_start for cell in comparison.cells}
    arm_of = {arm.family: arm for arm in comparison.arms}
    ratios = []
    for a, b in combinations(runs, 2):
        one, other = arm_of[a], arm_of[b]
        if (one.loss == other.loss) + (one.replay == other.replay) == 1 and one.dense == other.dense:
            found = ratio_with_interval(runs[b], runs[a], starts)
            ratios += [Ratio(f"{b} / {a}", *found)] if found else []
    families = tuple(Family(name, _counts(found), half_with_interval(found, starts)) for name, found in runs.items())
    return Stability(comparison.swept, families, tuple(ratios))


def runs_of(comparison: Comparison, family: str) -> Runs:
    """Seed -> value -> whether the run collapsed, of the seeds that have finished at some value."""
    found: dict[int, dict[float, bool]] = {}
    for arm in comparison.arms:
        if arm.family == family and arm.value is not None:
            for seed, cell in comparison.of(arm.name).items():
                found.setdefault(seed, {})[arm.value] = collapse_step(cell) is not None
    return found


def _counts(runs: Runs) -> tuple[tuple[float, int, int], ...]:
    values: Sequence[float] = sorted({value for own in runs.values() for value in own})
    return tuple(
        (value, sum(own.get(value, False) for own in runs.values()), sum(value in own for own in runs.values()))
        for value in values
    )
