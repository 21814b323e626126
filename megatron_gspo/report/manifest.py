"""``manifest.json``: what exactly ran."""

from __future__ import annotations

import hashlib
import os
import platform
import subprocess
from collections.abc import Mapping
from datetime import UTC, datetime
from math import prod
from pathlib import Path
from typing import Any

import psutil

from megatron_gspo.config import RunConfig
from megatron_gspo.kernels.choice import choose_kernels
from megatron_gspo.versions import installed

PACKAGES = ("megatron-gspo", "torch", "megatron-core", "transformers")
PACKAGE_DIRECTORY = Path(__file__).resolve().parent.parent


def describe(config: RunConfig, world_size: int, engine: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """The manifest of a run that starts now on ``world_size`` ranks.

    ``engine``: what the rollout servers said of themselves; its "version" becomes ``versions.sglang``, and its
    "placement" and "reward_servers" stand by themselves, where they are. No host name: a manifest is something to send
    to others; "process" lets ``status`` on the same machine see whether it lives.
    """
    layout = config.parallel.model_dump() | {"data": config.parallel.data_size(world_size), "world_size": world_size}
    engine = dict(engine or {})
    apart = {name: engine.pop(name, None) for name in ("placement", "reward_servers")}
    return {
        "status": "running",
        "started": datetime.now(UTC).isoformat(timespec="seconds"),
        "algorithm": config.algorithm.name,
        "clip_range": config.algorithm.clip_range(),
        "model": config.model.path,
        "layout": layout,
        **{name: value for name, value in apart.items() if value},
        "kernels": choose_kernels(config.model.kernels, config.model.dtype).record(),
        "seeds": {"train": config.train.seed},
        **adapters(config),
        "engine": {"name": config.rollout.engine, **engine},
        "versions": versions(engine.get("version")),
        "process": process_record(os.getpid()),
        "git": git_state(PACKAGE_DIRECTORY),
    }


def adapters(config: RunConfig) -> dict[str, Any]:
    """What ``[lora]`` trains: its settings, with the number of parameters; nothing without a rank."""
    if not config.lora.rank:
        return {}
    from megatron_gspo.hf.catalog import read_model  # who reads a manifest needs no torch
    from megatron_gspo.hf.lora import every_adapter

    every = every_adapter(*read_model(config.model.path), config.lora)
    return {"lora": config.lora.model_dump(mode="json") | {"parameters": sum(prod(each.shape) for each in every)}}


def with_start(
    manifest: Mapping[str, Any], previous: Mapping[str, Any], continued: Mapping[str, Any] | None
) -> dict[str, Any]:
    """A manifest that goes on from the one of the run so far (empty for a new run).

    ``starts`` lists each start with its outer step, what it continued from and with which changes, and how it ended: a
    start that was killed could not say so itself.
    """
    earlier = [{**start, "status": "killed"} if "ended" not in start else start for start in previous.get("starts", [])]
    start = {"started": manifest["started"], "outer_step": 0, "layout": manifest["layout"], **(continued or {})}
    first = previous.get("started", manifest["started"])
    return {**manifest, "started": first, "starts": [*earlier, start]}


def versions(engine: str | None) -> dict[str, str | None]:
    """Versions of Python, of the packages that numbers depend on, and of the engine."""
    return {
        **{name: installed(name) for name in ("python", *PACKAGES)},
        "sglang": engine,
    }


def machine() -> str:
    """This machine's name as 12 hexadecimal digits: enough to know it again, not to know it."""
    return hashlib.sha256(platform.node().encode()).hexdigest()[:12]


def process_record(pid: int) -> dict[str, Any]:
    """What tells a process of this machine from all others."""
    return {"pid": pid, "started": process_start(pid), "ticks": process_ticks(pid), "machine": machine()}


def process_start(pid: int) -> float | None:
    """When a process of this machine started, in seconds since 1970; None when there is none. It moves when somebody
    sets the clock."""
    try:
        return psutil.Process(pid).create_time()
    except psutil.Error:
        return None


def process_ticks(pid: int) -> int | None:
    """When a process of this machine started, in the kernel's ticks since it booted; None when there is none."""
    try:
        return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[19])
    except (OSError, IndexError, ValueError):
        return None


def git_state(package: Path) -> dict[str, Any] | None:
    """Commit and dirtiness of the checkout that ``package`` is the top of; None when it was installed otherwise."""
    top = _git(package, "rev-parse", "--show-toplevel")
    if top is None or Path(top).resolve() != package.parent:  # an environment inside somebody's repository
        return None
    commit = _git(package, "rev-parse", "--verify", "HEAD")
    if commit is None:
        return None
    return {"commit": commit, "dirty": bool(_git(package, "status", "--porcelain", "--untracked-files=no"))}


def _git(directory: Path, *arguments: str) -> str | None:
    try:
        done = subprocess.run(
            ["git", "-C", str(directory), *arguments], capture_output=True, text=True, timeout=10, check=False
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() if done.returncode == 0 else None
