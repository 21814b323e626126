"""Responses to held-out prompts, drawn and graded: the one way, for training's evaluation and for ``eval``."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np

from megatron_gspo.config import RunConfig
from megatron_gspo.errors import RewardError
from megatron_gspo.rewards.registry import Reward
from megatron_gspo.rewards.scoring import GroupRewards, score_groups
from megatron_gspo.rollout.engine import EVALUATION, Engine, Progress, Sampling
from megatron_gspo.types import Prompt, Rollout


@dataclass(frozen=True)
class Graded:
    """The K responses to one prompt, with their rewards."""

    prompt: Prompt
    rollouts: tuple[Rollout, ...]
    rewards_K: np.ndarray
    """[K] float64 in the reward's range. A response that the server gave up on, or an empty one, has the bottom of it
    (0; NaN where it has none): it is no answer. NaN for one whose grader failed: it counts nowhere."""
    ungraded_K: tuple[str, ...] = ()
    """K reasons, "" for those that were graded; empty when all were."""
    components_K: tuple[dict[str, float], ...] = ()
    """K tables of named components; empty when no response has one."""

    @property
    def ungraded(self) -> int:
        """Responses whose grader failed."""
        return sum(map(bool, self.ungraded_K))


def evaluation_sampling(
    config: RunConfig, stop_ids: tuple[int, ...], *, seeded: bool, greedy: bool = False
) -> Sampling:
    """How an evaluation's responses are drawn: ``eval.samples`` a prompt at the training temperature, or one argmax."""
    return Sampling(
        group_size=1 if greedy else config.eval.samples,
        temperature=config.rollout.temperature,
        max_tokens=config.rollout.max_response_tokens,
        stop_token_ids=stop_ids,
        seed=config.train.seed if seeded else None,
        outer_step=EVALUATION,
        greedy=greedy,
    )


async def grade(
    engine: Engine,
    reward: Reward,
    prompts: Sequence[Prompt],
    sampling: Sampling,
    *,
    weight_version: int,
    progress: Progress | None = None,
    first: int = 0,
) -> list[Graded]:
    """Draws and scores the responses to each prompt, in the order of ``prompts``. ``first``: as in
    ``Engine.rollout_groups``.

    ``progress`` is called with each prompt's responses as they arrive. All or nothing: raises what the engine and
    ``score_groups`` raise. Truncated responses are scored as they are; ``rollout.on_truncated`` is for training.
    """
    async with engine:
        drawn = await engine.rollout_groups(
            prompts, sampling, weight_version=weight_version, progress=progress, first=first
        )
    return await judge(reward, drawn)


async def judge(reward: Reward, groups: Sequence[Sequence[Rollout]]) -> list[Graded]:
    """Groups of responses with their rewards. Raises what ``score_groups`` raises."""
    scored = await score_groups(reward, [[rollout for rollout in group if is_answer(rollout)] for group in groups])
    if stopped := sum(rewards.stopped for rewards in scored):
        print(f"warning: {stopped} responses took too long to grade and got 0", file=sys.stderr, flush=True)
    answers = sum(len(rewards.rewards_G) for rewards in scored)
    if reasons := [reason for rewards in scored for reason in rewards.ungraded_G if reason]:
        said = f"{len(reasons)} of {answers} responses were not graded, and count nowhere; the first: {reasons[0]}"
        print(f"warning: {said}", file=sys.stderr, flush=True)
    return [_graded(reward, group[0].prompt, group, rewards) for group, rewards in zip(groups, scored, strict=True)]


def _graded(reward: Reward, prompt: Prompt, group: Sequence[Rollout], scored: GroupRewards) -> Graded:
    """A prompt's responses, with what is no answer among them."""
    answers = [i for i, rollout in enumerate(group) if is_answer(rollout)]
    rewards_K = np.full(len(group), reward.worst)
    rewards_K[answers] = scored.rewards_G
    reasons, tables = [""] * len(group), [dict[str, float]() for _ in group]
    for i, reason in zip(answers, scored.ungraded_G, strict=False):
        reasons[i] = reason
    for i, table in zip(answers, scored.components_G, strict=False):
        tables[i] = table
    return Graded(
        prompt,
        tuple(group),
        rewards_K,
        tuple(reasons) if any(reasons) else (),
        tuple(tables) if any(tables) else (),
    )


def check_graded(reward: Reward, rewards_PK: np.ndarray, reasons: Iterable[str]) -> None:
    """Raises RewardError where not one response has a reward, with the first reason: there is nothing to measure."""
    if np.isnan(rewards_PK).all():
        first = next(filter(None, reasons), "every response was empty or given up by the server")
        raise RewardError(f"reward {reward.name!r} graded none of {rewards_PK.size} responses: {first}")


def is_answer(rollout: Rollout) -> bool:
    """Whether there is something to score."""
    return rollout.finish_reason != "abort" and len(rollout.response_ids) > 0
