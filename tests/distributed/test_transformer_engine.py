"""With Transformer Engine installed, Megatron-Core takes other branches; training takes its attention, and no more.

A stand-in with the real one's signatures and absences stands where it would be (``tests/transformer_engine.py``). The
real kernel runs in tests/gpu.
"""

from __future__ import annotations

import multiprocessing as mp
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import pytest
import torch

from tests import oracle
from tests.distributed import steps
from tests.distributed.steps import Case, Step, as_array
from tests.pool import RankPool

pytestmark = pytest.mark.distributed


def begin(store: str) -> None:
    """A process with the stand-in, of one rank, whose attention chooses as on a GPU."""
    from tests import transformer_engine

    transformer_engine.install()
    import torch.distributed as dist

    from megatron_gspo import platforms
    from megatron_gspo.megatron import cpu

    torch.set_num_threads(1)
    cpu.install()
    dist.init_process_group("gloo", store=dist.FileStore(store, 1), rank=0, world_size=1)
    platforms.CPU = replace(platforms.CPU, half_kernels=True, deterministic=False)


@pytest.fixture(scope="module")
def with_it(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[..., Any]]:
    """Calls a function of this module where Transformer Engine is installed."""
    store = tmp_path_factory.mktemp("store") / "store"
    with ProcessPoolExecutor(1, mp.get_context("spawn"), initializer=begin, initargs=(str(store),)) as pool:
        yield lambda function, *arguments: pool.submit(function, *arguments).result(timeout=300)


@pytest.fixture(scope="module")
def case(tmp_path_factory: pytest.TempPathFactory) -> Case:
    path = oracle.make_tiny_qwen3_moe(tmp_path_factory.mktemp("moe"), layers=2)
    return replace(
        steps.straddling_case(str(path)), dtype="bfloat16", exact=False, updates=1, clip_low=0.9, clip_high=9.0
    )


def step_with_it(case: Case, plan: steps.Plan) -> tuple[Step, int]:
    """A step, and how often the stand-in's attention ran."""
    from tests.transformer_engine import DotProductAttention

    calls = 0
    forward = DotProductAttention.forward

    def counted(self: Any, *args: Any, **kwargs: Any) -> torch.Tensor:
        nonlocal calls
        calls += 1
        return forward(self, *args, **kwargs)

    with mock.patch.object(DotProductAttention, "forward", counted):
        return steps.run_step(case, {}, plan, None), calls


@pytest.mark.parametrize("recompute", ["off", "full"])
def test_a_step_takes_its_attention_and_is_the_step_without_it(
    ranks: RankPool, with_it: Callable[..., Any], case: Case, recompute: str
) -> None:
    asked = replace(case, recompute=recompute)
    plan = steps.filled_up(steps.uneven_plan(len(case.samples), 1), {})
    step, calls = with_it(step_with_it, asked, plan)
    assert calls >= 2 * len(plan[0])
    without = steps.train(ranks, asked, plan=plan)
    apart = np.concatenate([step.logprobs[key] - without.logprobs[key] for key in without.logprobs])
    assert np.sqrt(np.square(apart).mean()) < 0.1, "more than bfloat16 rounds"
    assert step.gradients.keys() == without.gradients.keys()
    whole, difference = (
        np.sqrt(sum(float(np.square(of(name)).sum()) for name in without.gradients))
        for of in (without.gradients.__getitem__, lambda name: step.gradients[name] - without.gradients[name])
    )
    assert difference < 0.15 * whole
    assert step.grad_norms == pytest.approx(without.grad_norms, rel=0.05)


def save_and_load(case: Case, directory: Path) -> dict[str, np.ndarray]:
    """Saves what it has just made from the seed, loses it, and loads it again."""
    from megatron_gspo.megatron.checkpoint import load_checkpoint, save_checkpoint

    policy, _ = steps.make_policy(case, {})
    save_checkpoint({"policy": policy}, directory, {"outer_step": 1})
    before = {name: as_array(weight).copy() for name, weight in policy.weights()}
    for chunk in policy.chunks:
        for parameter in chunk.parameters():
            parameter.data.zero_()
    assert load_checkpoint({"policy": policy}, directory) == {"outer_step": 1}
    assert_equal({name: as_array(weight) for name, weight in policy.weights()}, before)
    return before


def load(case: Case, directory: Path) -> dict[str, np.ndarray]:
    from megatron_gspo.megatron.checkpoint import load_checkpoint

    policy, _ = steps.make_policy(case, {})
    load_checkpoint({"policy": policy}, directory)
    return {name: as_array(weight).copy() for name, weight in policy.weights()}


def assert_equal(actual: dict[str, np.ndarray], expected: dict[str, np.ndarray]) -> None:
    assert actual.keys() == expected.keys()
    for name, values in expected.items():
        assert np.array_equal(actual[name], values), name


def test_checkpoints_go_to_a_machine_without_it_and_back(
    ranks: RankPool, with_it: Callable[..., Any], case: Case, tmp_path: Path
) -> None:
    saved = with_it(save_and_load, case, tmp_path / "with")
    [loaded] = ranks.run(1, load, case, tmp_path / "with")
    assert_equal(loaded, saved)
    [saved] = ranks.run(1, save_and_load, case, tmp_path / "without")
    assert_equal(with_it(load, case, tmp_path / "without"), saved)
