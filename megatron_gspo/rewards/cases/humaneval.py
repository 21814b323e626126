"""HumanEval: ``test``, which defines ``check(candidate)``; ``entry_point``; and ``prompt``, the beginning of the
program: helpers, and the function's head and docstring.

The prompt is run in front of the tests, which use its helpers, and stands in front of the response, which may be the
function's body or the whole of it. Where a chat template has made something else of ``prompt``, it is looked for
in ``code_prompt``.
"""

from __future__ import annotations

import ast

from megatron_gspo.rewards.cases.fields import code
from megatron_gspo.rewards.cases.tests import Asserts, Problem, Row


def recognise(row: Row) -> bool:
    """Whether a row is HumanEval's."""
    return "entry_point" in row and "test" in row


def read(row: Row) -> Problem:
    """Raises ValueError."""
    entry, test = code(row, "entry_point"), code(row, "test")
    if not entry.isidentifier() or "def check" not in test:
        raise ValueError("entry_point names no function, or test defines no check")
    prompt = code(row, "code_prompt") or code(row, "prompt")
    setup = prompt if is_code(prompt) else ""
    tests = Asserts((f"{test}\n\ncheck({entry})\n",), setup, entry)
    return Problem(tests, prefix=setup, language="python")


def is_code(text: str) -> bool:
    """Whether a text is Python, and no prompt in words. It comes from the data file, not from a model."""
    try:
        ast.parse(text)
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return False
    return True
