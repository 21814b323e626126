"""MBPP's test split (Austin et al. 2021, arXiv 2108.07732), whole or the part that was verified by hand."""

from __future__ import annotations

from collections.abc import Mapping

from megatron_gspo.errors import DataError
from megatron_gspo.suites.base import Draw, Fields, Problem, Source, Suite, text

FIRST_TEST, LAST_TEST = 11, 510
"""Task ids of the test split; the others are prompts, validation and training."""


def read(fields: Fields) -> Problem:
    """``text`` (``prompt`` in the verified part) and ``test_list``; the row goes to the grader without its code. The
    tests are shown, as the paper does: they name the function."""
    statement, tests = text(fields, "text", "prompt"), fields.get("test_list")
    if not isinstance(tests, list) or not tests or not all(isinstance(test, str) for test in tests):
        raise DataError(f"test_list = {tests!r:.80} is no list of assertions")
    listed = "\n".join(tests)
    question = (
        f"You are an expert Python programmer, and here is your task: {statement.strip()} Your code should pass these "
        f"tests:\n\n```python\n{listed}\n```\n\nAnswer with the whole program in one fenced block."
    )
    kept = {name: value for name, value in fields.items() if name != "code"}
    return Problem(text(fields, "task_id"), statement, question, "", kept)


def in_test_split(problem: Problem, options: Mapping[str, str]) -> bool:
    """Files that hold every split are cut to this one."""
    return FIRST_TEST <= int(problem.id) <= LAST_TEST


MBPP = Suite(
    "mbpp",
    "MBPP",
    (
        Source(
            "google-research-datasets/mbpp",
            {"full/test-*.parquet": 500},
        ),
        Source("google-research/mbpp", {"mbpp.jsonl": 974}, where="mbpp/ of the repository google-research"),
        Source(
            "google-research/mbpp, verified",
            {"sanitized-mbpp.json": 427},
            where="mbpp/ of the repository google-research",
        ),
    ),
    read,
    Draw(1, 0.0, max_tokens=4096, source="one greedy response"),
    "code",
    {"max_tests": 0},
    keep=in_test_split,
)
