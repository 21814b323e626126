"""Tests of programs, read from rows as each data set publishes them."""

from __future__ import annotations

import base64
import json
import os
import pickle
import sys
import zlib
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from megatron_gspo.data.files import open_rows
from megatron_gspo.data.formats import Paths, read_example
from megatron_gspo.rewards.cases import FORMATS, Asserts, Calls, Stdin, read_problem
from megatron_gspo.rewards.cases.fields import MOST_DIGITS, integer
from megatron_gspo.rewards.cases.pickled import only_text, packed_text
from tests.unit import code_cases as rows
from tests.unit.test_code_programs import PAGE


def as_read(tmp_path: Path, row: dict[str, Any], prompt: str, *, parquet: bool = False) -> dict[str, Any]:
    """What the reward gets of a row that has been through a file and the data's reader."""
    source = tmp_path / ("rows.parquet" if parquet else "rows.jsonl")
    if parquet:
        pq.write_table(pa.Table.from_pylist([row]), source)
    else:
        source.write_text(json.dumps(row) + "\n")
    (read,) = open_rows(source).read_all()
    example = read_example("prompts", Paths(prompt=prompt), dict(read.fields))
    return {**example.metadata, "answer": example.answer}


@pytest.mark.parametrize("parquet", [False, True])
@pytest.mark.parametrize(
    ("name", "row", "prompt", "kind", "count"),
    [
        ("livecodebench", rows.LCB_STDIN, "question_content", Stdin, 3),
        ("livecodebench", rows.LCB_CALL, "question_content", Calls, 2),
        ("apps", rows.APPS_STDIN, "question", Stdin, 2),
        ("apps", rows.APPS_CALL, "question", Calls, 2),
        ("apps", rows.TACO, "question", Stdin, 2),
        ("apps", rows.EURUS, "prompt", Calls, 2),
        ("codeforces", rows.CODEFORCES, "description", Stdin, 2),
        ("mbpp", rows.MBPP, "text", Asserts, 3),
        ("humaneval", rows.HUMANEVAL | {"code_prompt": rows.HUMANEVAL["prompt"]}, "prompt", Asserts, 1),
    ],
)
def test_a_file_of_each_layout_is_recognised_and_read(name, row, prompt, kind, count, parquet, tmp_path) -> None:
    found = as_read(tmp_path, row, prompt, parquet=parquet)
    assert next(known for known, entry in FORMATS.items() if entry.recognise(found)) == name
    problem = read_problem(found)
    assert isinstance(problem.tests, kind) and len(problem.tests) == count
    assert problem == read_problem(found, name)


def test_the_rows_of_the_page_are_of_their_layouts() -> None:
    block = PAGE.read_text(encoding="utf-8").split("```json\n")[1].split("```")[0].strip().split("\n")
    found = [json.loads(line) for line in block]
    names = [next(name for name, entry in FORMATS.items() if entry.recognise(row)) for row in found]
    assert names == ["livecodebench", "apps", "codeforces", "mbpp", "humaneval"] and set(names) == set(FORMATS)
    assert [len(read_problem(row).tests) for row in found[1:]] == [1, 1, 1, 1]


