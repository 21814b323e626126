"""Whether a run goes on, from what it left on disk: a run that was killed says nothing of it itself."""

from __future__ import annotations

import time
from typing import Literal

from megatron_gspo.report.manifest import machine, process_start, process_ticks
from megatron_gspo.report.ranks import STALE_S, read_signs
from megatron_gspo.report.rundir import RunDirectory

State = Literal["running", "finished", "failed", "stopped", "killed", "silent"]
OVER = ("finished", "failed", "stopped", "killed", "silent")
"""Nothing more is expected of it."""

SILENT_S = 600.0
"""Seconds of silence that are nothing special: starting servers and loading weights take minutes."""
LOST_S = 3 * STALE_S
"""Seconds without a sign of life of the first rank."""
SILENT_STEPS = 10
"""Outer steps' time without a line after which a run counts as silent."""


def state(run: RunDirectory, seconds_per_step: float | None, now: float | None = None) -> State | None:
    """How the run says that it ended, else "running", "killed" or "silent"; None without a manifest.

    Whoever holds the run's lock writes it. Not every file system shows locks to other machines, so without one the
    process tells on the run's own machine, and from elsewhere "silent" is a guess: its first rank has given no sign of
    life, or nothing was written for much longer than an outer step (``seconds_per_step``) takes.
    """
    manifest = run.manifest()
    said: State | None = manifest.get("status")
    locked = run.is_locked()
    if said != "running" or locked:
        return said
    process = manifest.get("process") or {}
    if process.get("machine") == machine():
        return "running" if locked is None and _lives(process) else "killed"
    if unheard(run, now) > LOST_S:
        return "silent"
    limit = max(SILENT_S, SILENT_STEPS * (seconds_per_step or 0.0))
    return "silent" if silence(run, now) > limit else "running"


def unheard(run: RunDirectory, now: float | None = None) -> float:
    """Seconds since the first rank's last sign of life; 0 where it gives none."""
    times = [max(sign.time, written) for sign, written in read_signs(run.path) if sign.rank == 0]
    return (time.time() if now is None else now) - times[0] if times else 0.0


def silence(run: RunDirectory, now: float | None = None) -> float:
    """Seconds since the run last wrote a line of metrics or its manifest; 0 where the clock has been set back."""
    times = [path.stat().st_mtime for path in (run.metrics_file, run.manifest_file) if path.exists()]
    return max(0.0, (time.time() if now is None else now) - max(times, default=0.0))


def _lives(process: dict[str, float]) -> bool:
    """Whether the process that wrote the manifest is still there, and not another one of its number."""
    if process.get("ticks") is not None:
        return process_ticks(int(process["pid"])) == process["ticks"]
    started = process_start(int(process["pid"]))  # a manifest of an earlier version
    return started is not None and abs(started - process["started"]) < 1.0
