"""What is not finite is named (prompt, response, layer, parameter), and no bit of weights and moments moves."""

from __future__ import annotations

import contextlib
import json
import re
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch

from megatron_gspo.config import load
from megatron_gspo.errors import NonFiniteError
from megatron_gspo.megatron import checkpoint_files
from megatron_gspo.report.recorder import RunRecorder
from megatron_gspo.runs.loop import train
from megatron_gspo.train import step
from tests.pool import RankPool
from tests.training.conftest import QUICKSTART
from tests.training.stand_in import StandIn

pytestmark = pytest.mark.timeout(500)
STRUCK = 1
"""The outer step, counted from 0."""


@contextlib.contextmanager
def bad_output(run: Any) -> Iterator[None]:
    """The MLP of layer 1 gives a NaN."""

    def spoil(module: object, inputs: object, output: Any) -> Any:
        return (output[0] * float("nan"), *output[1:])

    with run.policy.chunks[0].decoder.layers[1].mlp.register_forward_hook(spoil):
        yield


@contextlib.contextmanager
def bad_weight(run: Any) -> Iterator[None]:
    weight = run.policy.chunks[0].decoder.layers[1].self_attention.linear_proj.weight
    before = weight.detach().clone()
    with torch.no_grad():
        weight[0, 0] = float("inf")
    yield
    with torch.no_grad():
        weight.copy_(before)


@contextlib.contextmanager
def bad_gradient(run: Any) -> Iterator[None]:
    optimizer, take = run.policy.optimizer, run.policy.optimizer.step

    def spoiled(lr: float) -> float:
        run.policy.chunks[0].decoder.layers[0].self_attention.linear_proj.weight.main_grad[0, 0] = float("nan")
        return take(lr)

    with mock.patch.object(optimizer, "step", spoiled):
        yield


FAULTS = {"output": bad_output, "weight": bad_weight, "gradient": bad_gradient}
SAID = {
    "output": "a pi_theta logprob is not finite; the first output that is not finite is that of layer 1's MLP",
    "weight": "a pi_theta logprob is not finite; the weights of model.layers.1.self_attn.o_proj.weight are not finite",
    "gradient": "no step was taken; the weights are as they were; "
    "the gradients of model.layers.0.self_attn.o_proj.weight are not finite",
}


def run_with(settings: list[str], kind: str) -> str:
    """A run whose second outer step has the fault while it trains; how it ended."""
    warnings.simplefilter("ignore")
    whole = step.train_minibatches

    def train_minibatches(run: Any, minibatches: Any, number: int, *args: Any, **more: Any) -> Any:
        with FAULTS[kind](run) if number == STRUCK else contextlib.nullcontext():
            return whole(run, minibatches, number, *args, **more)

    with mock.patch.object(step, "train_minibatches", train_minibatches):
        try:
            train(load(QUICKSTART / "gspo.toml", settings), RunRecorder)
        except NonFiniteError as error:
            return str(error)
    return "finished"


@pytest.fixture
def settings(overrides: list[str], tmp_path: Path) -> list[str]:
    own = ['sync.method="disk"', f'sync.directory="{tmp_path}"', "eval.every=0", "train.save_hf=false"]
    unchecked = ['sync.verify="off"', "rollout.max_engine_k3=0", "train.noise_floor_every=0"]
    return [*overrides, *own, *unchecked, "train.outer_steps=3", "train.checkpoint_every=1", "train.keep_last=9"]


@pytest.mark.parametrize("kind", FAULTS)
def test_a_run_fails_with_the_prompt_and_the_culprit_named(
    ranks: RankPool, settings: list[str], quickstart: Path, kind: str
) -> None:
    with StandIn(quickstart / "model") as server:
        (said,) = set(ranks.run(2, run_with, [*settings, f'rollout.servers=["{server.url}"]'], kind))
    assert said.startswith("outer step 2: ") and said.endswith(SAID[kind])
    if kind != "gradient":
        assert re.match(r"outer step 2: prompt \d of this outer step \(\S+-\d+\), response \d: ", said)


def states(run: Path, outer_steps: int) -> dict[str, str]:
    """Hashes of weights, master weights and moments."""
    header = checkpoint_files.read_header(run / "checkpoints" / f"outer_{outer_steps:05d}")
    return {entry["name"]: entry["sha256"] for entry in header["files"] if entry["name"].endswith(".distcp")}


@pytest.mark.parametrize("kind", ["output", "gradient"])
def test_a_skipped_step_leaves_weights_and_moments_as_they_were_to_the_bit(
    ranks: RankPool, settings: list[str], quickstart: Path, tmp_path: Path, kind: str
) -> None:
    with StandIn(quickstart / "model") as server:
        skip = [*settings, f'rollout.servers=["{server.url}"]', 'train.on_non_finite="skip"']
        assert set(ranks.run(2, run_with, skip, kind)) == {"finished"}
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert [(line["step"], line["step/non_finite"]) for line in lines] == [
        (0, 0.0), (1, 0.0), (2, 1.0), (3, 1.0), (4, 0.0), (5, 0.0),
    ]  # fmt: skip
    assert "grad_norm" not in lines[2] and lines[4]["grad_norm"] > 0
    assert states(tmp_path / "run", 1) == states(tmp_path / "run", 2) != states(tmp_path / "run", 3)
