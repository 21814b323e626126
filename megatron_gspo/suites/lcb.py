"""LiveCodeBench, code generation (Jain et al. 2024, arXiv 2403.07974): problems of a window of contest dates."""

from __future__ import annotations

import re
from collections.abc import Mapping

from megatron_gspo.errors import ConfigError, DataError
from megatron_gspo.suites.base import Draw, Fields, Problem, Source, Suite, text
from megatron_gspo.suites.mathematics import R1

RELEASES = {
    "test.jsonl": 400,
    "test2.jsonl": 111,
    "test3.jsonl": 101,
    "test4.jsonl": 101,
    "test5.jsonl": 167,
    "test6.jsonl": 175,
}
"""Files of code_generation_lite, whose releases v1 to v6 are the first one to six of them: 400, 511, 612, 713, 880 and
1055 problems."""
WITH_STARTER = "Use the following starter code to write the solution, and enclose your program in a fenced block."
FROM_STDIN = (
    "Read the inputs from stdin, solve the problem and write the answer to stdout. "
    "Enclose your program in a fenced block."
)
_WINDOW = re.compile(r"(\d{4})-?(\d{2})\.\.(\d{4})-?(\d{2})")


def read(fields: Fields) -> Problem:
    """The row itself is what the grader reads: public tests, and private ones as they were packed."""
    statement = text(fields, "question_content")
    for name in ("contest_date", "private_test_cases", "public_test_cases"):
        text(fields, name)
    starter = fields.get("starter_code") or ""
    how, block = (WITH_STARTER, starter) if starter.strip() else (FROM_STDIN, "# YOUR CODE HERE")
    question = f"{statement.strip()}\n\n{how}\n```python\n{block.rstrip()}\n```"
    return Problem(text(fields, "question_id"), statement, question, "", fields)


def check_window(options: Mapping[str, str]) -> None:
    """Raises ConfigError for a window that is none: an odd month, or one that ends before it begins."""
    window = options["window"]
    found = _WINDOW.fullmatch(window)
    if window == "all":
        return
    if not found or not all("01" <= month <= "12" for month in (found[2], found[4])):
        raise ConfigError(f"lcb:window={window}: months as 202410..202502, or all")
    if found[1] + found[2] > found[3] + found[4]:
        raise ConfigError(f"lcb:window={window} ends before it begins")


def in_window(problem: Problem, options: Mapping[str, str]) -> bool:
    """Whether the contest was in one of the months from the first to the last, both included."""
    found = _WINDOW.fullmatch(options["window"])
    if found is None:
        return True
    date = re.match(r"(\d{4})-(\d{2})-\d{2}", str(problem.metadata["contest_date"]))
    if date is None:
        raise DataError(f"contest_date = {problem.metadata['contest_date']!r:.40} of {problem.id} is no date")
    return found[1] + found[2] <= date[1] + date[2] <= found[3] + found[4]


LCB = Suite(
    "lcb",
    "LiveCodeBench",
    (Source("livecodebench/code_generation_lite", RELEASES, partial=True),),
    read,
    Draw(8, 0.6, top_p=0.95, source=f"{R1}; GSPO's mean of 8"),
    "code",
    {"max_tests": 0},
    options={"window": "202410..202502"},
    check_options=check_window,
    keep=in_window,
)
