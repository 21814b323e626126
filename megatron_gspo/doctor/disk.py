"""Checks of where a run writes."""

from __future__ import annotations

import os
import shutil
from math import ceil, lcm
from pathlib import Path

from megatron_gspo.config import RunConfig
from megatron_gspo.doctor.check import Check, error, ok, warning
from megatron_gspo.doctor.estimate import ITEM_BYTES
from megatron_gspo.doctor.facts import Facts
from megatron_gspo.doctor.machine import gib
from megatron_gspo.megatron.checkpoint_files import latest_in
from megatron_gspo.report.rundir import is_replaceable


def check_run_directory(facts: Facts) -> Check:
    """Whether it may be made: it does not exist, is replaced, or is gone on with; and its parent can be written."""
    config = facts.config
    path = Path(config.train.run_dir)
    place = _existing(path)
    if not place.is_dir():
        return error(f"train.run_dir = {path}: {place} is a file", "train.run_dir: another place")
    if not os.access(place, os.W_OK | os.X_OK):
        return error(f"train.run_dir = {path}: {place} cannot be written by this user", "train.run_dir: another place")
    if not os.path.lexists(path):
        shared = f"; each of {facts.nodes} nodes writes checkpoints into it: it must be one directory for all of them"
        return ok(f"{path} will be made{shared if facts.nodes > 1 else ''}")
    if config.train.resume and (latest := latest_in(path / "checkpoints")):
        return ok(f"{path} exists, and train.resume = true goes on from {latest.name}")
    if not (config.train.overwrite or config.train.resume):
        return error(
            f"train.run_dir = {path} exists",
            "train.run_dir: another name, or train.resume or train.overwrite = true",
        )
    why = "train.overwrite = true" if config.train.overwrite else "train.resume = true, and no checkpoint is there yet"
    if not (path.is_dir() and is_replaceable(path)):
        return error(
            f"train.run_dir = {path} is no run directory (no config.toml and checkpoints/ in it): nothing replaces it",
            "train.run_dir: another name, or remove it yourself",
        )
    return ok(f"{path} exists and is replaced: {why}")


def check_disk(facts: Facts) -> list[Check]:
    """Room for checkpoints, the Hugging Face directory, and what a disk sync keeps."""
    config = facts.config
    item = ITEM_BYTES[config.model.dtype]
    elements = sum({tensor.name: tensor.local_size(1, 1) for tensor in facts.tensors}.values())
    model = elements * item
    trained = sum(tensor.local_size(1, 1) for tensor in facts.adapters) if config.lora.rank else elements
    checkpoint = trained * (item + 3 * max(4, item))
    kept = checkpoints_kept(config)
    exports = config.train.outer_steps // config.train.save_hf_every if config.train.save_hf_every else 0
    needed = checkpoint * (kept + 1) + model * (exports + config.train.save_hf)
    held = "adapters" if config.lora.rank else "weights"
    text = (
        f"a checkpoint {gib(checkpoint)} ({held}, fp32 master and two moments) x ({kept} kept + 1 being written)"
        f"{f' + hf/ {gib(model)}' if config.train.save_hf else ''}"
        f"{f' + exports/ {exports} x {gib(model)}' if exports else ''} = {gib(needed)}"
    )
    fix = _of_the_disk(config, checkpoint * (kept + 1), model * exports)
    checks = [_room(text, needed, Path(config.train.run_dir), fix)]
    if config.sync.method == "disk" and not facts.supervised:
        directory = Path(config.sync.directory)
        if not directory.is_dir() or not os.access(directory, os.W_OK | os.X_OK):
            checks.append(error(f"sync.directory = {directory} cannot be written", "sync.directory"))
        else:
            checks.append(
                _room(f"a disk sync {gib(model)}", model, directory, 'sync.directory, or sync.method = "auto"')
            )
    return checks


def _of_the_disk(config: RunConfig, checkpoints: int, exports: int) -> str:
    """What makes the larger part smaller, and the other way out."""
    if exports > checkpoints:
        return "a larger train.save_hf_every, or train.run_dir on a larger disk"
    if config.train.keep_every:
        return "a larger train.keep_every (0 keeps none for good), or train.run_dir on a larger disk"
    if config.train.keep_last > 1 and config.train.checkpoint_every:
        return "a smaller train.keep_last, or train.run_dir on a larger disk"
    return "train.run_dir: a larger disk"


def checkpoints_kept(config: RunConfig) -> int:
    """Checkpoints that lie on the disk at one time, at most: the newest ``keep_last``, and those whose number of outer
    steps ``keep_every`` divides."""
    train = config.train
    if not train.checkpoint_every:
        return 1
    newest = min(train.keep_last, ceil(train.outer_steps / train.checkpoint_every))
    forever = train.outer_steps // lcm(train.checkpoint_every, train.keep_every) if train.keep_every else 0
    return newest + forever


def _room(text: str, needed: int, path: Path, fix: str) -> Check:
    place = _existing(path)
    free = shutil.disk_usage(place).free
    text = f"{text}; {gib(free)} free at {place}"
    if needed > free:
        return error(text, fix)
    return warning(f"{text}: more than half of it", fix) if needed > free / 2 else ok(text)


def _existing(path: Path) -> Path:
    """The nearest that exists, of a path and its parents."""
    path = path.absolute()
    return next((place for place in (path, *path.parents) if os.path.lexists(place)), Path("/"))