def test_what_each_layout_means() -> None:
    public, *private = read_problem(rows.LCB_STDIN).tests.pairs  # type: ignore[union-attr]
    assert public == ("1 2\n", "3\n") and private == [("10 20\n", "30\n"), ("-5 5\n", "0\n")]
    lcb, apps = read_problem(rows.LCB_STDIN), read_problem(rows.APPS_STDIN)
    assert lcb.tests.lines and lcb.tests.numbers and lcb.time_s == 6.0 and lcb.imports  # type: ignore[union-attr]
    assert not apps.tests.lines and not apps.tests.numbers and apps.time_s is None and apps.imports  # type: ignore[union-attr]
    calls = read_problem(rows.LCB_CALL).tests
    assert isinstance(calls, Calls) and calls.name == "neighbours"
    assert [(call.arguments, call.expected, call.either) for call in calls.calls] == [
        (([1, 2, 3], False), [3, 5], False),
        (([1, 2, 3], True), [3, 5, 4], False),
    ]
    assert read_problem(rows.APPS_STDIN).tests.pairs[1] == ("10\n20", "30")  # type: ignore[union-attr]
    long = read_problem(rows.APPS_CALL).tests.calls[1]  # type: ignore[union-attr]
    assert (long.arguments, long.expected, long.either) == ((10**50, 1), [10**50 + 1], True)
    taco = read_problem(rows.TACO)
    assert (taco.time_s, taco.memory_bytes) == (2.0, 2**28)
    eurus = read_problem(rows.EURUS).tests.calls[0]  # type: ignore[union-attr]
    assert (eurus.arguments, eurus.expected) == ((1, 2), 3)
    codeforces = read_problem(rows.CODEFORCES_FILES)
    assert codeforces.tests.by_files and codeforces.memory_bytes == 2**26 and codeforces.time_s == 1.0  # type: ignore[union-attr]
    assert read_problem(rows.MBPP).tests.setup == "import math"  # type: ignore[union-attr]
    humaneval = read_problem(rows.HUMANEVAL)
    assert humaneval.prefix == rows.HUMANEVAL["prompt"] and humaneval.tests.entry == "decode_pairs"  # type: ignore[union-attr]
    spoken = read_problem(rows.HUMANEVAL | {"prompt": "Please write decode_pairs."})
    assert spoken.prefix == spoken.tests.setup == ""  # type: ignore[union-attr]


def test_dictionaries_of_apps_get_their_integer_keys_back() -> None:
    tests = {"fn_name": "f", "inputs": [[{"1": 2}, {"a": 1}]], "outputs": [[{"-3": 4}]]}
    call = read_problem({"input_output": json.dumps(tests)}).tests.calls[0]  # type: ignore[union-attr]
    assert (call.arguments, call.expected) == (({1: 2}, {"a": 1}), [{-3: 4}])


def test_integers_of_any_length_are_read_without_a_setting_of_the_process() -> None:
    limit, digits = sys.get_int_max_str_digits(), "9" * 20_000
    row = {"input_output": f'{{"fn_name": "f", "inputs": [[{digits}]], "outputs": [[-{digits}]]}}'}
    call = read_problem(row).tests.calls[0]  # type: ignore[union-attr]
    assert call.arguments == (10**20_000 - 1,) and call.expected == [1 - 10**20_000]
    assert sys.get_int_max_str_digits() == limit
    assert integer("-12") == -12
    with pytest.raises(ValueError, match=f"an integer of {MOST_DIGITS + 1} digits"):
        integer("1" * (MOST_DIGITS + 1))


