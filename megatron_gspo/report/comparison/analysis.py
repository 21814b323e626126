"""The numbers of a comparison: ``comparison.json``, and all that the page says. Pure functions of the cells."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from statistics import fmean, median
from typing import Any

from megatron_gspo.algorithm.comparison import (
    COLLAPSE_WINDOW,
    Mean,
    geometric_mean,
    holm,
    mean_over_seeds,
    sign_flip_p,
)
from megatron_gspo.report.comparison.cells import Cell, Comparison
from megatron_gspo.report.comparison.collapses import collapse_step
from megatron_gspo.report.comparison.contrasts import Contrast, contrasts
from megatron_gspo.report.comparison.stability import Stability, stability_of

FINAL_STEPS = 5
ALPHA = 0.05
COSTS = {
    "wall_s": "wall time of the run",
    "time/train": "time of training",
    "time/logprobs": "time of the π_old pass",
    "time/rollout": "time of the rollouts",
    "peak_memory_mb": "peak memory of the trainer",
}

Values = dict[str, dict[int, float]]
"""Arm -> seed -> value."""


@dataclass(frozen=True)
class Result:
    """What the seeds say of one contrast, in one outcome."""

    outcome: str
    contrast: Contrast
    seeds: tuple[int, ...]
    differences: tuple[float, ...]
    mean: Mean | None
    """None without a seed that every arm of it finished."""
    p: float | None
    p_holm: float | None

    @property
    def verdict(self) -> str:
        """A key of ``sentences.VERDICTS``; "here" is from these cold starts only."""
        if self.mean is None:
            return "missing"
        if self.mean.low is None or self.mean.high is None:
            return "few"
        if not any(self.differences):
            return "equal"
        apart = not self.mean.low <= 0 <= self.mean.high
        small = self.p_holm is not None and self.p_holm <= ALPHA
        if apart and small:
            return "higher" if self.mean.value > 0 else "lower"
        return "here" if small and self.mean.clustered else "uncorrected" if apart else "none"


@dataclass(frozen=True)
class Ratio:
    """A geometric mean over seeds of one arm's value divided by another's."""

    metric: str
    name: str
    arms: tuple[str, str]
    seeds: tuple[int, ...]
    mean: Mean | None
    left_out: int
    """Seeds in which a value is 0: they have no ratio."""


@dataclass(frozen=True)
class Analysis:
    """All numbers of a comparison."""

    final_steps: int
    outcomes: dict[str, Values]
    arms: dict[str, dict[str, Any]]
    results: tuple[Result, ...]
    clipping: tuple[Ratio, ...]
    costs: tuple[Ratio, ...]
    stability: Stability | None = None
    """Of a sweep."""

    @property
    def tested(self) -> list[Result]:
        """Differences in final reward that were tested."""
        return [result for result in self.results if result.outcome == "reward" and result.p is not None]


def analyse(comparison: Comparison) -> Analysis:
    """From the cells to the numbers."""
    steps = final_steps(comparison)
    values = outcomes(comparison, steps)
    if comparison.swept:  # one question, and no test for each value of it
        facts = {arm.name: arm_facts(comparison, arm.name, values) for arm in comparison.arms}
        return Analysis(steps, values, facts, (), (), (), stability_of(comparison))
    return Analysis(
        final_steps=steps,
        outcomes=values,
        arms={arm.name: arm_facts(comparison, arm.name, values) for arm in comparison.arms},
        results=tuple(result for outcome in values for result in results(comparison, outcome, values[outcome])),
        clipping=tuple(clip_ratios(comparison)),
        costs=tuple(cost_ratios(comparison)),
    )


def final_steps(comparison: Comparison) -> int:
    """How many outer steps the final reward is the mean of: ``FINAL_STEPS``, or half of a shorter run."""
    planned = comparison.setting("train", "outer_steps")
    lengths = [planned] if isinstance(planned, int) else [len(cell.outer_step) for cell in comparison.cells]
    return max(1, min(FINAL_STEPS, max(lengths, default=1) // 2))


def outcomes(comparison: Comparison, steps: int) -> dict[str, Values]:
    """Final reward: the mean of the last ``steps`` outer steps' ``reward/mean``. Accuracy: the last held-out one."""
    finals: dict[str, Callable[[Cell], float | None]] = {
        "reward": lambda cell: _mean(cell.values("reward/mean")[-steps:]),
        "accuracy": lambda cell: next(iter(cell.values("eval/accuracy")[-1:]), None),
    }
    found = {name: per_arm(comparison, final) for name, final in finals.items()}
    return {name: values for name, values in found.items() if name == "reward" or any(values.values())}


