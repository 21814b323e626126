"""Rewards on several ranks: each has its own grader, and what was stopped anywhere is counted everywhere."""

from __future__ import annotations

from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch.distributed as dist

from megatron_gspo.algorithm.base import make_algorithm
from megatron_gspo.config import RewardConfig, RolloutConfig
from megatron_gspo.rewards import Reward, Stopped, resolve_reward
from megatron_gspo.rollout.survivors import Dropped
from megatron_gspo.train.collect import score, summarise
from megatron_gspo.types import Prompt, Rollout
from tests.pool import RankPool

pytestmark = pytest.mark.distributed

TEXTS = [r"\boxed{\sqrt{2}\cdot\sqrt{882}}", "#### 43", "time", "#### 42"]


def graded(cases: Sequence[tuple[int, ...]]) -> list[tuple[list[float], dict[str, float]]]:
    """For each case this rank's rewards, and the metrics of all ranks; on the ranks that it names, the grading of the
    response "time" is stopped."""
    rank = dist.get_rank()
    gsm8k = resolve_reward(RewardConfig(function="gsm8k")).function
    prompt = Prompt("p", "?", (1,), "#### 42")
    group = [
        Rollout(prompt, i, np.ones(2, np.int32), np.zeros(2, np.float32), "stop", (0,), text)
        for i, text in enumerate(TEXTS)
    ]
    results = []
    for stopped_on in cases:

        def reward(prompt: Prompt, response: Rollout, stop: bool = rank in stopped_on) -> Any:
            return Stopped() if response.text == "time" and stop else gsm8k(prompt, response)

        grader = Reward("gsm8k", reward)
        run: Any = SimpleNamespace(
            reward=grader,
            reward_of=lambda prompt, grader=grader: grader,
            source_rewards={},
            groups=SimpleNamespace(world=dist.group.WORLD),
            fleet=SimpleNamespace(metrics=dict),
            config=SimpleNamespace(rollout=RolloutConfig(), algorithm=make_algorithm("gspo")),
        )
        collected = score(run, {rank: group}, Dropped())
        results.append((collected.groups[rank].rewards_G.tolist(), summarise(run, collected)))
    return results


def test_every_rank_grades_and_knows_how_many_gradings_were_stopped(ranks: RankPool) -> None:
    for results in ranks.run(2, graded, [(), (1,), (0, 1)]):
        assert [rewards for rewards, _ in results] == [[1, 0, 0, 1]] * 3
        assert [metrics["reward/grader_timeouts"] for _, metrics in results] == [0, 1, 2]
        assert [metrics["reward/mean"] for _, metrics in results] == [0.5] * 3
