"""Codeforces: problems of rated contests with their tests, and a rating on Codeforces' own scale.

``elo`` is ``algorithm.elo``'s rating of maximum likelihood. Where a contest's standings are in the data directory, the
opponents are its participants; where they are not, its problems with their published ratings.

    standings/1977.json    the answer of codeforces.com/api/contest.standings?contestId=1977
    ratings/1977.json      the answer of codeforces.com/api/contest.ratingChanges?contestId=1977

Each sample takes part once, as a contestant who hands in at the first moment: a solved problem gives all of its points.
Participants get the points that they got, over the problems that are in the data. More points win, as many are half a
win: there is no penalty. A participant has the rating from before the contest; who had none is left out.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from megatron_gspo.algorithm.elo import METHOD, Contest, rate, score_standings
from megatron_gspo.errors import DataError
from megatron_gspo.suites.base import Draw, Fields, Measured, Problem, Source, Suite, text
from megatron_gspo.suites.mathematics import R1

INSTRUCTION = (
    "Write a program in C++17 or Python 3 that solves this problem: it reads from standard input, writes to standard "
    "output, and keeps within the limits. Reason first, then give the whole program in one fenced block that names its "
    "language (```cpp or ```python)."
)
PARTS = (
    ("input_format", "Input"),
    ("output_format", "Output"),
    ("interaction_format", "Interaction"),
    ("note", "Note"),
)


def read(fields: Fields) -> Problem:
    """A row of open-r1/codeforces; the grader gets all of it but the editorial."""
    statement = text(fields, "description")
    parts = [f"# {fields.get('title') or ''}".rstrip(), _limits(fields), statement.strip()]
    parts += [f"## {title}\n{fields[name].strip()}" for name, title in PARTS if fields.get(name)]
    for example in fields.get("examples") or []:
        if not isinstance(example, Mapping) or not {"input", "output"} <= example.keys():
            raise DataError(f"examples: {example!r:.60} has no input and output")
        parts.append(f"## Example\nInput:\n```\n{example['input']}\n```\nOutput:\n```\n{example['output']}\n```")
    kept = {name: value for name, value in fields.items() if name != "editorial"}
    question = "\n\n".join([*(part for part in parts if part), INSTRUCTION])
    return Problem(text(fields, "id"), statement, question, "", kept)


def can_be_graded(problem: Problem, options: Mapping[str, str]) -> bool:
    """Programs that talk to a judge, and problems without tests, are left out: ``executable`` says so."""
    return problem.metadata.get("executable") is True and bool(problem.metadata.get("official_tests"))


def measure(problems: Sequence[Problem], right_PK: np.ndarray, data: Path) -> dict[str, Measured]:
    """``elo``, where there is a contest with standings or a problem with a rating."""
    by_contest: dict[str, list[int]] = {}
    for index, problem in enumerate(problems):
        by_contest.setdefault(str(problem.metadata.get("contest_id")), []).append(index)
    contests, with_people = [], 0
    for contest, places in by_contest.items():
        found = _against_people(data, contest, [problems[place] for place in places], right_PK[places])
        with_people += found is not None
        found = found or _against_problems([problems[place] for place in places], right_PK[places])
        contests += [found] if found else []
    if not contests:
        return {}
    rating = rate(contests)
    incomplete = sum(problem.metadata.get("official_tests_complete") is False for problem in problems)
    warnings = [f"{incomplete} of {len(problems)} problems have some of the official tests alone"] if incomplete else []
    details = {
        "contests": rating.contests,
        "against participants": with_people,
        "against problems": rating.contests - with_people,
        "opponents": rating.opponents,
    }
    measured = Measured(rating.value, rating.low, rating.high, METHOD, details, tuple(warnings))
    return {"elo": measured}


def _against_problems(problems: Sequence[Problem], right_PK: np.ndarray) -> Contest | None:
    rated = [
        place
        for place, problem in enumerate(problems)
        if problem.metadata.get("rating") and not np.isnan(right_PK[place]).all()
    ]
    ratings = [float(problems[place].metadata["rating"]) for place in rated]
    return Contest(np.array(ratings), np.nanmean(right_PK[rated], axis=1)) if rated else None


def _against_people(data: Path, contest: str, problems: Sequence[Problem], right_PK: np.ndarray) -> Contest | None:
    standings, changes = (_answer(data, folder, contest) for folder in ("standings", "ratings"))
    if standings is None or changes is None:
        return None
    try:
        columns, points_I = _columns(standings, problems)
        ratings = {str(change["handle"]): float(change["oldRating"]) for change in changes}
        rows = [
            (ratings[handle], sum(float(row["problemResults"][column]["points"]) for column in columns))
            for row in standings["rows"]
            for handle in [str(row["party"]["members"][0]["handle"])]
            if ratings.get(handle) and row["party"]["participantType"] == "CONTESTANT"
        ]
    except (KeyError, IndexError, TypeError, ValueError) as error:
        raise DataError(
            f"{data}: standings/{contest}.json and ratings/{contest}.json are no answers of contest.standings and "
            f"contest.ratingChanges ({type(error).__name__}: {error})"
        ) from None
    known = [place for place, problem in enumerate(problems) if problem.metadata["index"] in points_I]
    worth_P = np.array([points_I[problems[place].metadata["index"]] for place in known])
    own_K = worth_P @ right_PK[known]
    own_K = own_K[~np.isnan(own_K)]  # a sample takes part where all of its programs could be judged
    if not columns or not rows or not own_K.size:
        return None
    ratings_N, theirs_N = np.array(rows).T
    return Contest(ratings_N, np.mean([score_standings(points, theirs_N) for points in own_K], axis=0))


def _columns(standings: Mapping[str, Any], problems: Sequence[Problem]) -> tuple[list[int], dict[str, float]]:
    """Columns of the standings that the data have a problem for, and index -> points of those."""
    ours = {str(problem.metadata["index"]) for problem in problems}
    found = {
        place: (str(one["index"]), float(one.get("points", 1.0)))
        for place, one in enumerate(standings["problems"])
        if str(one["index"]) in ours
    }
    return list(found), dict(found.values())


def _answer(data: Path, folder: str, contest: str) -> Any:
    """``result`` of an answer of the API that was kept in a file; None where there is none."""
    if not contest.isalnum():
        return None
    found = sorted(data.rglob(f"{folder}/{contest}.json"))
    if not found:
        return None
    try:
        answer = json.loads(found[0].read_bytes())
    except ValueError as error:
        raise DataError(f"{found[0]}: not JSON: {error}") from None
    if not isinstance(answer, dict) or answer.get("status") != "OK":
        raise DataError(f"{found[0]}: no answer of Codeforces' API with status OK")
    return answer["result"]


def _limits(fields: Fields) -> str:
    units = (("time_limit", "Time limit", "seconds"), ("memory_limit", "Memory limit", "megabytes"))
    return "\n".join(f"{title}: {fields[name]:g} {unit}" for name, title, unit in units if fields.get(name))


CODEFORCES = Suite(
    "codeforces",
    "Codeforces",
    (Source("open-r1/codeforces", {"data/test-*.parquet": 468}),),
    read,
    Draw(8, 0.6, top_p=0.95, source=R1),
    "code",
    {"language": "auto", "max_tests": 0},
    keep=can_be_graded,
    measure=measure,
    headline="elo",
)