def per_arm(comparison: Comparison, of: Callable[[Cell], float | None]) -> Values:
    """Arm -> seed -> ``of`` its finished cell, where it is not None."""
    return {
        arm.name: {seed: value for seed, cell in comparison.of(arm.name).items() if (value := of(cell)) is not None}
        for arm in comparison.arms
    }


def results(comparison: Comparison, outcome: str, values: Values) -> list[Result]:
    """One a contrast; Holm's correction runs over the tests of this outcome."""
    found = [_result(comparison, outcome, contrast, values) for contrast in contrasts(comparison.arms)]
    tests = [index for index, result in enumerate(found) if result.p is not None]
    adjusted = dict(zip(tests, holm([found[index].p or 0.0 for index in tests]), strict=True))
    return [replace(result, p_holm=adjusted.get(index)) for index, result in enumerate(found)]


def _result(comparison: Comparison, outcome: str, contrast: Contrast, values: Values) -> Result:
    seeds = [seed for seed in comparison.seeds if all(seed in values[arm] for arm in contrast.arms)]
    starts = cold_starts(comparison, contrast.arms, seeds)
    differences = [contrast.value(lambda arm, seed=seed: values[arm][seed]) for seed in seeds]  # type: ignore[misc]
    differences = [
        0.0 if abs(difference) < 1e-9 else difference for difference in differences
    ]  # sums of rounded values
    mean = mean_over_seeds(differences, starts) if seeds else None
    p = sign_flip_p(differences, starts) if contrast.tested and len(seeds) > 1 else None
    return Result(outcome, contrast, tuple(seeds), tuple(differences), mean, p, None)


def cold_starts(comparison: Comparison, arms: Sequence[str], seeds: Sequence[int]) -> list[str]:
    """[seeds]: the cold start of each; arms that began a seed from different ones make a pair of them."""
    cells = [[comparison.of(arm)[seed].cold_start for arm in arms] for seed in seeds]
    return [" and ".join(dict.fromkeys(names)) for names in cells]


def clip_ratios(comparison: Comparison) -> list[Ratio]:
    """Clip fractions of one loss over another's, at equal replay, by tokens and by sequences."""
    pairs = [one for one in contrasts(comparison.arms) if len(one.plus) == 1 and _losses(comparison, one) == 2]
    found = []
    for metric in ("clip/frac_tokens", "clip/frac_sequences"):
        values = per_arm(comparison, lambda cell, metric=metric: _mean(cell.values(metric)))  # type: ignore[misc]
        found += [_ratio(comparison, metric, one.plus[0], one.minus[0], values) for one in pairs]
    return [ratio for ratio in found if ratio.mean or ratio.left_out]


def cost_ratios(comparison: Comparison) -> list[Ratio]:
    """Time and memory of each replay mode over the same loss without replay."""
    off = {(arm.loss, arm.dense): arm.name for arm in comparison.arms if arm.replay == "off"}
    pairs = [
        (arm.name, off[arm.loss, arm.dense])
        for arm in comparison.arms
        if arm.replay != "off" and (arm.loss, arm.dense) in off
    ]
    found = []
    for metric in COSTS:
        values = per_arm(comparison, lambda cell, metric=metric: cost(cell, metric))  # type: ignore[misc]
        found += [_ratio(comparison, metric, a, b, values) for a, b in pairs]
    return [ratio for ratio in found if ratio.mean]


def cost(cell: Cell, metric: str) -> float | None:
    """Seconds or megabytes: of the run as it was measured from outside, or the median outer step's ``time/*``."""
    if not metric.startswith("time/"):
        return cell.measured(metric)
    values = cell.values(metric)[1:] or cell.values(metric)  # the first step warms up
    return median(values) if values else None


