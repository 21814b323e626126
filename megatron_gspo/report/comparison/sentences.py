"""What a comparison shows and what it does not, in plain sentences, each computed from its numbers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from megatron_gspo.algorithm.comparison import MIN_COLD_STARTS, Mean, smallest_p
from megatron_gspo.report.comparison.analysis import ALPHA, Analysis, Ratio, Result
from megatron_gspo.report.comparison.cells import Comparison
from megatron_gspo.report.text import count

SHOWN = ("higher", "lower")
VERDICTS = {
    "higher": "higher",
    "lower": "lower",
    "here": "from these cold starts only",
    "uncorrected": "not shown after correction",
    "none": "no difference shown",
    "equal": "equal",
    "few": "one seed",
    "missing": "no seed yet",
}


@dataclass(frozen=True)
class Finding:
    """One sentence; ``shown``: whether it claims a difference that stood up."""

    text: str
    shown: bool = False


def findings(comparison: Comparison, analysis: Analysis) -> list[Finding]:
    """What the comparison shows, the final rewards first."""
    if analysis.stability is not None:
        said = [Finding(overall_of_sweep(comparison, analysis))]
        apart = {ratio.text() + "." for ratio in analysis.stability.ratios if ratio.apart}
        return said + [Finding(text, text in apart) for text in analysis.stability.sentences()]
    rewards = [result for result in analysis.results if result.outcome == "reward"]
    said = [Finding(sentence(result, analysis), result.verdict in SHOWN) for result in rewards]
    others = [
        ratios("Share of tokens clipped", [ratio for ratio in analysis.clipping if ratio.metric == "clip/frac_tokens"]),
        collapses(comparison, analysis),
        ratios("Wall time", [ratio for ratio in analysis.costs if ratio.metric == "wall_s"]),
        ratios("Peak memory", [ratio for ratio in analysis.costs if ratio.metric == "peak_memory_mb"]),
        accuracy(analysis),
    ]
    return [Finding(overall(analysis)), *said, *(Finding(text) for text in others if text)]


def overall_of_sweep(comparison: Comparison, analysis: Analysis) -> str:
    """What was asked, from how many runs, and what the intervals are."""
    assert analysis.stability is not None
    cells = sum(cell.finished for cell in comparison.cells)
    return (
        f"Collapse as a function of {analysis.stability.setting}, in {count(cells, 'run')}: a logistic curve in its "
        f"log by Firth's penalised likelihood; 95% intervals, the wider of the curve's own and of those by resampling "
        f"seeds within cold starts."
    )


def overall(analysis: Analysis) -> str:
    """How many differences were looked for and found, from how many seeds, by which test."""
    tested = analysis.tested
    if not tested:
        return "No difference in final reward could be tested: that takes two seeds that both arms have finished."
    shown = sum(result.verdict in SHOWN for result in tested)
    samples = dict.fromkeys(sample(result.mean) for result in tested if result.mean)
    corrected = f", corrected by Holm for {len(tested)} tests" if len(tested) > 1 else ""
    return (
        f"{shown} of {count(len(tested), 'difference')} in final reward could be shown, with {' or '.join(samples)}. "
        f"Intervals are 95%; p is of the exact sign-flip test{corrected}."
    )


def sentence(result: Result, analysis: Analysis) -> str:
    """What the seeds say of one difference in final reward."""
    subject, mean = result.contrast.subject, result.mean
    if mean is None:
        return f"{subject}: no seed has finished in every arm of it."
    if mean.low is None:
        return f"{subject}: {signed(mean.value)} in one seed, which says nothing of other seeds."
    if result.p_holm is None:
        value = f"{signed(mean.value)} (interval {interval(mean)})"
        return f"{subject}, a control that is described and not tested: {value}."
    p = f"p {p_value(result.p_holm)}"
    evidence = f"interval {interval(mean)}; {p}"
    match result.verdict:
        case "equal":
            return f"{subject}: equal final rewards in every one of {count(mean.seeds, 'seed')}."
        case "higher" | "lower":
            return f"{clause(result)} ({evidence})."
        case "here" if mean.clustered:
            return (
                f"{clause(result)}, from these cold starts ({evidence}); that it would from others, "
                f"{count(mean.cold_starts, 'cold start')} cannot show: the interval includes 0."
            )
        case "uncorrected":
            return f"{subject}: not shown; the interval {interval(mean)} leaves 0 out, but {p} after correction."
        case _:
            return f"{subject}: no difference could be shown; the interval {interval(mean)} includes 0 ({p})."


def clause(result: Result) -> str:
    """``gspo-off ended higher than grpo-off, by 0.100``."""
    value = result.mean.value if result.mean else 0.0
    return f"{result.contrast.higher if value > 0 else result.contrast.lower}, by {abs(value):.3f}"


def ratios(what: str, found: Sequence[Ratio]) -> str:
    """``Wall time: grpo-r2 / grpo-off = 1.03 (1.02 to 1.04); ...``; empty for none."""
    return f"{what}: {'; '.join(map(ratio_text, found))}." if found else ""


def ratio_text(ratio: Ratio) -> str:
    """A ratio with its interval."""
    zero = f", {count(ratio.left_out, 'seed')} with a 0 left out" if ratio.left_out else ""
    if ratio.mean is None:
        return f"{ratio.name} has no value{zero}"
    return f"{ratio.name} = {times_text(ratio.mean.value)} ({ratio_interval(ratio.mean)}{zero})"


def accuracy(analysis: Analysis) -> str:
    """Held-out accuracy in one sentence; empty where no cell has it."""
    found = [result for result in analysis.results if result.outcome == "accuracy" and result.p is not None]
    shown = [clause(result) for result in found if result.verdict in SHOWN]
    if not found:
        return ""
    said = "; ".join(shown) if shown else f"none of {count(len(found), 'difference')} could be shown"
    return f"Held-out accuracy, a family of tests of its own: {said}."


def collapses(comparison: Comparison, analysis: Analysis) -> str:
    """Which arms have cells that collapsed."""
    fallen = {name: facts["collapsed"] for name, facts in analysis.arms.items() if facts["collapsed"]}
    definition = "five-step mean reward under half of its peak"
    finished = sum(facts["finished"] for facts in analysis.arms.values())
    if finished and all(facts["too_short"] == facts["finished"] for facts in analysis.arms.values()):
        return f"No cell is long enough for a collapse to be seen ({definition})."
    if not fallen:
        return f"No finished cell collapsed ({definition})."
    parts = []
    for name, steps in fallen.items():
        when = ", ".join(map(str, sorted(steps.values())))
        parts.append(f"{name} in {len(steps)} of {count(analysis.arms[name]['finished'], 'cell')} (outer step {when})")
    rest = "; no other arm" if len(fallen) < len(comparison.arms) else ""
    return f"Collapsed ({definition}): {'; '.join(parts)}{rest}."


def limits(comparison: Comparison, analysis: Analysis) -> list[str]:
    """What it does not show: who was left out, what was held fixed, what is too small to be seen."""
    found = [
        _unfinished(comparison),
        _failed(comparison),
        "" if comparison.swept else _cold_starts(analysis),
        _power(analysis),
        _tests(analysis),
        _scope(comparison),
        _settings(comparison),
        _gap(comparison),
        _dense(comparison),
        "Bands around curves are of each arm by itself: arms whose bands overlap may still differ in every seed. "
        "Differences are taken within a seed, and their intervals are what counts.",
    ]
    return [text for text in found if text]


def _unfinished(comparison: Comparison) -> str:
    done = len(comparison.cells)
    if done == comparison.planned:
        return ""
    cells = count(comparison.planned, "cell")
    return f"It is not complete: {done} of {cells} have ended. Looking again and again makes chance findings likelier."


def _failed(comparison: Comparison) -> str:
    failed = comparison.failed
    names = ", ".join(f"{cell.arm} seed {cell.seed}" for cell in failed[:8]) + (", ..." if len(failed) > 8 else "")
    if not failed:
        return ""
    left_out = "counts nowhere" if len(failed) == 1 else "count nowhere"
    worst = "an arm that fails in its worst runs looks better than it is"
    return f"{count(len(failed), 'cell')} failed ({names}) and {left_out}: {worst}."


def _cold_starts(analysis: Analysis) -> str:
    means = [result.mean for result in analysis.results if result.mean and result.mean.low is not None]
    if not means:
        return "Without at least two seeds there are no intervals: the numbers describe these runs alone."
    clustered = [mean for mean in means if mean.clustered]
    starts = min(mean.cold_starts for mean in clustered or means)
    if clustered:
        return (
            f"Intervals are over {starts} cold starts (Student's t on their means, {starts - 1} degrees of freedom): "
            f"seeds of one cold start are not independent. They speak of cold starts made as these were."
        )
    return (
        f"With {count(starts, 'cold start')}, fewer than {MIN_COLD_STARTS}, intervals are over seeds and hold for runs "
        f"from {'it' if starts == 1 else 'them'} alone: another cold start may answer differently."
    )


def _power(analysis: Analysis) -> str:
    means = [result.mean for result in analysis.tested if result.mean]
    halves = sorted((mean.high - mean.low) / 2 for mean in means if mean.low is not None and mean.high is not None)
    if not halves:
        return ""
    sizes = " to ".join(dict.fromkeys(f"{half:.3f}" for half in (halves[0], halves[-1])))
    return (
        f"Differences smaller than about {sizes}, the intervals' half-width, could not have been seen: that no "
        f"difference could be shown does not mean that there is none."
    )


def _tests(analysis: Analysis) -> str:
    tested = analysis.tested
    if not tested:
        return ""
    seeds = max(len(result.seeds) for result in tested)
    if smallest_p(seeds) * len(tested) > ALPHA:
        return (
            f"With {count(seeds, 'seed')} the test's smallest p is {smallest_p(seeds):.3g}, times {len(tested)} for as "
            f"many tests: no difference, however large, could pass {ALPHA}. The intervals describe, and prove nothing."
        )
    return (
        f"A difference counts as shown when its corrected p is at most {ALPHA} and its interval leaves 0 out. The p "
        f"alone would say that arms differ from these cold starts, and nothing of others."
    )


def _scope(comparison: Comparison) -> str:
    model, steps = comparison.setting("model", "path"), comparison.setting("train", "outer_steps")
    minibatches = comparison.setting("train", "minibatches")
    length = f", {steps} outer steps of {minibatches} mini-batches" if steps and minibatches else ""
    rest = "nothing here speaks of larger models, longer responses, longer runs or other tasks"
    return f"One model{f' ({model})' if model else ''}, one task{length}: {rest}."


def _settings(comparison: Comparison) -> str:
    if comparison.swept:
        return "Intervals speak of these cold starts, and of no others: seeds are resampled within them."
    rate = comparison.setting("optimizer", "lr")
    shown = f" ({rate:g})" if isinstance(rate, (int, float)) else ""
    return f"One learning rate{shown} and one clip range a loss: an arm may do better or worse at others."


def _gap(comparison: Comparison) -> str:
    noise, dtype = comparison.setting("sync", "router_noise"), comparison.setting("rollout", "engine_dtype")
    if isinstance(noise, (int, float)) and noise > 0:
        return (
            f"The gap between engine and trainer is emulated: noise of {noise:g}, relative, on the router weights that "
            f"the engine gets. A real gap has other causes and may have other effects."
        )
    return f"The engine's dtype was set to {dtype}: that is where its gap to the trainer comes from." if dtype else ""


def _dense(comparison: Comparison) -> str:
    dense = [arm.name for arm in comparison.arms if arm.dense]
    if not dense:
        return ""
    return f"{' and '.join(dense)}: the dense twin, another network with its own cold start, compared with itself only."


def sample(mean: Mean) -> str:
    """From how many seeds and cold starts."""
    return f"{count(mean.seeds, 'seed')} from {count(mean.cold_starts, 'cold start')}"


def p_text(result: Result) -> str:
    """Of the test, before and after correction."""
    if result.p is None or result.p_holm is None:
        return "not tested"
    return f"sign-flip p {p_value(result.p)}, {p_value(result.p_holm)} after Holm"


def p_value(p: float) -> str:
    """With as many digits as it is worth."""
    return f"= {p:.2g}" if p >= 1e-4 else "< 0.0001"


def signed(value: float, digits: int = 3) -> str:
    """With its sign; a minus that is one, and no sign before what rounds to 0."""
    text = f"{value:+.{digits}f}"
    return text[1:] if float(text) == 0 else text.replace("-", "−")


def interval(mean: Mean) -> str:
    """Both ends, signed."""
    return f"{signed(mean.low or 0.0)} to {signed(mean.high or 0.0)}"


def ratio_interval(mean: Mean) -> str:
    """Both ends, as factors."""
    if mean.low is None or mean.high is None:
        return "one seed"
    return f"{times_text(mean.low)} to {times_text(mean.high)}"


def times_text(value: float) -> str:
    """Three digits, without powers of ten: 0.0123, 1.02, 45.3, 12,300."""
    return f"{float(f'{value:.3g}'):,.10g}"


def table(results: Sequence[Result]) -> list[dict[str, Any]]:
    """The rows of a table of differences."""
    return [{"cells": _row(result), "shown": result.verdict in SHOWN} for result in results]


def _row(result: Result) -> list[str]:
    mean, described = result.mean, not result.contrast.tested and result.verdict == "uncorrected"
    return [
        result.contrast.name,
        str(len(result.seeds)),
        signed(mean.value) if mean else "-",
        interval(mean) if mean and mean.low is not None else "-",
        f"{result.p:.2g}" if result.p is not None else "-",
        f"{result.p_holm:.2g}" if result.p_holm is not None else "-",
        "described only" if described else VERDICTS[result.verdict],
    ]
