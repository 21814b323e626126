"""Runs with adapters against a real server: what it is sent, what it then computes with, and what is left behind."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from safetensors.torch import load_file

from megatron_gspo.config import RunConfig
from megatron_gspo.sync.base import BucketSync
from tests.pool import RankPool
from tests.training.conftest import MakeConfig
from tests.training.test_runs import responses_of, steps_of, train, weights_of

SLOW = pytest.mark.slow_suite
ADAPTED = ("lora.rank=4", 'lora.targets=["q_proj","o_proj","experts.down_proj"]', "optimizer.lr=3e-2")


@contextmanager
def pushes_noted(file: Path) -> Iterator[None]:
    """The first rank writes a line for each push: how many names it had to have."""
    complete = BucketSync._complete

    def noting(self: Any, place: str, version: int, sent: Any, expected: frozenset[str]) -> str:
        with file.open("a") as lines:
            lines.write(json.dumps([version, len(expected), len(self.expected_names)]) + "\n")
        return complete(self, place, version, sent, expected)

    with mock.patch.object(BucketSync, "_complete", noting):
        yield


def noted_train(config: RunConfig, file: Path) -> None:
    with pushes_noted(file):
        train(config)


@pytest.mark.parametrize("method", ["tensor", *(pytest.param(each, marks=SLOW) for each in ("disk", "distributed"))])
def test_a_server_that_gets_what_adapters_change_computes_as_the_trainer_does(
    ranks: RankPool, make_config: MakeConfig, tmp_path: Path, method: str
) -> None:
    config = make_config(*ADAPTED, f'sync.method="{method}"', "algorithm.kl_loss_coef=0.1")
    ranks.run(2, noted_train, config, tmp_path / "pushes")
    lines = steps_of(config)
    assert lines[0]["kl/ref_k3"] == 0.0, "B is zero, and the reference is the policy without adapters"
    assert lines[2]["kl/ref_k3"] > 1e-9
    assert all(line["kl/engine_k3"] < 1e-9 for line in lines), "the second step's responses are by merged weights"
    pushes = [json.loads(line) for line in (tmp_path / "pushes").read_text().splitlines()]
    (_, first, all_names), *later = pushes
    assert first == all_names and [version for version, *_ in pushes] == [0, 1, 2]
    merged, base = weights_of(config), load_file(Path(config.model.path) / "model.safetensors")
    moved = {name for name in merged if not torch.equal(merged[name], base[name])}
    ends = ("q_proj.weight", "o_proj.weight", "down_proj.weight")
    adapted = {name for name in merged if name.endswith(ends)}
    assert moved and moved <= adapted
    assert {count for _, count, _ in later} == {len(adapted)} and len(adapted) < 0.5 * all_names
    manifest = json.loads((Path(config.train.run_dir) / "manifest.json").read_text())
    stored = load_file(Path(config.train.run_dir) / "adapter" / "adapter_model.safetensors")
    assert manifest["lora"]["parameters"] == sum(tensor.numel() for tensor in stored.values())


def test_a_run_with_adapters_that_was_stopped_and_resumed_is_the_one_that_was_not(
    ranks: RankPool, make_config: MakeConfig, tmp_path: Path
) -> None:
    whole, half = (make_config(*ADAPTED, f'train.run_dir="{tmp_path}/{name}"') for name in ("whole", "half"))
    stopped = half.model_copy(update={"train": half.train.model_copy(update={"outer_steps": 1})})
    resumed = half.model_copy(update={"train": half.train.model_copy(update={"resume": True, "overwrite": False})})
    for config in (whole, stopped, resumed):
        ranks.run(2, train, config)
    assert [line["response"] for line in responses_of(whole)] == [line["response"] for line in responses_of(half)]
    one, two = weights_of(whole), weights_of(half)
    assert one.keys() == two.keys() and all(torch.equal(one[name], two[name]) for name in one)


def test_adapters_of_one_run_are_where_another_starts(ranks: RankPool, make_config: MakeConfig, tmp_path: Path) -> None:
    first = make_config(*ADAPTED, f'train.run_dir="{tmp_path}/first"')
    ranks.run(2, train, first)
    then = make_config(
        *ADAPTED,
        f'train.run_dir="{tmp_path}/then"',
        f'lora.path="{tmp_path}/first/adapter"',
        "train.outer_steps=1",
        "optimizer.lr=1e-12",
    )
    ranks.run(2, train, then)
    one, two = weights_of(first), weights_of(then)
    assert max(float((one[name] - two[name]).abs().max()) for name in one) < 1e-6
