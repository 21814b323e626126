"""MATH-500: the 500 problems of MATH (Hendrycks et al. 2021) that Lightman et al. (arXiv 2305.20050) held out."""

from __future__ import annotations

from megatron_gspo.suites.base import Draw, Fields, Problem, Source, Suite, identity, text
from megatron_gspo.suites.mathematics import R1, ask, final_form


def read(fields: Fields) -> Problem:
    """``problem``, ``answer``, ``unique_id``; ``subject`` and ``level`` go with it."""
    statement = text(fields, "problem")
    about: Fields = {name: fields[name] for name in ("subject", "level") if name in fields}
    return Problem(identity(fields, "unique_id"), statement, ask(statement), text(fields, "answer"), about)


MATH500 = Suite(
    "math500",
    "MATH-500",
    (Source("HuggingFaceH4/MATH-500", {"test.jsonl": 500}),),
    read,
    Draw(4, 0.6, top_p=0.95, source=R1),
    "math",
    answer=final_form,
)
