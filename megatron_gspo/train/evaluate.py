"""Evaluation on held-out prompts during training, with the engine that training samples from."""

from __future__ import annotations

import asyncio

import numpy as np

from megatron_gspo.algorithm.evaluation import estimates
from megatron_gspo.parallel.exchange import agree, gather_objects
from megatron_gspo.rewards.scoring import guarded
from megatron_gspo.train.assembly import Run
from megatron_gspo.train.collect import get_ready
from megatron_gspo.train.grade import check_graded, evaluation_sampling, grade


def evaluate(run: Run, weight_version: int) -> dict[str, float]:
    """The metrics ``eval/*`` (docs/metrics.md) of the weights that the servers hold, on every rank. Collective.

    Sampled responses have the same seeds in every evaluation.
    """
    if run.eval_prompts is None:
        return {}
    span, samples = run.reward.range, run.config.eval.samples
    sampled = estimates(_rewards(run, weight_version, greedy=False), span)
    names = ("accuracy", "reward", "rewarded")  # a reward without a top has no accuracy
    metrics = {f"eval/{name}": sampled[name].value for name in names if name in sampled}
    if samples > 1 and f"pass@{samples}" in sampled:
        metrics["eval/pass_at_k"] = sampled[f"pass@{samples}"].value
    if run.config.eval.greedy and "accuracy" in sampled:
        greedy = estimates(_rewards(run, weight_version, greedy=True), span)
        metrics["eval/greedy_accuracy"] = greedy["accuracy"].value
    return metrics


def _rewards(run: Run, weight_version: int, *, greedy: bool) -> np.ndarray:
    """[P, K] rewards in the order of the held-out prompts, each leader's share drawn and scored by it."""
    assert run.eval_prompts is not None
    error: Exception | None = None
    mine: list[tuple[int, np.ndarray, tuple[str, ...]]] = []
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
            mine = [(at, group.rewards_K, group.ungraded_K) for at, group in zip(share, graded, strict=True)]
        except Exception as caught:
            error = caught
    run.fleet.hear(run.engine)
    agree(error, run.groups.world)
    rows = sorted((row for part in gather_objects(mine, run.groups.world) for row in part), key=lambda row: row[0])
    rewards_PK = np.stack([rewards_K for _, rewards_K, _ in rows])
    check_graded(run.reward, rewards_PK, (reason for _, _, reasons in rows for reason in reasons))
    return rewards_PK
