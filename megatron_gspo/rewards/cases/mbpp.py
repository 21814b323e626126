"""MBPP: ``test_list`` of asserts, one each a test, and ``test_setup_code`` (``test_imports``, a list, in the sanitized
file)."""

from __future__ import annotations

from megatron_gspo.rewards.cases.fields import as_list, as_text, code
from megatron_gspo.rewards.cases.tests import Asserts, Problem, Row


def recognise(row: Row) -> bool:
    """Whether a row is MBPP's."""
    return "test_list" in row


def read(row: Row) -> Problem:
    """Raises ValueError."""
    checks = [as_text(check, "test_list") for check in as_list(row.get("test_list"), "test_list")]
    if not checks:
        raise ValueError("test_list is empty")
    imports = as_list(row.get("test_imports") or [], "test_imports")
    setup = "\n".join([*(as_text(line, "test_imports") for line in imports), code(row, "test_setup_code")])
    return Problem(Asserts(tuple(checks), setup.strip()), language="python")
