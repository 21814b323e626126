"""One cell, in a process of its own: training, and the digest that says it is finished.

Importing Megatron costs seconds, so on a CPU a cell's process is forked from one server that has imported it.
"""

from __future__ import annotations

import json
import multiprocessing as mp
import os
import resource
import signal
import sys
import tempfile
import time
from functools import partial
from multiprocessing import forkserver
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

from megatron_gspo.compare.plan import Cell
from megatron_gspo.config import Placement, RunConfig, dump
from megatron_gspo.quiet import ENVIRONMENT
from megatron_gspo.storage import writing
from megatron_gspo.supervise import die_with_parent

PRELOAD = [
    "megatron_gspo.runs.loop",
    "megatron_gspo.runs.launch",
    "megatron_gspo.report.recorder",
    "megatron_gspo.rollout.sglang.client",
    "megatron_gspo.sync.tensor",
    "transformers.models.auto.tokenization_auto",
    "megatron_gspo.compare.cell",
]
SPENT = "spent.json"
"""In a cell's run directory: seconds and memory of its starts so far. A start from nothing replaces the directory."""


class CellProcesses:
    """Starts cells' processes."""

    def __init__(self, device: str) -> None:
        os.environ.update(ENVIRONMENT)  # for the ranks, which inherit it
        os.environ.setdefault("OMP_NUM_THREADS", "1")
        self._context: Any = mp.get_context("forkserver" if device == "cpu" else "spawn")
        if device == "cpu":
            self._context.set_forkserver_preload(PRELOAD)
            forkserver.ensure_running()  # it imports while rollout servers start

    def start(
        self, cell: Cell, urls: tuple[str, ...], key: str | None = None, placement: Placement | None = None
    ) -> BaseProcess:
        """A process that runs ``cell`` against the servers at ``urls``; its exit status is that of ``train``.

        ``key``: the servers'; that of this process's environment when None. ``placement``: where they were started;
        None for servers that somebody else has.
        """
        rollout = cell.config.rollout.model_copy(update={"servers": urls})
        config = cell.config.model_copy(update={"rollout": rollout})
        if placement is not None:
            placed = config.placement.model_copy(update={"mode": placement.mode})
            config = config.model_copy(update={"placement": placed})
        process: BaseProcess = self._context.Process(target=run_cell, args=(cell, config, key), name=cell.name)
        process.start()
        return process


def run_cell(cell: Cell, config: RunConfig, key: str | None) -> None:
    """Trains, measures, writes the digest. What is printed goes to the cell's log, which goes when all is well."""
    from megatron_gspo.calls import SERVER_KEY, SERVER_KEY_FILE

    if key is not None:
        os.environ[SERVER_KEY] = key  # for the ranks
        os.environ.pop(SERVER_KEY_FILE, None)
    die_with_parent()
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches all of a terminal's processes; the first one decides
    cell.run_dir.parent.mkdir(parents=True, exist_ok=True)
    log = os.open(cell.log_file, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o644)
    os.dup2(log, 1)
    os.dup2(log, 2)
    started = time.monotonic()
    status = train(config)
    spent = add_up(cell.run_dir / SPENT, time.monotonic() - started, peak_memory_mb())
    if status:
        sys.exit(status)
    write_digest(cell, spent)
    cell.log_file.unlink()


def train(config: RunConfig) -> int:
    """Trains in this process where one rank is enough, else in ranks that it starts; returns the exit status."""
    ranks = config.parallel.world_size()
    if ranks > 1:
        from megatron_gspo.runs.launch import launch

        with tempfile.NamedTemporaryFile("w", suffix=".toml", encoding="utf-8") as file:
            file.write(dump(config))
            file.flush()
            return launch(Path(file.name), (), ranks=ranks, servers=config.rollout.places)
    import torch

    from megatron_gspo.parallel.rendezvous import keep_to_loopback, private_store
    from megatron_gspo.report.recorder import RunRecorder
    from megatron_gspo.runs.rank import run_rank

    alone = {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "1"}
    os.environ.update(alone)
    torch.set_num_threads(1)
    keep_to_loopback(config.rollout.places)
    with private_store():
        return run_rank(config, partial(RunRecorder, page=False))


def peak_memory_mb() -> float:
    """Largest resident memory of this process, or of the largest of its ranks, in 10^6 bytes."""
    own, children = (resource.getrusage(who).ru_maxrss for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
    return max(own, children) * 1024 / 1e6


def add_up(path: Path, seconds: float, memory_mb: float) -> dict[str, float]:
    """What the cell has taken over all its starts, this one included; kept in ``path``."""
    try:
        before = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        before = {"wall_s": 0.0, "peak_memory_mb": 0.0}
    spent = {
        "wall_s": round(before["wall_s"] + seconds, 3),
        "peak_memory_mb": round(max(before["peak_memory_mb"], memory_mb), 1),
    }
    if path.parent.is_dir():  # not when the run could not begin
        path.write_text(json.dumps(spent), encoding="utf-8")
    return spent


def write_digest(cell: Cell, spent: dict[str, float]) -> None:
    """Writes the cell's digest in one move: once it is there the cell is never run again."""
    from megatron_gspo.report.comparison import digest

    about = {
        "arm": cell.arm.name,
        "loss": cell.arm.loss,
        "replay": cell.arm.replay,
        "dense": cell.arm.dense,
        "seed": cell.seed,
        "cold_start": cell.cold_start,
    }
    text = json.dumps(digest(cell.run_dir, about | spent), allow_nan=False) + "\n"
    unfinished = cell.digest_file.with_suffix(".unfinished")
    with writing(cell.digest_file, then="the same command continues"):
        unfinished.write_text(text, encoding="utf-8")
        unfinished.replace(cell.digest_file)
