"""The table of Megatron-Core's silent faults names tests that exist."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PAGE = ROOT / "docs" / "megatron-faults.md"
TEST = re.compile(r"`(tests/[\w/]+\.py)::(\w+)`")


def rows() -> list[list[str]]:
    """The cells of every row of the page's tables, without their heads."""
    lines = [line for line in PAGE.read_text(encoding="utf-8").splitlines() if line.startswith("|")]
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
    return [row for row in cells if row[-1] != "held by" and not row[0].startswith("---")]


def names_in(file: str) -> set[str]:
    tree = ast.parse((ROOT / file).read_text(encoding="utf-8"))
    return {node.name for node in tree.body if isinstance(node, ast.FunctionDef) and node.name.startswith("test_")}


def test_every_fault_of_the_report_has_a_row() -> None:
    numbers = [row[0] for row in rows() if row[0].isdigit()]
    assert numbers == [str(number) for number in range(1, 14)]


@pytest.mark.parametrize("row", rows(), ids=lambda row: row[0] if row[0].isdigit() else row[0].split("]")[0].strip("["))
def test_a_row_names_tests_that_exist_and_nothing_else(row: list[str]) -> None:
    named = TEST.findall(row[-1])
    assert named
    assert TEST.sub("", row[-1]).strip(", ") == "", "the last cell is of tests alone"
    for file, name in named:
        assert name in names_in(file), f"{file} has no {name}"


def test_every_test_of_reported_faults_is_named_in_the_page() -> None:
    file = "tests/distributed/test_megatron_faults.py"
    named = {name for row in rows() for found, name in TEST.findall(row[-1]) if found == file}
    assert named | {"test_a_trap_springs"} == names_in(file)
