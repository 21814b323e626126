"""APPS' and TACO's ``input_output``, and Eurus-2's answers, which are the same: JSON of ``inputs`` and ``outputs``, one
each a test, and perhaps ``fn_name``.

As APPS' grader (eval/testing_util.py) reads them: with a function, an input is the list of its arguments, and the
expected value may be wrapped in a list; dictionaries have had their integer keys turned into texts. Without one, inputs
and outputs are texts or lists of lines. Eurus-2 writes arguments and values as JSON texts, one argument a line.

One key is ours: ``prefix``, code that a response goes on from.
"""

from __future__ import annotations

import re
from typing import Any, Literal

from megatron_gspo.rewards.cases import livecodebench
from megatron_gspo.rewards.cases.fields import as_list, as_text, code, memory, parsed, seconds
from megatron_gspo.rewards.cases.tests import Call, Calls, Problem, Row, Stdin

FIELD = "input_output"
WHOLE = re.compile(r"-?[0-9]{1,1000}")
"""An integer that JSON has made a text of, to be a key."""


def recognise(row: Row) -> bool:
    """Whether a row has tests in this layout, in its own field, as its answer, or spread out in it."""
    if FIELD in row or ("inputs" in row and "outputs" in row):
        return True
    answer = row.get("answer")
    return isinstance(answer, str) and answer.lstrip().startswith("{") and '"inputs"' in answer


def read(row: Row) -> Problem:
    """Raises ValueError."""
    where = FIELD if FIELD in row else "answer"
    held = row if "inputs" in row and "outputs" in row else parsed(row.get(where), where)
    if not hasattr(held, "get"):
        raise ValueError(f"{where} is no JSON object with inputs and outputs")
    inputs, outputs = as_list(held.get("inputs"), "inputs"), as_list(held.get("outputs"), "outputs")
    if not inputs or len(inputs) != len(outputs):
        raise ValueError(f"{len(inputs)} inputs and {len(outputs)} outputs are no tests")
    name = held.get("fn_name")
    if name and not isinstance(name, str):
        raise ValueError(f"fn_name is no name, but {name!r:.60}")
    if not name:
        texts = zip(inputs, outputs, strict=True)
        pairs = tuple((as_text(given, "inputs"), as_text(wanted, "outputs")) for given, wanted in texts)
        tests: Stdin | Calls = Stdin(pairs)
    else:
        tests = Calls(name, tuple(call(given, wanted) for given, wanted in zip(inputs, outputs, strict=True)))
    language: Literal["", "python"] = "python" if name else ""
    return Problem(tests, seconds(row), memory(row), code(held, "prefix"), imports=True, language=language)


def call(given: Any, wanted: Any) -> Call:
    """One test of a function. Raises ValueError."""
    if isinstance(given, str):
        return Call(livecodebench.arguments(given), parsed(wanted, "outputs"), either=True)
    arguments = [with_numbers(value) for value in as_list(given, "inputs")]
    expected = [with_numbers(value) for value in wanted] if isinstance(wanted, list) else with_numbers(wanted)
    return Call(tuple(arguments), expected, either=True)


def with_numbers(value: Any) -> Any:
    """A dictionary with integers for keys, where JSON has made texts of all of them."""
    if isinstance(value, dict) and value and all(WHOLE.fullmatch(key) for key in value):
        return {int(key): item for key, item in value.items()}
    return value
