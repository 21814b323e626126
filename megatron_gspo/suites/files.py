"""Published files to problems: found, counted, hashed, and read in the suite's own format."""

from __future__ import annotations

import fnmatch
import hashlib
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from megatron_gspo.data.files import open_rows
from megatron_gspo.data.rows import Row
from megatron_gspo.errors import ConfigError, DataError
from megatron_gspo.suites.base import Problem, Source, Suite
from megatron_gspo.suites.catalog import SUITES, Asked


@dataclass(frozen=True)
class Found:
    """A suite's problems, and what there is to say of the files that they are from."""

    problems: list[Problem]
    directory: Path
    record: dict[str, Any]
    """As ``result.json`` has it: data set, files with hashes and rows, problems."""
    warnings: list[str]


def read_problems(asked: Asked, data: Path, *, alone: bool = True) -> Found:
    """The problems in ``data/SUITE``; in ``data`` itself where no suite has a directory in it and this one is asked for
    ``alone``.

    Raises ConfigError where there is no such data, with what is to be put there, and DataError, with file and row, for
    a row that the suite cannot read.
    """
    suite = asked.suite
    own = not alone or any((data / name).is_dir() for name in SUITES)
    directory = data / suite.name if own else data
    source, files = _find(suite, directory)
    warnings = _missing(source, files)
    problems, rows = [], Counter[str]()
    for pattern, path in files:
        for row in open_rows(path).read_all():
            rows[pattern] += 1
            problems.append(_read(suite, path, row, within=f"{path.name}:" if len(files) > 1 else ""))
    for pattern, expected in source.files.items():
        if rows[pattern] and expected is not None and rows[pattern] != expected:
            word = "missing" if rows[pattern] < expected else "surplus"
            warnings.append(
                f"{pattern} of {source.dataset} has {rows[pattern]} rows, {expected} are published: "
                f"{abs(rows[pattern] - expected)} {word}"
            )
    chosen = [problem for problem in problems if suite.keep(problem, asked.options)][: asked.limit]
    _check(suite, asked, directory, chosen, len(problems))
    warnings += _repeats(chosen)
    record = {
        "dataset": source.dataset,
        "files": [{"name": path.name, "sha256": _digest(path)} for _, path in files],
        "rows": len(problems),
        "problems": len(chosen),
        "problems_sha256": problems_digest(chosen),
        "options": dict(asked.options) | ({"limit": str(asked.limit)} if asked.limit else {}),
    }
    return Found(chosen, directory, record, warnings)


def problems_digest(problems: Sequence[Problem]) -> str:
    """SHA-256 of what is asked and of the references, in order."""
    whole = hashlib.sha256()
    for problem in problems:
        for part in (problem.id, problem.question, problem.answer):
            whole.update(f"{len(part)} {part}".encode("utf-8", "surrogatepass"))
    return whole.hexdigest()


def _find(suite: Suite, directory: Path) -> tuple[Source, list[tuple[str, Path]]]:
    """The first source whose files are there, by pattern; one of which some are, where no other is whole."""
    there = [(source, list(_matches(source, directory))) for source in suite.sources]
    for source, files in there:
        if {pattern for pattern, _ in files} == set(source.files):
            return source, files
    for source, files in there:
        if files and source.partial:
            return source, files
    wanted = ", or ".join(source.describe(directory) for source in suite.sources)
    found = [path.name for _, files in there for _, path in files]
    beside = f" (of these there are {', '.join(found)})" if found else ""
    raise ConfigError(f"suite {suite.name}: its problems are not in {directory}{beside}: put there {wanted}")


def _matches(source: Source, directory: Path) -> Iterator[tuple[str, Path]]:
    paths = sorted(path for path in directory.rglob("*") if path.is_file()) if directory.is_dir() else []
    for pattern in source.files:
        for path in paths:
            parts = path.relative_to(directory).parts
            name = "/".join(parts[-1 - pattern.count("/") :])
            if fnmatch.fnmatchcase(name, pattern) and not any(part.startswith(".") for part in parts):
                yield pattern, path


def _missing(source: Source, files: Sequence[tuple[str, Path]]) -> list[str]:
    absent = [pattern for pattern in source.files if pattern not in {found for found, _ in files}]
    return [f"{', '.join(absent)} of {source.dataset} are not there: their problems are missing"] if absent else []


def _read(suite: Suite, path: Path, row: Row, within: str) -> Problem:
    try:
        if row.problem:
            raise DataError(row.problem)
        problem = suite.read(dict(row.fields))
    except DataError as error:
        raise DataError(f"{path}, {row.place}: {error}") from None
    return problem if problem.id else replace(problem, id=f"{within}{row.default_id}")


def _check(suite: Suite, asked: Asked, directory: Path, chosen: Sequence[Problem], rows: int) -> None:
    if not chosen:
        options = ", ".join(f"{name}={value}" for name, value in asked.options.items())
        raise DataError(f"suite {suite.name}: none of {rows} rows in {directory} is one of its problems ({options})")
    if twice := [name for name, count in Counter(problem.id for problem in chosen).items() if count > 1]:
        raise DataError(f"suite {suite.name}: {len(twice)} ids stand in several rows of {directory}, as {twice[0]!r}")


def _repeats(problems: Sequence[Problem]) -> list[str]:
    counts = Counter(" ".join(problem.question.split()) for problem in problems)
    repeated = sum(count - 1 for count in counts.values())
    return [f"{repeated} problems are the same text as another one"] if repeated else []


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
