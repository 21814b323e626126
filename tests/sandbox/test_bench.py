"""``bench sandbox`` runs what it says, and its table has a row for each kind of program."""

from __future__ import annotations

import json

import pytest

from megatron_gspo.cli import main


def test_every_verdict_is_right_and_every_kind_of_program_has_a_row(
    namespaces: None, capfd: pytest.CaptureFixture[str]
) -> None:
    few = ["bench", "sandbox", "--programs", "2", "--compiles", "1", "--concurrency", "2"]
    assert main([*few, "--json"]) == 0
    result = json.loads(capfd.readouterr().out)
    counts = [(row["programs"], row["count"], row["wrong_verdicts"]) for row in result["rows"]]
    assert counts == [("python", 4, 0), ("c++, iostream", 1, 0), ("c++, precompiled", 1, 0)]
    assert result["concurrency"] == 2
    assert all(row["per_second"] > 0 for row in result["rows"])