class Hostile:
    """Runs a command where it is unpickled."""

    def __reduce__(self) -> tuple[Any, ...]:
        return os.system, ("touch unpickled",)


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
def test_a_hostile_pickle_is_refused_and_nothing_of_it_runs(protocol, tmp_path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    hostile = [Hostile(), [json.dumps([1]), Hostile()], {"a": Hostile()}, os.system, print]
    for value in hostile:
        pickled = pickle.dumps(value, protocol)
        with pytest.raises(ValueError, match="the pickle holds "):
            only_text(pickled)
        row = rows.LCB_STDIN | {"private_test_cases": base64.b64encode(zlib.compress(pickled)).decode()}
        with pytest.raises(ValueError, match=r"^private_test_cases: the pickle holds .* \(tests read as"):
            read_problem(row)
    assert not list(tmp_path.iterdir())
    pickle.loads(pickle.dumps(hostile[0], protocol))
    assert list(tmp_path.iterdir()), "the pickle was none that does harm"


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
def test_a_pickled_text_is_read_in_every_protocol(protocol: int) -> None:
    for text in ("[1]", "", "\u00fc\U0001f600\n" * 100, "x" * 70_000):
        assert only_text(pickle.dumps(text, protocol)) == text


@pytest.mark.parametrize(
    ("made", "why"),
    [
        (lambda: "not base64!", "no base64 of zlib"),
        (lambda: base64.b64encode(b"not zlib").decode(), "no base64 of zlib"),
        (lambda: base64.b64encode(zlib.compress(pickle.dumps("a" * 999))[:-8]).decode(), "it is cut off"),
        (lambda: base64.b64encode(zlib.compress(b"")).decode(), "no pickle"),
        (lambda: base64.b64encode(zlib.compress(b"garbage")).decode(), "no pickle"),
        (lambda: base64.b64encode(zlib.compress(pickle.dumps(["a", "b"]))).decode(), "more than one text"),
        (lambda: base64.b64encode(zlib.compress(pickle.dumps(b"bytes"))).decode(), "the pickle holds"),
    ],
)
def test_what_is_no_packed_text_is_refused_in_a_line(made, why) -> None:
    with pytest.raises(ValueError, match=why) as raised:
        packed_text(made())
    assert "\n" not in str(raised.value)


def test_a_bomb_is_not_unpacked(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("megatron_gspo.rewards.cases.pickled.MOST_BYTES", 2**20)
    bomb = base64.b64encode(zlib.compress(pickle.dumps("0" * 2**22))).decode()
    with pytest.raises(ValueError, match="unpacks to more than 1 MiB"):
        packed_text(bomb)


@pytest.mark.parametrize(
    ("row", "why"),
    [
        ({}, "no tests in a layout that is known"),
        ({"answer": "42", "level": 3}, "it has answer, level"),
        ({"input_output": ""}, "input_output is no JSON"),
        ({"input_output": "[" * 100_000}, "nested too deeply"),
        ({"input_output": '{"inputs": [], "outputs": []}'}, "0 inputs and 0 outputs"),
        ({"input_output": '{"inputs": ["1"], "outputs": []}'}, "1 inputs and 0 outputs"),
        ({"input_output": '{"inputs": "1", "outputs": ["1"]}'}, "inputs is no list"),
        ({"input_output": '{"fn_name": "f", "inputs": [3], "outputs": [4]}'}, "inputs is no list"),
        (rows.TACO | {"time_limit": "soon"}, "time_limit = 'soon' is no amount of s or ms"),
        (rows.TACO | {"memory_limit": "-1"}, "memory_limit = '-1' is no amount"),
        (rows.LCB_CALL | {"metadata": "{}"}, "metadata has no func_name"),
        (rows.LCB_STDIN | {"public_test_cases": json.dumps([rows.lcb("1", "2", "magic")])}, "testtype is neither"),
        (rows.LCB_STDIN | {"public_test_cases": "[1]"}, "public_test_cases holds something that is no test"),
        (rows.LCB_STDIN | {"public_test_cases": "[]", "private_test_cases": "[]"}, "testtype is neither"),
        (rows.CODEFORCES | {"interaction_format": "You print, and read."}, "interactive"),
        (rows.CODEFORCES | {"input_mode": "socket"}, "input_mode = 'socket'"),
        (rows.CODEFORCES | {"official_tests": None, "examples": None}, "neither an official test nor an example"),
        (rows.CODEFORCES | {"generated_checker": 3}, "generated_checker is no code"),
        (rows.MBPP | {"test_list": []}, "test_list is empty"),
        (rows.HUMANEVAL | {"entry_point": "a b"}, "entry_point names no function"),
        (rows.HUMANEVAL | {"test": "pass"}, "test defines no check"),
        (rows.HUMANEVAL | {"test": "def check(f): '\ud800'"}, "test is no Unicode text"),
        (rows.CODEFORCES | {"generated_checker": "'\ud800'"}, "generated_checker is no Unicode text"),
        ({"input_output": '{"inputs": ["\\ud800"], "outputs": ["1"]}'}, "inputs is no Unicode text: .* character 0"),
        ({"input_output": '{"fn_name": ["f"], "inputs": [[3]], "outputs": [4]}'}, "fn_name is no name"),
        (rows.TACO | {"memory_limit": "9" * 400 + " megabytes"}, "memory_limit = '9+ is no amount"),
        (rows.TACO | {"time_limit": "9" * 400 + " seconds"}, "time_limit = '9+ is no amount"),
        (rows.LCB_CALL | {"metadata": "[1]"}, "metadata has no func_name"),
        (rows.LCB_STDIN | {"public_test_cases": [rows.lcb("1", "2", ["stdin"])]}, "testtype is neither"),  # type: ignore[arg-type]
    ],
)
def test_tests_that_cannot_be_read_are_named_in_a_line(row: dict[str, Any], why: str) -> None:
    with pytest.raises(ValueError, match=why) as raised:
        read_problem(row)
    assert "\n" not in str(raised.value) and len(str(raised.value)) < 400
