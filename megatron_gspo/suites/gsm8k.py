"""GSM8K's test split (Cobbe et al. 2021, arXiv 2110.14168)."""

from __future__ import annotations

from megatron_gspo.suites.base import Draw, Fields, Problem, Source, Suite, text
from megatron_gspo.suites.mathematics import ask, final_form


def read(fields: Fields) -> Problem:
    """``question`` and ``answer``, which ends in "#### number"."""
    statement = text(fields, "question")
    return Problem("", statement, ask(statement), text(fields, "answer"))


GSM8K = Suite(
    "gsm8k",
    "GSM8K",
    (
        Source("openai/gsm8k", {"test-*.parquet": 1319}),
        Source("openai/grade-school-math", {"test.jsonl": 1319}, where="grade_school_math/data of that repository"),
    ),
    read,
    Draw(1, 0.0, max_tokens=4096, source="one greedy response"),
    "gsm8k",
    answer=final_form,
)
