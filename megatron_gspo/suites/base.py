"""What a suite is: published files, a reader of exactly their format, a prompt, a way to draw, a grader, a metric.

Adding one is one file here with a ``Suite``, and one entry in ``catalog.SUITES``.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from megatron_gspo.errors import DataError

Fields = dict[str, Any]
STEP_BY_STEP = "Please reason step by step, and put your final answer within \\boxed{}."
"""The instruction behind a mathematical problem, as DeepSeek-R1 and Qwen3 recommend it for evaluations."""


@dataclass(frozen=True)
class Source:
    """One publication of a suite's problems."""

    dataset: str
    """As its hub names it: ``OWNER/NAME``."""
    files: Mapping[str, int | None]
    """File name, or a pattern of one, -> rows in all that match it; None where nobody has counted."""
    partial: bool = False
    """Whether some of the files are a data set by themselves: releases that add to each other."""
    where: str = ""
    """Where they are, when that is not the hub."""

    def describe(self, directory: Path) -> str:
        """ "test.jsonl of HuggingFaceH4/MATH-500 (hf download ... --local-dir data/math500)"."""
        how = self.where or f"hf download --repo-type dataset {self.dataset} --local-dir {directory}"
        return f"{', '.join(self.files)} of {self.dataset} ({how})"


@dataclass(frozen=True)
class Draw:
    """How responses are drawn, and how many."""

    k: int
    """Responses a problem."""
    temperature: float
    """0: greedy."""
    top_p: float = 1.0
    top_k: int = -1
    max_tokens: int = 32768
    """Of a response; fewer where the model has no room for so many."""
    source: str = ""
    """Who draws so."""


@dataclass(frozen=True)
class Problem:
    """One problem, before it is rendered."""

    id: str
    """Unique within the suite; the seeds of its responses are derived from it."""
    statement: str
    """What somebody who trained on it would have seen: looked for in training prompts."""
    question: str
    """The user's turn: the statement with the suite's instruction."""
    answer: str = ""
    """The reference, for the grader."""
    metadata: Fields = field(default_factory=dict)
    """What else the grader reads: the row's own fields."""


Read = Callable[[Fields], Problem]
"""From a row's fields. Raises DataError, without the place."""
Keep = Callable[[Problem, Mapping[str, str]], bool]
"""Whether a problem is one of those that the suite's own options ask for."""
CheckOptions = Callable[[Mapping[str, str]], None]
"""Raises ConfigError for a value of the suite's own options that is none."""
Answer = Callable[[str, str], str | None]
"""(prompt, response) -> the final answer in one form, for the majority; None: it has none."""


@dataclass(frozen=True)
class Measured:
    """A figure beside the shares of right answers, with a 95% interval."""

    value: float
    low: float
    high: float
    method: str
    details: Mapping[str, Any] = field(default_factory=dict)
    warnings: tuple[str, ...] = ()


Measure = Callable[[Sequence[Problem], np.ndarray, Path], dict[str, Measured]]
"""(problems, [P, K] 1 for each response that is right, 0 for a wrong one, NaN where that is not known, the directory of
the data) -> figures by name."""


@dataclass(frozen=True)
class Suite:
    """An evaluation that others can repeat."""

    name: str
    title: str
    sources: tuple[Source, ...]
    """The first that is there is read."""
    read: Read
    draw: Draw
    reward: str
    """A reward's name, as ``reward.function``."""
    reward_options: Mapping[str, Any] = field(default_factory=dict)
    options: Mapping[str, str] = field(default_factory=dict)
    """The suite's own options with their defaults."""
    check_options: CheckOptions = lambda options: None
    """Called when the suite is asked for, before any of its files is read."""
    keep: Keep = lambda problem, options: True
    answer: Answer | None = None
    """None: answers of which no majority can be taken, as programs."""
    measure: Measure | None = None
    """What there is beside accuracy."""
    headline: str = "accuracy"
    """The figure that is compared and charted first."""


def text(fields: Fields, *names: str) -> str:
    """The first of these fields that holds a text, a number as one. Raises DataError."""
    for name in names:
        value = fields.get(name)
        if isinstance(value, (int, float)) and not isinstance(value, bool):
            return str(int(value)) if float(value).is_integer() else str(value)
        if isinstance(value, str) and value.strip():
            return value
    has = ", ".join(sorted(fields)) or "nothing"
    raise DataError(f"no text in {' or '.join(map(repr, names))} (the row has {has})")


def identity(fields: Fields, *names: str) -> str:
    """The first of these fields as an id; empty where the row has none: its place will do."""
    for name in names:
        if fields.get(name) not in (None, ""):
            return str(fields[name])
    return ""
