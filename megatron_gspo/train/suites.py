"""Suites during training: asked of the servers' current weights, each leader its share of the problems."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass

import numpy as np

from megatron_gspo.parallel.exchange import agree, gather_objects
from megatron_gspo.rewards.scoring import guarded
from megatron_gspo.suites.task import Answers, Task, figures, final_answers
from megatron_gspo.train.assembly import Run
from megatron_gspo.train.collect import get_ready
from megatron_gspo.train.grade import Graded, check_graded, grade


@dataclass(frozen=True)
class _Part:
    """What the ranks tell each other of a problem."""

    rewards_K: np.ndarray
    answers: list[str | None]
    truncated: float
    """Share of its responses."""
    ungraded: tuple[str, ...]


def evaluate_suites(run: Run, weight_version: int) -> dict[str, float]:
    """The metrics ``eval/SUITE/*`` (docs/metrics.md) of the weights that the servers hold, on every rank. Collective.

    Sampled responses have the same seeds in every evaluation, and those of ``megatron-gspo eval --suite``.
    """
    metrics: dict[str, float] = {}
    for task in run.suites:
        found = _figures(run, task, weight_version)
        metrics |= {f"eval/{task.name}/{name}": value for name, value in found.items()}
    return metrics


def _figures(run: Run, task: Task, weight_version: int) -> dict[str, float]:
    parts = _ask(run, task, weight_version)
    rewards_PK = np.stack([part.rewards_K for part in parts])
    check_graded(task.reward, rewards_PK, (reason for part in parts for reason in part.ungraded))
    answers: Answers | None = [part.answers for part in parts] if task.suite.answer else None
    found = figures(task, rewards_PK, answers)
    samples, shares = rewards_PK.shape[1], found["estimates"]
    metrics = {
        "accuracy": shares.get("accuracy"),
        "pass_at_k": shares.get(f"pass@{samples}") if samples > 1 else None,
        "maj_at_k": shares.get(f"maj@{samples}"),
        **found["measured"],
    }
    values = {name: estimate["value"] for name, estimate in metrics.items() if estimate is not None}
    return values | {"truncated": float(np.mean([part.truncated for part in parts]))}


def _ask(run: Run, task: Task, weight_version: int) -> list[_Part]:
    """Each problem's, in order; each leader's share drawn and scored by it."""
    error: Exception | None = None
    mine: list[tuple[int, _Part]] = []
    get_ready(run, weight_version)
    size, rank, count = run.groups.data_size, run.groups.data_rank, len(task.prompts)
    if run.groups.is_leader:
        share = range(rank, count, size)
        before = sum(len(range(other, count, size)) for other in range(rank))
        prompts = [task.prompts[position] for position in share]
        try:
            with guarded(task.reward):
                graded = asyncio.run(
                    grade(run.engine, task.reward, prompts, task.sampling, weight_version=weight_version, first=before)
                )
            mine = [(position, _kept(task, group)) for position, group in zip(share, graded, strict=True)]
        except Exception as caught:
            error = caught
    run.fleet.hear(run.engine)
    agree(error, run.groups.world)
    found = dict(pair for part in gather_objects(mine, run.groups.world) for pair in part)
    return [found[position] for position in range(count)]


def _kept(task: Task, group: Graded) -> _Part:
    texts = [rollout.text for rollout in group.rollouts]
    answers = final_answers(task, [group.prompt], [texts]) or [[]]
    truncated = float(np.mean([rollout.truncated for rollout in group.rollouts]))
    return _Part(group.rewards_K, answers[0], truncated, group.ungraded_K)
