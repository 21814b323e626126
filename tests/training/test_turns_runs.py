"""Whole runs that take turns with their servers: the same numbers as apart, in the order of test_turns.py."""

from __future__ import annotations

import itertools
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from megatron_gspo.calls import call
from megatron_gspo.config import RunConfig, load
from megatron_gspo.report.recorder import RunRecorder
from megatron_gspo.runs.loop import train
from tests.pool import RankPool
from tests.training.conftest import QUICKSTART, MakeConfig
from tests.training.sleeper import Sleeper
from tests.training.stand_in import StandIn
from tests.training.test_critic_runs import PPO
from tests.training.test_turns import PUSH, SERVE, SLEEP, WAKE, orders

pytestmark = pytest.mark.timeout(600)
COLOCATED = 'placement.mode="colocated"'
ONE_RANK = ("parallel.tensor=1", "parallel.expert=1", "eval.prompts=4", "eval.every=1", "train.noise_floor_every=0")
UNCHECKED = ('sync.method="tensor"', 'sync.verify="off"', "rollout.max_engine_k3=0")
"""A stand-in draws from no model, and has no weights to hash."""


def run(config: RunConfig) -> None:
    train(config, RunRecorder)


def numbers(directory: Path, *, engine_gap: bool = True) -> list[dict[str, Any]]:
    """Every line of metrics, without what depends on the clock; without ``engine_gap`` also without what depends on
    which requests a real server has put into one batch, the last bit of its logprobs."""
    lines = [json.loads(line) for line in (directory / "metrics.jsonl").read_text().splitlines()]
    left_out = ("time/", "tokens_per_s", *(() if engine_gap else ("kl/engine",)))
    return [{name: value for name, value in line.items() if not name.startswith(left_out)} for line in lines]


def tensors(directory: Path) -> dict[str, torch.Tensor]:
    files = sorted(directory.glob("*hf/*.safetensors"))
    return {f"{file.parent.name} {name}": tensor for file in files for name, tensor in load_file(file).items()}


def assert_equal(one: Path, other: Path, *, engine_gap: bool = True) -> None:
    assert numbers(one, engine_gap=engine_gap) == numbers(other, engine_gap=engine_gap) != []
    first, second = tensors(one), tensors(other)
    assert first.keys() == second.keys() and first
    assert [name for name, tensor in first.items() if not torch.equal(tensor, second[name])] == []


def placement(directory: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((directory / "manifest.json").read_text())["placement"]
    return found


def test_turns_with_a_real_server_change_no_bit_and_do_not_kill_it(
    ranks: RankPool, make_config: MakeConfig, tmp_path: Path
) -> None:
    """A CPU server gives no memory back, and dies of a second resume or of a release while it is busy."""
    more = ("algorithm.kl_loss_coef=0.01", "eval.every=1", "eval.prompts=4", "optimizer.lr=3e-3")
    apart, turns = (
        make_config(*more, f'placement.mode="{mode}"', f'train.run_dir="{tmp_path}/{mode}"')
        for mode in ("apart", "colocated")
    )
    for config in (apart, turns):
        ranks.run(2, run, config)
        assert call(f"{config.rollout.servers[0]}/health_generate", timeout_s=60).status == 200
    assert_equal(tmp_path / "apart", tmp_path / "colocated", engine_gap=False)
    assert placement(tmp_path / "apart")["mode"] == "apart"
    assert placement(tmp_path / "colocated") == {
        "mode": "colocated",
        "why": 'placement.mode = "colocated"',
        "server_cards": [],
    }


def folded(calls: Sequence[str]) -> list[str]:
    """Whatever the number of buckets and requests."""
    return [path for path, _ in itertools.groupby(calls)]


def test_a_run_with_a_critic_keeps_the_order_and_resumes_bit_for_bit_from_states_that_were_parked(
    ranks: RankPool, overrides: list[str], quickstart: Path, tmp_path: Path
) -> None:
    def settings(server: StandIn, name: str, *more: str) -> RunConfig:
        own = (f'rollout.servers=["{server.url}"]', f'train.run_dir="{tmp_path}/{name}"', "train.checkpoint_every=1")
        return load(QUICKSTART / "gspo.toml", [*overrides, *PPO, *ONE_RANK, *UNCHECKED, *own, *more])

    with StandIn(quickstart / "model") as server:
        ranks.run(1, run, settings(server, "apart"))
    with Sleeper(quickstart / "model") as server:
        ranks.run(1, run, settings(server, "turns", COLOCATED))
        assert server.wrongs == []
        whole = folded(orders(server))
    with Sleeper(quickstart / "model") as server:
        ranks.run(1, run, settings(server, "parts", COLOCATED, "train.outer_steps=1"))
        resume = ("train.overwrite=false", "train.resume=true")
        ranks.run(1, run, settings(server, "parts", COLOCATED, *resume))
        assert server.wrongs == []
    turn = folded([*SLEEP, *WAKE, *PUSH, *SERVE, "/generate"])
    assert whole == turn * 3, "before the first responses, and in each of two steps; the last are an evaluation's"
    assert_equal(tmp_path / "apart", tmp_path / "turns")
    assert_equal(tmp_path / "turns", tmp_path / "parts")
