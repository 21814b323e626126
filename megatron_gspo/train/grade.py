"""Responses to held-out prompts, drawn and graded: the one way, for training's evaluation and for ``eval``."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from megatron_gspo.config import RunConfig
from megatron_gspo.rewards.registry import Reward
from megatron_gspo.rewards.scoring import score_groups
from megatron_gspo.rollout.engine import Engine, Progress, Sampling
from megatron_gspo.types import Prompt, Rollout

EVALUATION = -1
"""The outer step that evaluation's seeds are made from: the same in every evaluation, and none of training's."""


@dataclass(frozen=True)
class Graded:
    """The K responses to one prompt, with their rewards."""

    prompt: Prompt
    rollouts: tuple[Rollout, ...]
    rewards_K: np.ndarray
    """[K] float64 in [0, 1]. A response that the server gave up on, or an empty one, has 0: it is no answer."""


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
    scored = await score_groups(reward, [[rollout for rollout in group if is_answer(rollout)] for group in drawn])
    if stopped := sum(rewards.stopped for rewards in scored):
        print(f"warning: {stopped} responses took too long to grade and got 0", file=sys.stderr, flush=True)
    graded = []
    for prompt, group, rewards in zip(prompts, drawn, scored, strict=True):
        rewards_K = np.zeros(len(group))
        rewards_K[[is_answer(rollout) for rollout in group]] = rewards.rewards_G
        graded.append(Graded(prompt, tuple(group), rewards_K))
    return graded


def is_answer(rollout: Rollout) -> bool:
    """Whether there is something to score."""
    return rollout.finish_reason != "abort" and len(rollout.response_ids) > 0
