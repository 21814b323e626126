"""What a local server is started with: SGLang's command line, and its environment."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Literal

from megatron_gspo.calls import SERVER_KEY, SERVER_KEY_FILE
from megatron_gspo.config import RolloutConfig
from megatron_gspo.parallel.rendezvous import INTERFACES, is_loopback
from megatron_gspo.rollout.sglang.cards import FP8_KERNELS
from megatron_gspo.rollout.sglang.purpose import ROLLOUTS, Purpose

Device = Literal["cpu", "cuda"]
LOOPBACK = "127.0.0.1"

ACTIVATIONS = {"float64": "float32", "fp8": "bfloat16"}
"""What the engine computes in where it has no such dtype, or it is one of matrices alone."""
NO_GENERATED_HEALTH = {"SGLANG_ENABLE_HEALTH_ENDPOINT_GENERATION": "false"}
"""For servers that sleep: else each question after ``/health`` (``status`` asks) generates a token, in memory that is
not theirs then."""
TORCHRUN_VARIABLES = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")


def server_arguments(
    config: RolloutConfig,
    model_path: str | Path,
    port: int,
    *,
    device: Device,
    dtype: str,
    seed: int = 0,
    gpu: int = 0,
    host: str = LOOPBACK,
    routes: bool = False,
    placed: Sequence[str] = (),
    purpose: Purpose = ROLLOUTS,
) -> list[str]:
    """SGLang's command line for one server, with what its placement says; ``config.server_args`` come last and win.

    ``routes``: the server keeps the experts of each token, and sends them with the responses that ask for them.

    Weights start as version 0.
    """
    arguments = {
        "--model-path": str(model_path),
        "--host": host,
        "--port": str(port),
        "--device": device,
        "--dtype": ACTIVATIONS.get(dtype, dtype),
        "--weight-version": "0",
        "--random-seed": str(seed),
    }
    flags = list(purpose.flags)
    if routes:
        flags.append("--enable-return-routed-experts")
    if config.is_seeded(on_gpu=device == "cuda"):
        flags.append("--enable-deterministic-inference")
    if device == "cpu":
        arguments |= {
            "--attention-backend": "torch_native",
            "--sampling-backend": "pytorch",
            "--grammar-backend": "none",
            "--max-running-requests": "256",
            "--max-total-tokens": str(cpu_cache_tokens(config)),
            # --max-total-tokens is what bounds it. The share is of what was free before the weights were read: a small
            # one fails when other processes take memory meanwhile.
            "--mem-fraction-static": "0.5",
            "--cuda-graph-backend-decode": "disabled",
            "--cuda-graph-backend-prefill": "disabled",
        }
        # --sleep-on-idle: an idle scheduler polls, and takes a whole core from the trainer.
        flags += ["--disable-overlap-schedule", "--sleep-on-idle"]
    else:
        arguments["--base-gpu-id"] = str(gpu)
        arguments |= FP8_KERNELS if dtype == "fp8" else {}
    return [word for pair in arguments.items() for word in pair] + flags + [*placed, *config.server_args]


def cpu_cache_tokens(config: RolloutConfig) -> int:
    """Tokens whose keys and values a local CPU server keeps: for 16 of the longest sequences, at least 16,384."""
    return max(16384, 16 * (config.max_prompt_tokens + config.max_response_tokens))


def server_environment(
    environment: Mapping[str, str], device: Device, key: str = "", *, sleeps: bool = False, host: str = LOOPBACK
) -> dict[str, str]:
    """Its environment variables: its parent, its key (which a command line would show to everybody), one thread on a
    CPU, and nothing of torchrun's or this Python's. ``sleeps``: it will give its memory back meanwhile."""
    drop = {*TORCHRUN_VARIABLES, SERVER_KEY_FILE, "PYTHONPATH", "PYTHONHOME", "VIRTUAL_ENV"}
    kept = {key: value for key, value in environment.items() if key not in drop and not key.startswith("TORCHELASTIC")}
    kept["MEGATRON_GSPO_PARENT_PID"] = str(os.getpid())
    kept[SERVER_KEY] = key
    if is_loopback(host):  # it serves this machine alone
        kept = dict.fromkeys(INTERFACES, "lo") | kept
    if sleeps:
        kept |= NO_GENERATED_HEALTH
    if device == "cpu":
        kept["OMP_NUM_THREADS"] = "1"  # before torch is imported: its threads spin, 10 to 30 times slower on few cores
    return kept
