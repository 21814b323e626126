"""Evaluation on held-out prompts during training, with the engine that training samples from."""

from __future__ import annotations

import asyncio

import numpy as np

from megatron_gspo.algorithm.evaluation import estimates
from megatron_gspo.parallel.exchange import agree, gather_objects
from megatron_gspo.rewards.scoring import guarded
from megatron_gspo.train.assembly import Run
from megatron_gspo.train.collect import get_ready
from megatron_gspo.train.grade import evaluation_sampling, grade


def evaluate(run: Run, weight_version: int) -> dict[str, float]:
    """The metrics ``eval/*`` (docs/metrics.md) of the weights that the servers hold, on every rank. Collective.

    Sampled responses have the same seeds in every evaluation.
    """
    if run.eval_prompts is None:
        return {}
    sampled = estimates(_rewards(run, weight_version, greedy=False))
    metrics = {f"eval/{name}": sampled[name].value for name in ("accuracy", "reward", "rewarded")}
    samples = run.config.eval.samples
    if samples > 1:
        metrics["eval/pass_at_k"] = sampled[f"pass@{samples}"].value
    if run.config.eval.greedy:
        metrics["eval/greedy_accuracy"] = estimates(_rewards(run, weight_version, greedy=True))["accuracy"].value
    return metrics


def _rewards(run: Run, weight_version: int, *, greedy: bool) -> np.ndarray:
    """[P, K] rewards in the order of the held-out prompts, each leader's share drawn and scored by it."""
    assert run.eval_prompts is not None
    error: Exception | None = None
    mine: list[tuple[int, np.ndarray]] = []
    get_ready(run, weight_version)
    size, rank = run.groups.data_size, run.groups.data_rank
    if run.groups.is_leader:
        share = range(rank, len(run.eval_prompts), size)
        before = sum(len(range(other, len(run.eval_prompts), size)) for other in range(rank))
        prompts = [run.eval_prompts.prompts[position] for position in share]
        sampling = evaluation_sampling(run.config, run.tokenizer.stop_ids, seeded=run.seeded, greedy=greedy)
        try:
            with guarded(run.reward):
                answers = grade(run.engine, run.reward, prompts, sampling, weight_version=weight_version, first=before)
                graded = asyncio.run(answers)
            mine = [(position, group.rewards_K) for position, group in zip(share, graded, strict=True)]
        except Exception as caught:
            error = caught
    run.fleet.hear(run.engine)
    agree(error, run.groups.world)
    rewards = dict(pair for part in gather_objects(mine, run.groups.world) for pair in part)
    return np.stack([rewards[position] for position in range(len(run.eval_prompts))])
