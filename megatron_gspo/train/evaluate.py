"""Evaluation on held-out prompts, with the engine that training samples from."""

from __future__ import annotations

import asyncio

import numpy as np

from megatron_gspo.parallel.exchange import agree, gather_objects
from megatron_gspo.rewards.scoring import score_groups
from megatron_gspo.train.context import Run


def evaluate(run: Run, weight_version: int) -> dict[str, float]:
    """Accuracy on the held-out prompts, one response each; on every rank. Collective.

    ``eval/accuracy`` is the share of responses with reward 1 at the training temperature, ``eval/reward`` their mean
    reward, ``eval/rewarded`` the share with any; ``eval/greedy_accuracy`` is the accuracy at temperature 0. Sampled
    responses have the same seeds in every evaluation.
    """
    if run.eval_prompts is None:
        return {}
    rewards = _rewards(run, weight_version, greedy=False)
    metrics = {
        "eval/accuracy": float((rewards == 1.0).mean()),
        "eval/reward": float(rewards.mean()),
        "eval/rewarded": float((rewards > 0.0).mean()),
    }
    if run.config.eval.greedy:
        metrics["eval/greedy_accuracy"] = float((_rewards(run, weight_version, greedy=True) == 1.0).mean())
    return metrics


def _rewards(run: Run, weight_version: int, *, greedy: bool) -> np.ndarray:
    """Rewards over all held-out prompts, each leader's share drawn and scored by it."""
    error: Exception | None = None
    mine: list[float] = []
    assert run.eval_prompts is not None
    if run.groups.is_leader:
        try:
            mine = asyncio.run(_draw_and_score(run, weight_version, greedy))
        except Exception as caught:
            error = caught
    agree(error, run.groups.world)
    return np.array([reward for part in gather_objects(mine, run.groups.world) for reward in part])


async def _draw_and_score(run: Run, weight_version: int, greedy: bool) -> list[float]:
    assert run.eval_prompts is not None
    prompts = run.eval_prompts.prompts[run.groups.data_rank :: run.groups.data_size]
    sampling = run.sampling(-1, group_size=1, greedy=greedy)
    async with run.engine as engine:
        responses = await engine.rollout_groups(prompts, sampling, weight_version=weight_version)
    scored = await score_groups(run.reward, responses)
    return [float(group.rewards_G[0]) for group in scored]
