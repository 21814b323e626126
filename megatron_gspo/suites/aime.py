"""AIME 2024 and 2025: thirty problems each, whose answers are integers from 0 to 999."""

from __future__ import annotations

from megatron_gspo.errors import DataError
from megatron_gspo.suites.base import Draw, Fields, Problem, Source, Suite, identity, text
from megatron_gspo.suites.mathematics import ask, final_form

DRAW = Draw(32, 1.0, top_p=0.7, source="DAPO (arXiv 2503.14476): temperature 1.0, top-p 0.7, the mean of 32, as GSPO's")


def read(fields: Fields) -> Problem:
    """``problem`` and ``answer`` of the hub's sets, whose names differ in case; opencompass has ``question``."""
    statement, answer = text(fields, "problem", "Problem", "question"), text(fields, "answer", "Answer").strip()
    digits = answer.removesuffix("^\\circ").strip()  # one answer of 2025 is written with its degree sign
    if not (digits.isascii() and digits.isdigit() and int(digits) <= 999):
        raise DataError(f"the answer {answer!r:.40} is no integer from 0 to 999, as all of AIME's are")
    return Problem(identity(fields, "ID", "id", "problem_idx"), statement, ask(statement), str(int(digits)))


AIME24 = Suite(
    "aime24",
    "AIME 2024",
    (
        Source("HuggingFaceH4/aime_2024", {"train-*.parquet": 30}),
        Source("Maxwell-Jia/AIME_2024", {"aime_2024_problems.parquet": 30}),
    ),
    read,
    DRAW,
    "math",
    answer=final_form,
)
AIME25 = Suite(
    "aime25",
    "AIME 2025",
    (
        Source("opencompass/AIME2025", {"aime2025-I.jsonl": 15, "aime2025-II.jsonl": 15}),
        Source("math-ai/aime25", {"test.jsonl": 30}),
        Source("MathArena/aime_2025", {"train-*.parquet": 30}),
    ),
    read,
    DRAW,
    "math",
    answer=final_form,
)
