"""Synthetic but realistic runs for the tests of ``report``, written through RunDirectory itself."""

from __future__ import annotations

import math
import random
from pathlib import Path
from typing import Any

from megatron_gspo.config import RunConfig, parse
from megatron_gspo.report.manifest import describe
from megatron_gspo.report.rundir import RunDirectory, initial_evaluation
from megatron_gspo.types import RolloutRecord, StepReport


def make_config(run_dir: Path, **sections: dict[str, Any]) -> RunConfig:
    tree: dict[str, Any] = {
        "model": {"path": "checkpoints/tiny-qwen3-moe"},
        "data": {"path": "train.jsonl", "eval_path": "eval.jsonl"},
        "train": {"run_dir": str(run_dir), "outer_steps": 12, "minibatches": 4, "prompts_per_step": 16},
        "algorithm": {"name": "gspo", "clip_low": 1e-3, "clip_high": 1.33e-3},
        "parallel": {"tensor": 2, "expert": 2},
    }
    for section, values in sections.items():
        tree[section] = {**tree.get(section, {}), **values}
    return parse(tree)


def make_report(outer_step: int, minibatch: int, seed: int = 0, minibatches: int = 4) -> StepReport:
    """A learning run: rewards rise, the first mini-batch has ratios of exactly 1, the last one knows the times."""
    step = outer_step * minibatches + minibatch
    draw = random.Random(seed * 100_003 + step)
    draw_outer = random.Random(seed * 100_003 - outer_step)
    learnt = 1 - math.exp(-outer_step / 6)
    spread = minibatch * 8e-4 * draw.uniform(0.8, 1.2)
    metrics = {
        "reward/mean": 0.55 + 0.35 * learnt + draw_outer.uniform(-0.05, 0.05),
        "reward/std": 0.4,
        "reward/zero_std_groups": 0.1 + 0.4 * learnt,
        "loss": draw.uniform(-0.01, 0.01),
        "grad_norm": draw.uniform(0.2, 0.6),
        "lr": 1e-3,
        "ratio/mean": 1.0,
        "ratio/p01": 1 - 2.6 * spread,
        "ratio/p05": 1 - 1.7 * spread,
        "ratio/p50": 1 + 0.1 * spread,
        "ratio/p95": 1 + 1.8 * spread,
        "ratio/p99": 1 + 2.7 * spread,
        "ratio/abs_log_mean": 0.8 * spread,
        "ratio/token_log_rms": 4 * spread,
        "ratio/ess": 1 - spread,
        "clip/frac_tokens": 0.04 * minibatch * draw.uniform(0.7, 1.3),
        "clip/frac_sequences": 0.042 * minibatch * draw.uniform(0.7, 1.3),
        "clip/frac_low": 0.02 * minibatch,
        "clip/frac_high": 0.02 * minibatch,
        "clip/frac_tokens_nonzero_adv": 0.05 * minibatch,
        "entropy": 0.5 - 0.2 * learnt + draw.uniform(-0.02, 0.02),
        "kl/engine_k1": draw.uniform(-1e-7, 1e-7),
        "kl/engine_k3": draw.uniform(1e-12, 5e-12),
        "kl/engine_tail": 0.0,
        "length/mean": 13.0,
        "length/mean_positive": 13.1,
        "length/mean_negative": 12.9,
        "length/truncated": 0.02,
        "dropped/responses": 0.0,
    }
    if outer_step % 10 == 0:
        metrics |= {"noise/abs_log_ratio_p50": 2e-5, "noise/abs_log_ratio_p99": 2e-4}
    if minibatch == minibatches - 1:
        metrics |= {
            "tokens_per_s": draw.uniform(900, 1100),
            "time/rollout": draw.uniform(1.5, 2.5),
            "time/reward": 0.02,
            "time/logprobs": 0.6,
        }
        metrics |= {"time/train": draw.uniform(2.0, 2.4), "time/sync": 0.3}
        if outer_step % 5 == 4:
            metrics |= {"eval/accuracy": 0.6 + 0.3 * learnt, "eval/greedy_accuracy": 0.65 + 0.3 * learnt}
            metrics |= {"eval/reward": 0.62 + 0.3 * learnt, "eval/rewarded": 0.7 + 0.25 * learnt}
    return StepReport(step=step, outer_step=outer_step, minibatch=minibatch, metrics=metrics)


def make_rollout(sample: int, seed: int = 0, response: str = "4 3 7 0 1 5 9 2 2 8 6 1") -> RolloutRecord:
    draw = random.Random(seed + sample)
    tokens = [*(piece + " " for piece in response.split(" ")), "<eos>"]
    old = [-draw.expovariate(2) for _ in tokens]
    return RolloutRecord(
        prompt_id=f"p{seed}",
        sample=sample,
        prompt="digits: 4 9 4 3 1 4 4 3 0 6 8 5\nsums: ",
        response=response,
        tokens=tokens,
        reward=float(sample % 2),
        advantage=1.0 if sample % 2 else -1.0,
        finish_reason="stop",
        ratio=1 + draw.uniform(-2e-3, 2e-3),
        clipped=sample % 3 == 0,
        rollout_logprobs=[value + draw.gauss(0, 1e-6) for value in old],
        old_logprobs=old,
        new_logprobs=[value + draw.gauss(0, 4e-3) for value in old],
        group=0,
        answer="4 3 7 0 1 5 9 2 2 8 4 9",
    )


def make_run(path: Path, outer_steps: int = 12, seed: int = 0, **sections: dict[str, Any]) -> RunDirectory:
    """A whole run: manifest, initial evaluation, ``outer_steps`` of 4 mini-batches, rollouts, a checkpoint, an end."""
    config = make_config(path, **sections)
    run = RunDirectory.create(config)
    run.write_manifest(describe(config, world_size=2, engine={"version": "0.5.23", "servers": 1}))
    writer = run.metrics_writer()
    writer.write(initial_evaluation({"eval/accuracy": 0.6, "eval/greedy_accuracy": 0.65}))
    for outer_step in range(outer_steps):
        for minibatch in range(4):
            writer.write(make_report(outer_step, minibatch, seed))
        run.write_rollouts(outer_step, [make_rollout(sample, seed=outer_step) for sample in range(4)])
    writer.close()
    (run.checkpoints / f"outer_{outer_steps:05d}").mkdir()
    (run.checkpoints / f"outer_{outer_steps:05d}" / "checkpoint.json").touch()
    run.finish()
    return run


def make_fine_tuning(path: Path, steps: int = 40) -> RunDirectory:
    """A finished one, whose loss falls by 0.05 a step from 3."""
    config = make_config(path, algorithm={"name": "sft"}, train={"outer_steps": steps})
    run = RunDirectory.create(config)
    run.write_manifest(describe(config, world_size=2))
    writer = run.metrics_writer()
    for step in range(steps):
        zeros = dict.fromkeys(("time/rollout", "time/reward", "time/logprobs", "time/sync"), 0.0)
        metrics = {"loss": 3.0 - 0.05 * step, "grad_norm": 0.5, "lr": 1e-3, "time/train": 0.25, "tokens_per_s": 900.0}
        writer.write(StepReport(step, step, 0, metrics | zeros))
    writer.close()
    run.finish()
    return run
