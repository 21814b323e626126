"""Responses drawn and judged side by side, each written down as it comes, and taken up where it was left."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from typing import Any

import numpy as np

from megatron_gspo.report.evaluation_files import EvaluationDirectory, restored
from megatron_gspo.rewards.registry import Reward
from megatron_gspo.rollout.engine import Engine, Progress, Sampling
from megatron_gspo.rollout.tasks import gather
from megatron_gspo.train.grade import Graded, check_graded, judge
from megatron_gspo.types import Prompt, Rollout

Group = Sequence[Rollout]


async def answer(
    engine: Engine,
    reward: Reward,
    prompts: Sequence[Prompt],
    sampling: Sampling,
    out: EvaluationDirectory,
    *,
    progress: Progress,
) -> list[Graded]:
    """The responses to each prompt with their rewards, in the order of ``prompts``; what ``out`` has from before is not
    drawn, and not judged, again. ``progress`` hears of each prompt's responses, those from before too.

    Responses are judged while others are drawn, as many as have arrived at a time. Raises what the engine and
    ``score_groups`` raise, with all that had arrived written down.
    """
    arrived: asyncio.Queue[Group | None] = asyncio.Queue()
    drawn: dict[str, Group] = {}
    graded: dict[str, Graded] = {}
    for prompt in prompts:
        if (group := restored(out.before, prompt, sampling.group_size)) is not None:
            drawn[prompt.id] = group
            progress(group)
            if prompt.id in out.before.verdicts:
                graded[prompt.id] = _judged_before(prompt, group, out.before.verdicts[prompt.id])
            else:
                arrived.put_nowait(group)

    def take(group: Group) -> None:
        out.drawn(group)
        drawn[group[0].prompt.id] = group
        arrived.put_nowait(group)
        progress(group)

    async def draw() -> None:
        missing = [prompt for prompt in prompts if prompt.id not in drawn]
        async with engine:
            await engine.rollout_groups(missing, sampling, weight_version=0, progress=take)
        arrived.put_nowait(None)

    async def judge_all() -> None:
        while (groups := await _waiting(arrived)) is not None:
            for one in await judge(reward, groups):
                graded[one.prompt.id] = one
                out.judged(one)

    await gather([draw(), judge_all()])
    found = [graded[prompt.id] for prompt in prompts]
    check_graded(
        reward, np.stack([group.rewards_K for group in found]), (r for group in found for r in group.ungraded_K)
    )
    return found


def _judged_before(prompt: Prompt, group: Group, verdicts: Sequence[dict[str, Any]]) -> Graded:
    """As ``judge`` gave it."""
    rewards = [np.nan if verdict["reward"] is None else verdict["reward"] for verdict in verdicts]
    components = tuple(verdict.get("components", {}) for verdict in verdicts)
    rewards_K = np.asarray(rewards, dtype=np.float64)
    return Graded(prompt, tuple(group), rewards_K, components_K=components if any(components) else ())


async def _waiting(arrived: asyncio.Queue[Group | None]) -> list[Group] | None:
    """What has arrived, at least one group; None when nothing more will."""
    first = await arrived.get()
    groups = [] if first is None else [first]
    while first is not None and not arrived.empty():
        following = arrived.get_nowait()
        if following is None:
            arrived.put_nowait(None)
            break
        groups.append(following)
    return groups or None
