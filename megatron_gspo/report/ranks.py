"""What each rank of a run does, in files that it writes itself: any machine that sees the run directory can look.

    ranks/rank-3.json    host, process, phase, step, time: written at each phase and every ``EVERY_S`` seconds
    logs/rank-3.log      one line an event, with time and rank

A thread writes them: they say that the process lives. How long a rank has been in its phase says whether it gets on.
Host names are in these files alone; the manifest, which is something to send to others, has none.
"""

from __future__ import annotations

import contextlib
import json
import os
import time
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from megatron_gspo.report.manifest import machine, process_ticks
from megatron_gspo.untrusted import read_json

EVERY_S = 10.0
STALE_S = 60.0
"""Seconds without a sign after which a rank counts as silent: six times what it writes in."""
MOST_BYTES = 65536
"""Of a rank's file; it has some 200."""
ENDED = "ended"
FAILED = "failed"
RankState = Literal["alive", "ended", "failed", "gone", "silent", "missing"]


@dataclass(frozen=True)
class Sign:
    """One rank's file."""

    rank: int
    host: str
    pid: int
    ticks: int | None
    """When the process started, in the kernel's ticks: another one of its number is not it."""
    machine: str
    phase: str
    step: int | None
    """The last optimizer step that is done."""
    since: float
    """When the phase began, in seconds since 1970."""
    time: float
    """When this was written."""


def directory(run: Path) -> Path:
    """Where the ranks of a run write."""
    return run / "ranks"


def log_file(run: Path, rank: int) -> Path:
    """A rank's events."""
    return run / "logs" / f"rank-{rank}.log"


def write_sign(run: Path, sign: Sign) -> None:
    """Replaces a rank's file in one move. Raises OSError."""
    path = directory(run) / f"rank-{sign.rank}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_suffix(".tmp")
    temporary.write_text(json.dumps(asdict(sign)), encoding="utf-8")
    temporary.replace(path)


def clear_signs(run: Path) -> None:
    """Removes what ranks of an earlier start have left; a layout of fewer ranks would not replace all of it."""
    for path in directory(run).glob("rank-*"):
        with contextlib.suppress(OSError):
            path.unlink()


def event(rank: int, text: str, when: float) -> str:
    """A line of a log: ``2026-11-29T09:10:11.123Z rank 3: text``, whatever the text holds."""
    second = time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(when))
    return f"{second}.{int(when % 1 * 1000):03d}Z rank {rank}: {' '.join(text.split())}\n"


def read_signs(run: Path) -> list[tuple[Sign, float]]:
    """(sign, when its file was written) of each rank that has written one, in order. What is no sign is left out."""
    found = []
    for path in directory(run).glob("rank-*.json"):
        with contextlib.suppress(OSError, ValueError, TypeError):
            sign = Sign(**read_json(path, MOST_BYTES))
            if isinstance(sign.rank, int) and path.name == f"rank-{sign.rank}.json":
                found.append((_checked(sign), path.stat().st_mtime))
    return sorted(found, key=lambda pair: pair[0].rank)


def ranks_of(run: Path, world_size: int | None, now: float | None = None) -> list[dict[str, Any]]:
    """One entry a rank, as JSON values: ``rank``, ``state``, ``host``, ``pid``, ``phase``, ``step``, ``in_phase_s`` and
    ``heard_s``, seconds since its last sign. Ranks of ``world_size`` that have written none are "missing".

    A rank on this machine is "gone" when its process is; of others' the age of their signs tells: "silent".
    """
    now = time.time() if now is None else now
    entries = {sign.rank: _entry(sign, written, now) for sign, written in read_signs(run)}
    if not entries:  # a run of an earlier version, or one that has not come so far
        return []
    absent = {"host": None, "pid": None, "phase": None, "step": None, "in_phase_s": None, "heard_s": None}
    for rank in set(range(world_size or 0)) - entries.keys():
        entries[rank] = {"rank": rank, "state": "missing", **absent}
    return [entries[rank] for rank in sorted(entries)]


def grouped(numbers: Iterable[int]) -> str:
    """Ranks in words.

    >>> grouped([0, 1, 2, 3, 6, 8, 9])
    '0-3, 6, 8-9'
    """
    spans: list[list[int]] = []
    for number in sorted(numbers):
        if spans and number == spans[-1][1] + 1:
            spans[-1][1] = number
        else:
            spans.append([number, number])
    return ", ".join(str(first) if first == last else f"{first}-{last}" for first, last in spans)


def _entry(sign: Sign, written: float, now: float) -> dict[str, Any]:
    heard = max(0.0, now - max(sign.time, written))  # two clocks: the writer's and the file system's
    return {
        "rank": sign.rank,
        "state": _state(sign, heard),
        "host": sign.host,
        "pid": sign.pid,
        "phase": sign.phase,
        "step": sign.step,
        "in_phase_s": round(max(0.0, now - sign.since), 1),
        "heard_s": round(heard, 1),
    }


def _state(sign: Sign, heard: float) -> RankState:
    if sign.phase == ENDED:
        return "ended"
    if sign.phase == FAILED:
        return "failed"
    if sign.machine == machine():
        there = process_ticks(sign.pid)
        if there is None or (sign.ticks is not None and there != sign.ticks):
            return "gone"
    return "silent" if heard > STALE_S else "alive"


def _checked(sign: Sign) -> Sign:
    """Raises TypeError for values of other kinds: it is a file, and somebody may have written it."""
    numbers = (sign.time, sign.since)
    texts = (sign.host, sign.machine, sign.phase)
    if not all(isinstance(value, (int, float)) and abs(value) < 1e12 for value in numbers):
        raise TypeError(f"{numbers} are no times")
    if not all(isinstance(text, str) for text in texts) or not isinstance(sign.pid, int):
        raise TypeError(f"{texts} are no texts")
    if not isinstance(sign.step, (int, type(None))) or not isinstance(sign.ticks, (int, type(None))):
        raise TypeError(f"{sign.step} is no step")
    return sign


def sign_of(rank: int, host: str, phase: str, step: int | None, since: float) -> Sign:
    """What this process says of itself now."""
    pid = os.getpid()
    return Sign(rank, host, pid, process_ticks(pid), machine(), phase, step, since, time.time())
