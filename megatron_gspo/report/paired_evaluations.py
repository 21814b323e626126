"""Two evaluations side by side: differences by problem, and a page with every problem, answer and verdict.

What is compared are ``result.json`` and ``samples.jsonl`` of the same suites (or the same prompts), as ``eval`` left
them. A problem is known by its id; the k-th response of one to it was drawn from the same seed as that of the other.
"""

from __future__ import annotations

import base64
import gzip
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
from markupsafe import Markup

from megatron_gspo.algorithm.evaluation import CONFIDENCE, mean_with_interval
from megatron_gspo.algorithm.paired import METHOD, count_prompts, paired_difference
from megatron_gspo.errors import DataError
from megatron_gspo.report.evaluation_files import RESULT, SAMPLES
from megatron_gspo.report.html import environment, template, write_page
from megatron_gspo.report.payload import to_json
from megatron_gspo.report.rundir import read_lines

SCHEMA = "megatron-gspo/evaluation-comparison/1"
SHOWN = 20_000
"""Characters of a prompt or a response that the page holds: its beginning and its end."""
SCRIPTS = ("common.js", "paired.js")
Samples = dict[str, list[dict[str, Any]]]
"""Problem -> its responses in order, as ``samples.jsonl`` has them."""


@dataclass(frozen=True)
class Evaluation:
    """One evaluation as it lies on the disk."""

    path: Path
    result: dict[str, Any]
    samples: Samples

    @property
    def name(self) -> str:
        """The suite's; "prompts" where it is none."""
        return str(self.result.get("suite", "prompts"))


@dataclass(frozen=True)
class Pair:
    """What two evaluations have in common."""

    name: str
    title: str
    problems: list[str]
    first: Samples
    second: Samples
    shares: tuple[np.ndarray, np.ndarray]
    """[P] share of right responses, of each."""
    record: dict[str, Any]
    """As the JSON has it."""


def compare(first: Path, second: Path) -> list[Pair]:
    """The suites that both directories hold, or their one evaluation of prompts. Raises DataError where they have
    nothing in common, or one cannot be read."""
    ours = read_evaluations(first)
    theirs = {evaluation.name: evaluation for evaluation in read_evaluations(second)}
    pairs = [_pair(one, theirs[one.name]) for one in ours if one.name in theirs]
    if not pairs:
        raise DataError(
            f"{first} has {', '.join(one.name for one in ours)}, {second} has {', '.join(theirs)}: nothing to compare"
        )
    return pairs


def read_evaluations(path: Path) -> list[Evaluation]:
    """The evaluation in a directory, or those in its directories. Raises DataError."""
    places = [path] if (path / RESULT).is_file() else sorted(file.parent for file in path.glob(f"*/{RESULT}"))
    if not places:
        raise DataError(f"{path}: no evaluation that is done ({RESULT}, here or in directories of it)")
    return [_read(place) for place in places]


def as_json(pairs: Sequence[Pair], names: tuple[str, str]) -> dict[str, Any]:
    """The comparison as JSON values."""
    return {"schema": SCHEMA, "first": names[0], "second": names[1], "suites": [pair.record for pair in pairs]}


def describe(pairs: Sequence[Pair], names: tuple[str, str]) -> str:
    """The comparison as a table for the terminal."""
    lines = [f"A = {names[0]}", f"B = {names[1]}", f"{'':<14}{'A':>9}{'B':>9}{'B - A':>9}   95% interval, problems"]
    for pair in pairs:
        record, difference = pair.record, pair.record["difference"]
        counts = record["problems"]
        lines.append(
            f"{pair.name:<14}{record['first']['value']:>9.4f}{record['second']['value']:>9.4f}"
            f"{difference['value']:>+9.4f}   {difference['low']:+.4f} ... {difference['high']:+.4f}   "
            f"A better on {counts['first']}, B on {counts['second']}, of {sum(counts[k] for k in WHICH)} "
            f"(p = {counts['p_value']:.3g})"
        )
        for name, both in record["measured"].items():
            shown = "   ".join(f"{one['value']:.0f} ({one['low']:.0f} ... {one['high']:.0f})" for one in both)
            lines.append(f"  {name:<12}{shown}")
        lines += [f"  warning     {warning}" for warning in record["warnings"]]
    return "\n".join(lines)


