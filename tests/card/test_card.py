"""Training on a device that is not the host: what a GPU would refuse of it, a CPU refuses here."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from megatron_gspo.config import load
from megatron_gspo.report.recorder import RunRecorder
from megatron_gspo.runs.loop import train
from tests import oracle
from tests.card import CARD, CardPool
from tests.distributed import steps
from tests.gpu import stages
from tests.gpu.test_policy import take_step
from tests.pool import RankPool
from tests.training.conftest import QUICKSTART
from tests.training.stand_in import StandIn

SLOW = pytest.mark.slow_suite
ROOT = Path(__file__).parents[2]


# ------------------------------------------------------------------------------------------------- the device itself


def said(action: Callable[[], Any]) -> str:
    """What it raises, or nothing."""
    try:
        action()
    except (RuntimeError, TypeError) as error:
        return str(error).splitlines()[0]
    return ""


def refusals() -> dict[str, str]:
    host, there = torch.ones(3, 3), torch.ones(3, 3, device=CARD)
    there_row, place = torch.arange(3, device=CARD), torch.tensor([1])
    return {
        "sum": said(lambda: there + host),
        "product": said(lambda: there @ host),
        "index": said(lambda: there[place]),
        "out": said(lambda: torch.add(there, there, out=host)),
        "number written": said(lambda: torch.zeros(()).add_(there.sum())),
        "numpy": said(there.numpy),
        "number": said(lambda: there * torch.tensor(2.0)),
        "copy": said(lambda: host.copy_(there)),
        "index there": said(lambda: there[there_row]),
        "list": said(there.tolist),
    }


def by_chance() -> dict[str, str]:
    """The first product is made before cuBLAS was told, as its library asks once."""
    os.environ.pop("CUBLAS_WORKSPACE_CONFIG", None)
    there = torch.ones(3, 3, device=CARD)
    before = said(lambda: there @ there)
    os.environ["CUBLAS_WORKSPACE_CONFIG"] = ":4096:8"
    torch.use_deterministic_algorithms(True)
    whole = torch.arange(3, device=CARD)
    products = {"before": before, "after": said(lambda: there @ there)}
    return products | {"fractions": said(lambda: there.cumsum(0)), "whole": said(lambda: whole.cumsum(0))}


def test_what_mixes_host_and_card_raises_and_nothing_else_does(cards: CardPool) -> None:
    [found] = cards.run(1, refusals)
    assert found.pop("numpy").startswith("can't convert card:0 device type tensor to numpy")
    refused = {name: text for name, text in found.items() if text}
    assert refused.keys() == {"sum", "product", "index", "out", "number written"}
    assert refused["product"] == "aten::mm: mat2 [3, 3] is on the CPU, and others are on the card"


def test_under_deterministic_algorithms_it_refuses_what_cuda_does(cards: CardPool) -> None:
    [found] = cards.run(1, by_chance)
    assert found["before"] == found["whole"] == ""
    assert "CUBLAS_WORKSPACE_CONFIG was not set in time" in found["after"]
    assert "no deterministic form" in found["fractions"]


# ------------------------------------------------------------------------------------------------------------- steps


@SLOW
def test_a_step_on_the_card_mixes_nothing_and_is_the_cpus(cards: CardPool, tmp_path: Path) -> None:
    """By the code that compares a GPU's with a CPU's."""
    case = replace(steps.straddling_case(str(oracle.make_tiny_qwen3_moe(tmp_path))), exact=False)
    [there], [here] = (pool.run(1, take_step, case) for pool in (cards, RankPool()))
    assert there.step.grad_norms == pytest.approx(here.step.grad_norms, rel=1e-9)
    assert there.step.clipped == here.step.clipped and any(here.step.clipped.values())
    parts = [(part.step.logprobs, part.step.gradients, part.after) for part in (there, here)]
    for mine, theirs in zip(*parts, strict=True):
        assert mine.keys() == theirs.keys() and mine
        for key in mine:
            np.testing.assert_allclose(mine[key], theirs[key], rtol=1e-6, atol=1e-11)


# ------------------------------------------------------------------------------------------------------- whole runs

PPO = (
    *('algorithm.name="ppo"', 'algorithm.credit="gae"', "algorithm.clip_low=0.2", "algorithm.clip_high=0.2"),
    *("critic.lr=1e-3", "critic.normalise=true", "critic.pretraining_steps=1", "algorithm.kl_reward_coef=0.01"),
)
SETTINGS: dict[str, tuple[str, ...]] = {
    "gspo": ("train.noise_floor_every=1", 'sync.verify="first"', "train.deterministic=true"),
    "critic": PPO,
    "reference and recompute": ("algorithm.kl_loss_coef=0.1", 'model.recompute="full"'),
    "adapters": ("lora.rank=4", 'lora.targets=["q_proj","o_proj","experts.down_proj"]'),
    "offload": ("optimizer.offload=true", 'optimizer.state_dtype="bfloat16"', 'model.dtype="bfloat16"'),
    "replay": ('replay.mode="r2"', 'correction.rule="truncate"'),
    "reference kernels": ('model.kernels="reference"', 'model.recompute="selective"'),
    "over http": ('sync.method="tensor"',),
}
LAYOUTS = {
    "tensor ranks": ("parallel.tensor=2", "parallel.expert=2"),
    "stages": ("parallel.pipeline=2",),
    "context ranks": ("parallel.context=2", "parallel.expert=2", 'replay.mode="r2"'),
}
"""On two ranks."""


def settings_of(model: Path, directory: Path, url: str) -> list[str]:
    data = model.parent
    return [
        *(f'model.path="{model}"', f'data.path="{data}/train.jsonl"', f'data.eval_path="{data}/eval.jsonl"'),
        f'reward.function="{ROOT}/tests/training/rewards.py:share_of_even_tokens"',
        *(f'train.run_dir="{directory}/run"', "train.outer_steps=2", "train.prompts_per_step=4"),
        *("train.minibatches=2", "train.tensorboard=false", "train.checkpoint_every=1", "eval.prompts=8"),
        *(f'rollout.servers=["{url}"]', "rollout.max_engine_k3=0", "parallel.tensor=1", "parallel.expert=1"),
        *('sync.method="disk"', f'sync.directory="{directory}"', 'sync.verify="off"'),
    ]


def run(settings: list[str]) -> None:
    """Two outer steps, evaluated and saved, and a third from the checkpoint."""
    again = [*settings, "train.overwrite=false", "train.resume=true", "train.outer_steps=3"]
    for part in (settings, again):
        train(load(QUICKSTART / "gspo.toml", part), RunRecorder)


@pytest.mark.timeout(500)
@pytest.mark.parametrize("kind", ["gspo", *(pytest.param(kind, marks=SLOW) for kind in [*SETTINGS, *LAYOUTS][1:])])
def test_a_run_that_evaluates_saves_resumes_syncs_and_exports_mixes_nothing(
    cards: CardPool, quickstart: Path, tmp_path: Path, kind: str
) -> None:
    with StandIn(quickstart / "model") as server:
        settings = settings_of(quickstart / "model", tmp_path, server.url)
        cards.run(2 if kind in LAYOUTS else 1, run, [*settings, *(SETTINGS | LAYOUTS)[kind]])
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    norms = [line["grad_norm"] for line in lines if "grad_norm" in line]
    assert len(norms) == 6 and max(norms) > 0
    assert (tmp_path / "run" / "hf" / "config.json").exists()


def staged(name: str) -> dict[str, Any]:
    stages.prepare(name)
    return stages.STAGES[name](stages.SMALL)


@SLOW
@pytest.mark.parametrize("name", ["imports", "layers", "noise", "resume"])
def test_a_stage_for_a_gpu_mixes_nothing(cards: CardPool, name: str) -> None:
    [found] = cards.run(1, staged, name)
    assert found and found.get("largest difference", 0.0) == 0.0
