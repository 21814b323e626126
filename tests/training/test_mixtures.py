"""Whole runs on several sources, each with a reward of its own, and with a curriculum."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from megatron_gspo.config import RunConfig
from megatron_gspo.report.metrics import METRICS, row_of
from tests.pool import RankPool
from tests.training.conftest import MakeConfig
from tests.training.test_resume import exact
from tests.training.test_runs import metrics_of, responses_of, train

REWARDS = Path(__file__).with_name("rewards.py")


@pytest.fixture
def mixed(quickstart: Path, make_config: MakeConfig, tmp_path: Path) -> MakeConfig:
    """Two halves of the quickstart's prompts: "even" is rewarded for what babble may do, "never" for nothing."""
    lines = (quickstart / "train.jsonl").read_text().splitlines(keepends=True)
    for name, part in (("even", lines[:20]), ("never", lines[20:22])):
        (tmp_path / f"{name}.jsonl").write_text("".join(part))
    never = '{ function = "exact" }'
    sources = (
        f'data.sources=[{{ name = "even", path = "{tmp_path}/even.jsonl", weight = 3.0 }}, '
        f'{{ name = "never", path = "{tmp_path}/never.jsonl", reward = {never} }}]'
    )

    def make(*more: str) -> RunConfig:
        settings = ['data.path=""', sources, "optimizer.schedule=constant", "train.outer_steps=6", "eval.every=0"]
        return make_config(*settings, 'data.curriculum="variance"', *more)

    return make


def cursor_of(config: RunConfig) -> dict[str, Any]:
    """Where the run stands among its prompts, and what it knows of them."""
    header = Path(config.train.run_dir) / "checkpoints" / "outer_00006" / "checkpoint.json"
    cursor: dict[str, Any] = json.loads(header.read_text())["extra"]["cursor"]
    return cursor


@pytest.mark.slow_suite
def test_a_mixture_with_a_curriculum_resumed_or_on_two_leaders_is_the_same_run(
    ranks: RankPool, mixed: MakeConfig, tmp_path: Path
) -> None:
    whole = mixed("train.save_rollouts=1000")
    ranks.run(2, train, whole)
    lines = [line for line in metrics_of(whole) if "source/even/groups" in line]
    firsts = [line for line in lines if line["minibatch"] == 0]
    assert len(firsts) == 6 and all(row_of(name) in METRICS for name in lines[0] if "/" in name)
    assert [line["source/even/groups"] + line["source/never/groups"] for line in firsts] == [4.0] * 6
    assert sum(line["source/even/groups"] for line in firsts) == 18  # 3 of 4
    assert all(line["source/never/reward"] == 0 and line["source/never/zero_std_groups"] == 1 for line in firsts)
    assert max(line["source/even/reward"] for line in firsts) > 0
    assert [record["prompt_id"].split("/")[0] for record in responses_of(whole)].count("never") == 6 * 8
    assert firsts[0]["curriculum/hard"] == 1 / 22 and firsts[-1]["curriculum/hard"] > firsts[0]["curriculum/hard"]

    again = mixed(f'train.run_dir="{tmp_path}/again"', "train.save_rollouts=1000", "train.outer_steps=3")
    ranks.run(2, train, again)
    again = mixed(
        f'train.run_dir="{tmp_path}/again"', "train.save_rollouts=1000", "train.resume=true", "train.overwrite=false"
    )
    ranks.run(2, train, again)
    assert list(map(exact, responses_of(again))) == list(map(exact, responses_of(whole)))
    assert list(map(exact, metrics_of(again))) == list(map(exact, metrics_of(whole)))

    layout = ["parallel.tensor=1", "parallel.expert=1"]  # two leaders, each with half of the prompts
    other = mixed(f'train.run_dir="{tmp_path}/other"', "train.save_rollouts=1000", *layout)
    ranks.run(2, train, other)
    assert sum(line["curriculum/skipped"] for line in firsts) == 9 and cursor_of(whole)["given"] == [18, 6]
    assert cursor_of(other) == cursor_of(again) == cursor_of(whole)
