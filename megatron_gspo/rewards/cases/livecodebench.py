"""LiveCodeBench's rows: ``public_test_cases`` and ``private_test_cases``, each a JSON list of {"input", "output",
"testtype"}, the second one packed in code_generation_lite; ``metadata``, JSON with perhaps ``func_name``.

As its own grader (lcb_runner/evaluation/testing_util.py) reads them: arguments are lines of JSON, results equal the
expected one but for tuples, outputs have the same lines, and numbers of the same value are the same; 6 seconds a test.
"""

from __future__ import annotations

from typing import Any

from megatron_gspo.rewards.cases.fields import as_list, as_text, parsed
from megatron_gspo.rewards.cases.pickled import packed_text
from megatron_gspo.rewards.cases.tests import Call, Calls, Problem, Row, Stdin

PUBLIC, PRIVATE = "public_test_cases", "private_test_cases"
TIME_S = 6.0


def recognise(row: Row) -> bool:
    """Whether a row is LiveCodeBench's."""
    return PUBLIC in row and PRIVATE in row


def read(row: Row) -> Problem:
    """The public tests and then the private ones. Raises ValueError."""
    cases = [*listed(row.get(PUBLIC), PUBLIC), *listed(row.get(PRIVATE), PRIVATE)]
    kinds = {str(case.get("testtype")) for case in cases}
    if not cases or kinds - {"stdin", "functional"} or len(kinds) > 1:
        raise ValueError(f'testtype is neither "stdin" nor "functional" throughout: {sorted(kinds)}')
    pairs = [(as_text(case.get("input"), "input"), as_text(case.get("output"), "output")) for case in cases]
    if kinds == {"stdin"}:
        return Problem(Stdin(tuple(pairs), lines=True, numbers=True), TIME_S, imports=True)
    metadata = parsed(row.get("metadata") or "{}", "metadata")
    name = metadata.get("func_name") if hasattr(metadata, "get") else None
    if not isinstance(name, str) or not name:
        raise ValueError("metadata has no func_name, and the tests are calls of a function")
    calls = tuple(Call(arguments(given), parsed(wanted, "output")) for given, wanted in pairs)
    return Problem(Calls(name, calls), TIME_S, imports=True, language="python")


def listed(value: Any, name: str) -> list[dict[str, Any]]:
    """A list of tests, as JSON or packed. Raises ValueError."""
    if value is None or value == "":
        return []
    if isinstance(value, str) and value.lstrip()[:1] not in ("[", "{"):
        try:
            value = packed_text(value)
        except ValueError as error:
            raise ValueError(f"{name}: {error}") from None
    cases = as_list(parsed(value, name), name)
    if not all(isinstance(case, dict) for case in cases):
        raise ValueError(f"{name} holds something that is no test")
    return cases


def arguments(lines: str) -> tuple[Any, ...]:
    """One argument a line, in JSON. Raises ValueError."""
    return tuple(parsed(line, "input") for line in lines.split("\n") if line.strip())
