"""Traces of chosen outer steps."""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_gspo.config import parse
from megatron_gspo.errors import ConfigError
from tests import oracle
from tests.distributed import steps
from tests.distributed.steps import Case
from tests.pool import RankPool

pytestmark = pytest.mark.distributed


def config_of(run_dir: Path, steps: list[int]) -> Any:
    train = {"run_dir": str(run_dir), "profile_steps": steps, "outer_steps": 3}
    return parse({"model": {"path": "unused"}, "data": {"path": "unused"}, "train": train})


def take_three_steps(case: Case, run_dir: Path) -> None:
    from megatron_gspo.train.clock import Clock
    from megatron_gspo.train.profile import Profiles

    policy, groups = steps.make_policy(case, {})
    plan = steps.uneven_plan(len(case.samples), groups.data_size)
    batches = [steps.pack_samples(case, part, groups.shard) for part in plan[groups.data_rank]]
    profiles = Profiles(config_of(run_dir, [2]), groups)
    for number in range(3):
        with profiles.step(number), Clock()("train"):
            policy.gradients(batches, lambda index, logprobs_T, entropy_T: logprobs_T.sum())
            policy.step(number, 3)


def test_a_step_that_is_asked_for_has_a_trace_of_each_rank_with_its_phases(ranks: RankPool, tmp_path: Path) -> None:
    path = oracle.make_tiny_qwen3_moe(tmp_path / "model", layers=2)
    case = Case(str(path), tuple(oracle.random_samples(seed=3)), (), dtype="float32")
    ranks.run(2, take_three_steps, case, tmp_path / "run")
    found = sorted((tmp_path / "run" / "profile").iterdir())
    assert [file.name for file in found] == ["outer_00002-rank0.json.gz", "outer_00002-rank1.json.gz"]
    for file in found:
        events = json.loads(gzip.decompress(file.read_bytes()))["traceEvents"]
        named = {event.get("name"): event for event in events if event.get("ph") == "X"}
        ranges = [named[name] for name in ("phase: train", "model: forward and backward", "model: optimizer step")]
        train, passes, update = ((event["ts"], event["ts"] + event["dur"]) for event in ranges)
        assert train[0] <= passes[0] < passes[1] <= update[0] < update[1] <= train[1]
        assert "aten::mm" in named or "aten::matmul" in named
    assert not torch.autograd.profiler._is_profiler_enabled


def test_a_step_that_the_run_does_not_have_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"profile_steps = \[2, 4\] are counted from 1 to outer_steps = 3"):
        config_of(tmp_path, [2, 4])
