"""GPQA Diamond: 198 multiple-choice questions of graduate level (Rein et al. 2023, arXiv 2311.12022)."""

from __future__ import annotations

import hashlib
import re

from megatron_gspo.rewards.answers import boxed_text
from megatron_gspo.rewards.thinking import after_thinking
from megatron_gspo.suites.base import Draw, Fields, Problem, Source, Suite, identity, text
from megatron_gspo.suites.mathematics import R1

LETTERS = "ABCD"
INSTRUCTION = "Please reason step by step, and put the letter of the right choice within \\boxed{}."
WRONG = ("Incorrect Answer 1", "Incorrect Answer 2", "Incorrect Answer 3")
_LETTER = re.compile(r"\(?\s*([A-D])\s*\)?\.?", re.IGNORECASE)


def read(fields: Fields) -> Problem:
    """``Question``, ``Correct Answer`` and three incorrect ones, in an order that a hash of their texts gives: the
    same on every machine, and none that favours a letter."""
    statement = text(fields, "Question").strip()
    right, wrong = text(fields, "Correct Answer").strip(), [text(fields, name).strip() for name in WRONG]
    choices = sorted(
        enumerate([right, *wrong]), key=lambda one: hashlib.sha256(f"{statement}\n{one[0]}\n{one[1]}".encode()).digest()
    )
    listed = "\n".join(f"({letter}) {choice}" for letter, (_, choice) in zip(LETTERS, choices, strict=True))
    answer = LETTERS[[place for place, _ in choices].index(0)]
    question = f"{statement}\n\n{listed}\n\n{INSTRUCTION}"
    return Problem(identity(fields, "Record ID"), statement, question, answer, {"choices": [c for _, c in choices]})


def letter(prompt: str, response: str) -> str | None:
    """The letter in the last box."""
    said = after_thinking(prompt, response)
    boxed = "" if said is None else boxed_text(said).replace("\\text{", "").replace("}", "")
    found = _LETTER.fullmatch(boxed.strip())
    return found[1].upper() if found else None


GPQA_DIAMOND = Suite(
    "gpqa-diamond",
    "GPQA Diamond",
    (Source("Idavidrein/gpqa", {"gpqa_diamond.csv": 198}),),
    read,
    Draw(8, 0.6, top_p=0.95, source=R1),
    "choice",
    answer=letter,
)
