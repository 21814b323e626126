"""Groups that teach nothing are drawn anew, and what length costs: whole runs against a stand-in."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from megatron_gspo.config import load
from megatron_gspo.report.recorder import RunRecorder
from megatron_gspo.runs.loop import train
from tests.pool import RankPool
from tests.training.conftest import QUICKSTART
from tests.training.stand_in import StandIn

pytestmark = pytest.mark.timeout(500)
Settings = Callable[..., list[str]]


@pytest.fixture
def settings(overrides: list[str], tmp_path: Path) -> Settings:
    def make(server: StandIn, *more: str) -> list[str]:
        own = [f'rollout.servers=["{server.url}"]', 'sync.method="disk"', f'sync.directory="{tmp_path}"']
        unchecked = ['sync.verify="off"', "rollout.max_engine_k3=0"]  # a stand-in draws from no model
        return [*overrides, *own, *unchecked, "eval.every=0", "train.save_hf=false", *more]

    return make


def reward(name: str) -> str:
    return f'reward.function="{Path(__file__).with_name("rewards.py")}:{name}"'


def run(settings: list[str]) -> None:
    train(load(QUICKSTART / "gspo.toml", settings), RunRecorder)


def lines(path: Path, *, without: tuple[str, ...] = ("time/", "tokens_per_s")) -> list[dict[str, Any]]:
    records = [json.loads(line) for line in (path / "metrics.jsonl").read_text().splitlines()]
    return [{key: value for key, value in record.items() if not key.startswith(without)} for record in records]


def test_groups_of_equal_rewards_are_drawn_anew_from_the_prompts_that_follow(
    ranks: RankPool, settings: Settings, quickstart: Path, tmp_path: Path
) -> None:
    with StandIn(quickstart / "model") as server:
        ranks.run(2, run, settings(server, reward("equal_for_every_other_prompt"), "rollout.dynamic_sampling=8"))
        answered = server.answered
    records = lines(tmp_path / "run")
    of_steps = {line["outer_step"]: line for line in records}
    for line in of_steps.values():
        assert line["reward/zero_std_groups"] == 0.0 and line["dynamic/left"] == 0.0
        assert line["dynamic/drawn"] > 4 and line["dynamic/rounds"] >= 1
    assert answered == 8 * sum(line["dynamic/drawn"] for line in of_steps.values())


def test_a_resumed_run_goes_on_behind_the_prompts_that_were_drawn(
    ranks: RankPool, settings: Settings, quickstart: Path, tmp_path: Path
) -> None:
    with StandIn(quickstart / "model") as server:
        common = settings(server, reward("equal_for_every_other_prompt"), "rollout.dynamic_sampling=8")
        ranks.run(2, run, common)
        parts = [*common, f'train.run_dir="{tmp_path / "parts"}"', "train.checkpoint_every=1"]
        ranks.run(2, run, [*parts, "train.outer_steps=1"])
        ranks.run(2, run, [*parts, "train.overwrite=false", "train.resume=true"])
    assert lines(tmp_path / "parts") == lines(tmp_path / "run")


def test_what_the_last_round_brings_is_kept_where_every_group_is_equal(
    ranks: RankPool, settings: Settings, quickstart: Path, tmp_path: Path
) -> None:
    with StandIn(quickstart / "model") as server:
        ranks.run(2, run, settings(server, reward("always_equal"), "rollout.dynamic_sampling=2", "train.outer_steps=1"))
        assert server.answered == 3 * 4 * 8
    for line in lines(tmp_path / "run"):
        assert (line["dynamic/rounds"], line["dynamic/drawn"], line["dynamic/left"]) == (2.0, 12.0, 4.0)
        assert (line["reward/mean"], line["reward/zero_std_groups"]) == (1.0, 1.0)


@pytest.mark.parametrize("credit", ["centred", "leave-one-out", "batch", "group-then-batch"])
def test_two_leaders_give_the_credit_that_one_does(
    ranks: RankPool, settings: Settings, quickstart: Path, tmp_path: Path, credit: str
) -> None:
    """Statistics of a batch are over all leaders: the first step, whose logprobs are those of the cold start."""
    found = []
    for data in (1, 2):
        with StandIn(quickstart / "model") as server:
            place = [f'train.run_dir="{tmp_path / str(data)}"', "parallel.tensor=1", "parallel.expert=1"]
            layout = [*place, f"parallel.data={data}", f'algorithm.credit="{credit}"', "train.outer_steps=1"]
            ranks.run(data, run, settings(server, 'algorithm.name="grpo"', "algorithm.clip_low=0.2", *layout))
        found.append(lines(tmp_path / str(data))[0])
    one, two = found
    assert one["loss"] != 0 and one["grad_norm"] > 0
    assert two["loss"] == pytest.approx(one["loss"], rel=1e-4, abs=1e-6)
    assert two["grad_norm"] == pytest.approx(one["grad_norm"], rel=1e-4)


def test_length_costs_reward_and_what_was_cut_is_not_trained_on(
    ranks: RankPool, settings: Settings, quickstart: Path, tmp_path: Path
) -> None:
    shaped = ["rollout.overlong_buffer=4", "rollout.overlong_penalty=0.5", 'rollout.on_truncated="mask"']
    with StandIn(quickstart / "model") as server:
        ranks.run(2, run, settings(server, "train.outer_steps=1"))
        plain = lines(tmp_path / "run")
        more = [*shaped, "train.outer_steps=1", f'train.run_dir="{tmp_path / "shaped"}"']
        ranks.run(2, run, settings(server, *more))
    changed = lines(tmp_path / "shaped")
    assert plain[0]["length/mean"] == changed[0]["length/mean"]
    assert changed[0]["reward/mean"] < plain[0]["reward/mean"]
