"""``compare-evals``: what two evaluations have in common, and what is refused."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from megatron_gspo.cli import main
from megatron_gspo.errors import DataError
from megatron_gspo.report.paired_evaluations import compare, render

Captured = pytest.CaptureFixture[str]
Rewards = dict[str, Sequence[float | None]]


def write_evaluation(path: Path, rewards: Rewards, *, seed: int | None = 0, response: str = "7", **more: Any) -> Path:
    """As ``eval --suite`` leaves it, as far as a comparison reads it."""
    path.mkdir(parents=True)
    samples = len(next(iter(rewards.values())))
    result = {
        "suite": "gsm8k",
        "title": "GSM8K",
        "sampling": {"k": samples, "temperature": 0.6, "seed": seed},
        "result": {"prompts": len(rewards), "samples": samples, "full_reward": 1.0, "measured": {}},
    } | more
    (path / "result.json").write_text(json.dumps(result))
    lines = [
        {
            "prompt_id": problem,
            "sample": sample,
            "prompt": f"Problem {problem}?",
            "answer": "7",
            "response": f"{response} {sample}",
            "tokens": 3,
            "finish_reason": "stop",
            "reward": reward,
        }
        for problem, group in rewards.items()
        for sample, reward in enumerate(group)
    ]
    (path / "samples.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


FIRST: Rewards = {"a": [1.0, 1.0], "b": [0.0, 1.0], "c": [0.0, 0.0], "d": [1.0, None]}
SECOND: Rewards = {"a": [1.0, 0.0], "b": [1.0, 1.0], "c": [0.0, 0.0], "d": [1.0, 1.0]}


def test_differences_are_taken_problem_by_problem(tmp_path: Path, capsys: Captured) -> None:
    first, second = write_evaluation(tmp_path / "a", FIRST), write_evaluation(tmp_path / "b", SECOND)
    assert main(["compare-evals", str(first), str(second), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    (suite,) = found["suites"]
    assert found["schema"] == "megatron-gspo/evaluation-comparison/1"
    assert suite["first"]["value"] == pytest.approx((1 + 0.5 + 0 + 1) / 4), "of d, what was graded"
    assert suite["difference"]["value"] == pytest.approx((-0.5 + 0.5 + 0 + 0) / 4)
    assert suite["problems"] == {"first": 1, "second": 1, "same": 2, "p_value": 1.0}
    assert suite["samples"] == {"both": 3, "first": 1, "second": 1, "neither": 2}
    assert (second / "compared.html").is_file() and not suite["warnings"]
    assert main(["compare-evals", str(first), str(second), "--out", str(tmp_path / "page.html")]) == 0
    out = capsys.readouterr().out
    assert "A better on 1, B on 1, of 4 (p = 1)" in out and f"written to {tmp_path}/page.html" in out


def test_directories_of_suites_are_paired_by_name(tmp_path: Path) -> None:
    for side in "ab":
        write_evaluation(tmp_path / side / "gsm8k", FIRST)
        write_evaluation(tmp_path / side / "math500", FIRST, suite="math500")
    write_evaluation(tmp_path / "b" / "aime24", FIRST, suite="aime24")
    assert [pair.name for pair in compare(tmp_path / "a", tmp_path / "b")] == ["gsm8k", "math500"]
    with pytest.raises(DataError, match=r"a has gsm8k, math500, .*aime24 has aime24: nothing to compare"):
        compare(tmp_path / "a", tmp_path / "b/aime24")
    with pytest.raises(DataError, match=r"none: no evaluation that is done"):
        compare(tmp_path / "none", tmp_path / "b")


def test_what_is_not_the_same_is_warned_of_or_refused(tmp_path: Path) -> None:
    first = write_evaluation(tmp_path / "a", FIRST)
    other = {name: group for name, group in SECOND.items() if name != "a"} | {"e": [1.0, 1.0]}
    second = write_evaluation(tmp_path / "b", other, seed=1, grader={"reward": "math"})
    (pair,) = compare(first, second)
    assert pair.record["warnings"] == [
        "1 problems are in A alone and 1 in B alone: they are left out",
        "sampling differs: seed 0 and 1",
        "grader differs: reward None and math",
    ]
    assert pair.record["samples"] is None, "no response of one has the seed of the other's"
    text = (second / "samples.jsonl").read_text().replace('"answer": "7"', '"answer": "8"')
    (second / "samples.jsonl").write_text(text)
    with pytest.raises(DataError, match="problem b has the reference '7' in one and '8' in other"):
        compare(first, second)
    (second / "samples.jsonl").write_text("\n".join(text.splitlines()[:-1]) + "\n")
    with pytest.raises(DataError, match="has the responses to 4 problems, and not 2 to each of the 4"):
        compare(first, second)


def test_greedy_evaluations_are_paired_whatever_their_seeds(tmp_path: Path) -> None:
    greedy = [{"k": 1, "temperature": 0.0, "seed": seed} for seed in (0, 1)]
    one, other = ({name: group[:1] for name, group in rewards.items()} for rewards in (FIRST, SECOND))
    first = write_evaluation(tmp_path / "a", one, sampling=greedy[0])
    (pair,) = compare(first, write_evaluation(tmp_path / "b", other, sampling=greedy[1]))
    assert pair.record["warnings"] == []
    assert pair.record["samples"] == {"both": 2, "first": 0, "second": 1, "neither": 1}


def test_unseeded_evaluations_have_no_table_of_seeds_and_measured_figures_stand_side_by_side(tmp_path: Path) -> None:
    elo = {"value": 1234.0, "low": 1000.0, "high": 1500.0, "method": "m"}
    figures = {"prompts": 4, "samples": 2, "full_reward": 1.0, "measured": {"elo": elo}}
    pair = [write_evaluation(tmp_path / name, FIRST, seed=None, result=figures) for name in "ab"]
    (found,) = compare(*pair)
    assert found.record["samples"] is None
    assert [one["value"] for one in found.record["measured"]["elo"]] == [1234.0, 1234.0]
    assert "<b>1234</b>" in render([found], ("a", "b"))


def test_the_page_escapes_names_and_what_models_say(tmp_path: Path) -> None:
    hostile = "</script><script>alert(1)</script>"
    for name in "ab":
        write_evaluation(tmp_path / name, {hostile: [1.0]}, response=hostile, title=hostile)
    page = render(compare(tmp_path / "a", tmp_path / "b"), (hostile, "b"))
    assert "<script>alert" not in page
