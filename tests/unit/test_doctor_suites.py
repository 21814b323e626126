"""What doctor says of the suites that a run evaluates on."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.unit import suite_files
from tests.unit.doctor_cases import Case
from tests.unit.suite_engine import write_model


@pytest.fixture
def asking(case: Case, tmp_path: Path) -> Case:
    """A run whose tokenizer can read the problems."""
    write_model(tmp_path / "reads")
    suite_files.gsm8k(tmp_path / "published")
    case.overrides[:] = [f'model.path="{tmp_path}/reads"', f'eval.suites_data="{tmp_path}/published"']
    return case


def test_no_suite_is_sound(case: Case) -> None:
    assert [(check.status, check.detail) for check in case.checks(only="suites")] == [
        ("ok", "eval.suites is empty: none are asked")
    ]


def test_a_suite_s_problems_are_counted_and_missing_ones_are_a_warning(asking: Case) -> None:
    (found,) = asking.checks('eval.suites=["gsm8k:k=2:temperature=1:max_tokens=8"]', only="suites")
    assert found.status == "warning" and found.fix == "the files"
    assert "gsm8k: " in found.detail and "problems x 2 responses of at most 8 tokens, every 50 outer" in found.detail
    assert "1319 are published" in found.detail


def test_a_suite_that_is_none_or_whose_files_are_not_there_is_an_error(asking: Case) -> None:
    none = asking.check("suites", 'eval.suites=["gsm8k", "lcbb"]')
    assert none.status == "error" and none.fix == "eval.suites"
    assert "no suite 'lcbb' (did you mean lcb?)" in none.detail
    gone = asking.check("suites", 'eval.suites=["gsm8k", "lcb"]')
    assert gone.status == "error" and gone.fix == "eval.suites_data"
    assert "published/lcb: put there test.jsonl" in gone.detail


def test_a_tokenizer_that_cannot_write_a_problem_is_an_error(case: Case, tmp_path: Path) -> None:
    suite_files.gsm8k(tmp_path / "published")
    found = case.check("suites", 'eval.suites=["gsm8k"]', f'eval.suites_data="{tmp_path}/published"')
    assert found.status == "error" and "the tokenizer cannot encode" in found.detail


def test_suites_that_are_never_asked_are_a_warning(asking: Case) -> None:
    never = asking.check("suites", 'eval.suites=["gsm8k"]', "eval.suites_every=0")
    assert (never.status, never.fix) == ("warning", "eval.suites_every, or an empty eval.suites")
    tuning = asking.check("configuration", 'eval.suites=["gsm8k"]', 'algorithm.name="sft"')
    assert tuning.status == "error" and "sft starts no servers that could be asked" in tuning.detail