WHICH = ("first", "second", "same")


def write_comparison(pairs: Sequence[Pair], names: tuple[str, str], out: Path) -> Path:
    """One HTML file that needs nothing else."""
    return write_page(render(pairs, names), out)


def render(pairs: Sequence[Pair], names: tuple[str, str]) -> str:
    """The page as text. What models and data files say reaches it as JSON that a script puts into text nodes."""
    payload = {"names": list(names), "suites": [_suite(pair) for pair in pairs]}
    texts = [[_texts(pair, problem) for problem in pair.problems] for pair in pairs]
    packed = gzip.compress(json.dumps(texts).encode("utf-8", "surrogatepass"), mtime=0)
    return (
        environment()
        .get_template("paired.html.j2")
        .render(
            names=names,
            rows=[pair.record | {"counts": pair.record["problems"]} for pair in pairs],
            method=METHOD,
            style=template("report.css"),
            script=Markup("\n").join(map(template, SCRIPTS)),
            payload=Markup(to_json(payload)),
            texts=Markup(base64.b64encode(packed).decode()),
            written=datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"),
        )
    )


def _read(place: Path) -> Evaluation:
    try:
        result = json.loads((place / RESULT).read_bytes())
        figures = result["result"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise DataError(f"{place / RESULT}: no result of an evaluation ({type(error).__name__}: {error})") from None
    samples: Samples = {}
    for line in read_lines(place / SAMPLES):
        samples.setdefault(str(line.get("prompt_id")), []).append(line)
    if len(samples) != figures["prompts"] or {len(group) for group in samples.values()} != {figures["samples"]}:
        raise DataError(
            f"{place / SAMPLES} has the responses to {len(samples)} problems, and not {figures['samples']} to each of "
            f"the {figures['prompts']} that {RESULT} is about"
        )
    return Evaluation(place, result, samples)


def _pair(first: Evaluation, second: Evaluation) -> Pair:
    common = [problem for problem in first.samples if problem in second.samples]
    where = f"{first.path} and {second.path}"
    if not common:
        raise DataError(f"{where} have no problem of {first.name} in common")
    for problem in common:
        one, other = first.samples[problem][0].get("answer"), second.samples[problem][0].get("answer")
        if one != other:
            raise DataError(
                f"{where}: problem {problem} has the reference {one!r:.60} in one and {other!r:.60} in other"
            )
    graded = [p for p in common if _rights(first, p) and _rights(second, p)]
    if not graded:
        raise DataError(f"{where}: no problem of {first.name} in common was graded in both")
    shares = tuple(np.array([np.mean(_rights(one, p)) for p in graded]) for one in (first, second))
    record = {
        "suite": first.name,
        "title": first.result.get("title", first.name),
        "first": asdict(mean_with_interval(shares[0])),
        "second": asdict(mean_with_interval(shares[1])),
        "difference": asdict(paired_difference(*shares)),
        "interval": {"confidence": CONFIDENCE, "method": METHOD},
        "problems": asdict(count_prompts(*shares)),
        "samples": _by_sample(first, second, graded),
        "measured": _measured(first, second),
        "warnings": _warnings(first, second, common, graded),
    }
    return Pair(first.name, record["title"], common, first.samples, second.samples, (shares[0], shares[1]), record)


def _rights(evaluation: Evaluation, problem: str) -> list[bool]:
    """Whether each graded response is right: it has the most that there is."""
    full = evaluation.result["result"].get("full_reward", 1.0)
    return [sample["reward"] == full for sample in evaluation.samples[problem] if sample["reward"] is not None]


def _by_sample(first: Evaluation, second: Evaluation, problems: Sequence[str]) -> dict[str, int] | None:
    """Of responses of the same seed, or greedy ones, how many are right in both, in one, in none (McNemar's table);
    None where they were not drawn from the same seeds."""
    drawn = [_sampling(one) for one in (first, second)]
    greedy = all(one.get("temperature") == 0 for one in drawn)
    if not greedy and (drawn[0].get("seed") is None or drawn[0]["seed"] != drawn[1].get("seed")):
        return None
    full = [one.result["result"].get("full_reward", 1.0) for one in (first, second)]
    table = {"both": 0, "first": 0, "second": 0, "neither": 0}
    names = {(True, True): "both", (True, False): "first", (False, True): "second", (False, False): "neither"}
    for problem in problems:
        for one, other in zip(first.samples[problem], second.samples[problem], strict=False):
            if one["reward"] is not None and other["reward"] is not None:
                table[names[one["reward"] == full[0], other["reward"] == full[1]]] += 1
    return table


def _measured(first: Evaluation, second: Evaluation) -> dict[str, list[dict[str, float]]]:
    """What a suite measures besides, of both."""
    one, other = (evaluation.result["result"].get("measured", {}) for evaluation in (first, second))
    return {
        name: [{key: found[name][key] for key in ("value", "low", "high")} for found in (one, other)]
        for name in one
        if name in other
    }


def _warnings(first: Evaluation, second: Evaluation, common: Sequence[str], graded: Sequence[str]) -> list[str]:
    warnings = []
    alone = [len(one.samples) - len(common) for one in (first, second)]
    if any(alone):
        warnings.append(f"{alone[0]} problems are in A alone and {alone[1]} in B alone: they are left out")
    if len(graded) < len(common):
        warnings.append(f"{len(common) - len(graded)} problems were not graded in both: they are left out")
    for name, value in (("sampling", _sampling), ("grader", _grader), ("data", _data)):
        one, other = value(first), value(second)
        if different := [key for key in {**one, **other} if one.get(key) != other.get(key)]:
            shown = ", ".join(f"{key} {one.get(key)!s:.40} and {other.get(key)!s:.40}" for key in different)
            warnings.append(f"{name} differs: {shown}")
    return warnings


def _sampling(evaluation: Evaluation) -> dict[str, Any]:
    names = ("k", "samples", "temperature", "top_p", "top_k", "max_tokens", "max_response_tokens", "seed")
    found = evaluation.result.get("sampling") or evaluation.result.get("settings", {})
    greedy = found.get("temperature") == 0  # which is the same for every seed
    return {name: found[name] for name in names if name in found and not (greedy and name == "seed")}


def _grader(evaluation: Evaluation) -> dict[str, Any]:
    found = evaluation.result.get("grader") or evaluation.result.get("settings", {}).get("reward", {})
    return dict(found)


def _data(evaluation: Evaluation) -> dict[str, Any]:
    found = evaluation.result.get("data") or evaluation.result.get("settings", {})
    return {name: found[name] for name in ("problems_sha256", "prompts_sha256") if name in found}


def _suite(pair: Pair) -> dict[str, Any]:
    """What the page's script knows of a suite before it has the texts."""
    return {
        "title": pair.title,
        "problems": [
            {
                "id": problem,
                "sides": [[_verdict(sample) for sample in side[problem]] for side in (pair.first, pair.second)],
            }
            for problem in pair.problems
        ],
    }


def _verdict(sample: Mapping[str, Any]) -> list[Any]:
    """[reward or None, tokens, finish reason, why it was not graded]."""
    return [sample["reward"], sample.get("tokens"), sample.get("finish_reason"), sample.get("ungraded", "")]


def _texts(pair: Pair, problem: str) -> list[Any]:
    """[prompt, reference, responses of A, responses of B]."""
    first, second = pair.first[problem], pair.second[problem]
    responses = [[_short(str(sample.get("response", ""))) for sample in side] for side in (first, second)]
    return [_short(str(first[0].get("prompt", ""))), _short(str(first[0].get("answer", ""))), *responses]


def _short(text: str) -> str:
    half = SHOWN // 2
    return text if len(text) <= SHOWN else f"{text[:half]}\n... {len(text) - SHOWN} characters ...\n{text[-half:]}"