def _ratio(comparison: Comparison, metric: str, a: str, b: str, values: Values) -> Ratio:
    both = [seed for seed in comparison.seeds if seed in values[a] and seed in values[b]]
    of_seed = {seed: values[a][seed] / values[b][seed] for seed in both if values[a][seed] > 0 and values[b][seed] > 0}
    of_seed = {seed: ratio for seed, ratio in of_seed.items() if 0 < ratio < math.inf}
    seeds, ratios = list(of_seed), list(of_seed.values())
    mean = geometric_mean(ratios, cold_starts(comparison, (a, b), seeds)) if seeds else None
    return Ratio(metric, f"{a} / {b}", (a, b), tuple(seeds), mean, len(both) - len(seeds))


def _losses(comparison: Comparison, contrast: Contrast) -> int:
    return len({arm.loss for arm in comparison.arms if arm.name in contrast.arms})


def arm_facts(comparison: Comparison, arm: str, values: Mapping[str, Values]) -> dict[str, Any]:
    """An arm's finished cells, final outcomes with intervals, collapses, clip fractions and costs."""
    cells = comparison.of(arm)
    mean = lambda of: over_cells(cells.values(), of)  # noqa: E731
    return {
        "finished": len(cells),
        "failed": sum(cell.arm == arm for cell in comparison.failed),
        "final": {name: over_seeds(comparison, arm, of_arm[arm]) for name, of_arm in values.items()},
        "collapsed": {seed: step for seed, cell in cells.items() if (step := collapse_step(cell)) is not None},
        "too_short": sum(len(cell.values("reward/mean")) < COLLAPSE_WINDOW for cell in cells.values()),
        "clip_tokens": mean(lambda cell: _mean(cell.values("clip/frac_tokens"))),
        "clip_sequences": mean(lambda cell: _mean(cell.values("clip/frac_sequences"))),
        "engine_k3": mean(lambda cell: _mean(cell.values("kl/engine_k3"))),
        **{name: mean(lambda cell, name=name: cost(cell, name)) for name in COSTS},
    }


def over_seeds(comparison: Comparison, arm: str, of_seed: Mapping[int, float]) -> Mean | None:
    """The mean of a value a seed, with its interval; None without a seed."""
    seeds = list(of_seed)
    return mean_over_seeds(list(of_seed.values()), cold_starts(comparison, (arm,), seeds)) if seeds else None


def over_cells(cells: Any, of: Callable[[Cell], float | None]) -> float | None:
    """The mean of what cells give."""
    return _mean([value for cell in cells if (value := of(cell)) is not None])


def as_json(analysis: Analysis) -> dict[str, Any]:
    """The analysis as JSON values, for programs."""
    return {
        "final_steps": analysis.final_steps,
        "arms": {
            name: _plain(facts) | {"values": {o: v[name] for o, v in analysis.outcomes.items()}}
            for name, facts in analysis.arms.items()
        },
        "contrasts": [
            {
                "outcome": result.outcome,
                "name": result.contrast.name,
                "plus": result.contrast.plus,
                "minus": result.contrast.minus,
                "seeds": result.seeds,
                "differences": [round(difference, 9) for difference in result.differences],
                **_plain({"mean": result.mean}),
                "p": result.p,
                "p_holm": result.p_holm,
                "verdict": result.verdict,
            }
            for result in analysis.results
        ],
        "clipping": [asdict(ratio) for ratio in analysis.clipping],
        "costs": [asdict(ratio) for ratio in analysis.costs],
        **({"stability": analysis.stability.as_json()} if analysis.stability else {}),
    }


def _plain(facts: Mapping[str, Any]) -> dict[str, Any]:
    plain = lambda value: asdict(value) if isinstance(value, Mean) else value  # noqa: E731
    return {
        k: {n: plain(v) for n, v in value.items()} if isinstance(value, dict) else plain(value)
        for k, value in facts.items()
    }


def _mean(values: Sequence[float]) -> float | None:
    return fmean(values) if values else None
