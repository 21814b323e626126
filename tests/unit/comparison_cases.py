"""Synthetic comparisons with effects that are known: a plan and digests, as ``compare`` leaves them."""

from __future__ import annotations

import json
import math
import random
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

STEPS, MINIBATCHES, LAYERS = 12, 4, 4
MATRIX = ("grpo-off", "grpo-r2", "grpo-r3", "gspo-off", "gspo-r2", "gspo-r3")


def make_plan(arms: Sequence[str], seeds: Sequence[int], cold_starts: Sequence[str], **changes: Any) -> dict[str, Any]:
    tree = {
        "model": {"path": "runs/tiny/hf"},
        "data": {"path": "train.jsonl"},
        "algorithm": {"name": "gspo", "clip_low": 1e-3, "clip_high": 1.33e-3},
        "replay": {"mode": "off"},
        "optimizer": {"lr": 1e-3},
        "train": {"outer_steps": STEPS, "minibatches": MINIBATCHES, "prompts_per_step": 16},
    }
    return {
        "version": 1,
        "command": ["megatron-gspo", "compare", "tiny.toml", "--seeds", str(len(seeds))],
        "created": "2026-11-20T19:00:00+00:00",
        "config": tree,
        "losses": list(dict.fromkeys(parts(arm)[0] for arm in arms)),
        "replay": list(dict.fromkeys(parts(arm)[1] for arm in arms)),
        "seeds": list(seeds),
        "cold_starts": list(cold_starts),
        "overrides": [],
        "arms": [
            {"name": arm, "loss": loss, "replay": replay, "dense": arm.endswith("-dense"), "settings": own(arm)}
            for arm in arms
            for loss, replay in [parts(arm)]
        ],
        "hardware": {"cpu": "a processor", "cores": 2, "memory_gib": 16, "gpu": None},
        "versions": {"torch": "2.13.0", "megatron-core": "0.16.1"},
        **changes,
    }  # fmt: skip


def parts(arm: str) -> tuple[str, str]:
    loss, _, replay = arm.partition("-")
    return loss, "off" if replay == "dense" else replay


def own(arm: str) -> dict[str, Any]:
    loss, replay = parts(arm)
    settings: dict[str, Any] = {"algorithm.name": "grpo", "algorithm.clip_low": 0.2} if loss == "grpo" else {}
    return settings | ({"replay.mode": replay} if replay != "off" else {})


def make_digest(
    arm: str, seed: int, cold_start: str, final: float, curve: Callable[[int], float] | None = None, **changes: Any
) -> dict[str, Any]:
    """A cell whose reward ends at exactly ``final`` in its last five steps (or follows ``curve``)."""
    draw = random.Random(f"{arm} {seed}")
    loss, replay = parts(arm)
    clip, drift = (0.08 if loss == "gspo" else 0.002), {"off": 0.02, "r2": 0.0, "r3": 0.0}[replay]
    rising = lambda step: final if step >= STEPS - 5 else 0.4 + (final - 0.4) * step / (STEPS - 5)  # noqa: E731
    over = lambda of: [float(f"{of(step):.4g}") for step in range(STEPS)]  # noqa: E731
    noisy = lambda size: over(lambda step: size * draw.uniform(0.8, 1.25))  # noqa: E731
    series = {
        "reward/mean": over(curve or rising),
        "eval/accuracy": [final if step == STEPS - 1 else None for step in range(STEPS)],
        "clip/frac_tokens": noisy(clip),
        "clip/frac_sequences": noisy(clip * 1.1),
        "entropy": over(lambda step: 0.5 * math.exp(-step / 9) * draw.uniform(0.9, 1.1)),
        "grad_norm": noisy(0.4),
        "ratio/token_log_rms": noisy(6e-3),
        **{f"ratio/{q}": over(lambda step, z=z: 1 + z * 1e-3 * draw.uniform(0.8, 1.2)) for q, z in QUANTILES.items()},
        "kl/engine_k3": noisy(2e-4),
        "kl/engine_tail": noisy(1e-4),
        "route/drift": noisy(drift),
        "route/drift_tokens": noisy(4 * drift),
        "route/engine_mismatch": noisy(0.01),
        "length/mean_positive": noisy(13.0),
        "length/mean_negative": noisy(13.4),
        "time/train": noisy(2.0 if replay == "off" else 2.1),
        "time/logprobs": noisy(0.6),
        "tokens_per_s": noisy(900),
        **{f"route/drift/layer_{layer:02d}": noisy(drift * (layer + 1) / 2.5) for layer in range(LAYERS)},
    }
    return {
        "version": 1,
        "cell": {
            "arm": arm, "loss": loss, "replay": replay, "dense": arm.endswith("-dense"), "seed": seed,
            "cold_start": cold_start, "wall_s": 100.0 if replay == "off" else 103.0, "peak_memory_mb": 900.0,
        },
        "status": "finished",
        "error": "",
        "outer_steps": STEPS,
        "clip_range": [1e-3, 1.33e-3] if loss == "gspo" else [0.2, 0.27],
        "versions": {},
        "initial": {},
        "outer_step": list(range(STEPS)),
        "series": series,
        "by_minibatch": {
            "clip/frac_tokens": [clip * m / 2 for m in range(MINIBATCHES)],
            "route/drift": [drift * m / 2 for m in range(MINIBATCHES)],
        },
        **changes,
    }  # fmt: skip


QUANTILES = {"p01": -2.6, "p05": -1.7, "p50": 0.05, "p95": 1.8, "p99": 2.7}


def write(out: Path, plan: dict[str, Any], digests: Sequence[dict[str, Any]]) -> Path:
    out.mkdir(parents=True, exist_ok=True)
    (out / "compare.json").write_text(json.dumps(plan))
    for digest in digests:
        path = out / "cells" / digest["cell"]["arm"] / f"seed_{digest['cell']['seed']:03d}.json"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(digest))
    return out


def make_comparison(
    out: Path,
    arms: Sequence[str] = MATRIX,
    seeds: int = 16,
    cold_starts: int = 4,
    final: Callable[[str, int], float] = lambda arm, seed: 0.9,
    **changes: Any,
) -> Path:
    """Every arm with every seed, final rewards by ``final(arm, seed)``; ``changes`` go into the plan."""
    starts = [f"runs/cold/{'abcdefgh'[i]}/hf" for i in range(cold_starts)]
    plan = make_plan(arms, range(seeds), starts, **changes)
    cells = [(arm, seed) for arm in arms for seed in range(seeds)]
    return write(
        out, plan, [make_digest(arm, seed, starts[seed % cold_starts], final(arm, seed)) for arm, seed in cells]
    )


def effects(arm: str, seed: int) -> float:
    """GSPO ends 0.1 higher than GRPO in every seed, give or take 0.004; replay is noise of 0.02."""
    draw = random.Random(f"{arm} {seed}")
    noise = draw.gauss(0, 0.004 if "off" in arm else 0.02)
    return round(0.6 + 0.03 * (seed % 4) + (0.1 if arm.startswith("gspo") else 0.0) + noise, 4)
