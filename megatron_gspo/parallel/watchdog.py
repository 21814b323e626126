"""Who keeps the others waiting: each rank says in a file, again and again, that it lives and what it is doing.

A collective cannot say which rank is missing. So a thread of each rank writes a file, ``00003.json``:
a number that grows, the phase, the line of code that the main thread is at, whether that is a collective.
It watches its neighbour and the first rank. One whose number has not grown for the time that a collective may take,
while this rank has not moved either, is stopped, or its machine is gone: that is said with its last words, it is killed
where it is on this machine (so that the others' connections break), and this rank ends.

Files and not torch's store: whoever holds the store may be the one that is missing, a stopped rank may hold its lock,
and a run has a file system that all ranks share in any case. A beat overwrites the one before in place, which a full
disk allows. Clocks of machines are not compared: silence is counted by who watches, while it is itself awake.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from types import FrameType, TracebackType
from typing import Self

import psutil

from megatron_gspo.errors import RankMissingError

BEAT_BYTES = 1024
SHARE = 0.8
"""Of a collective's time: nccl's own watchdog, which names nobody, comes later."""
BEATS = 40
"""In the time that a collective may take."""
LOOKS = 6
"""That a rank must be silent for, when one is missing, to be named with it."""
SHORTEST_S, LONGEST_S = 0.05, 10.0
"""Between two beats."""
IDLE = 0.02
"""Share of a processor that a thread which waits may take."""
COLLECTIVES = "torch.distributed.distributed_c10d"
PACKAGE = "megatron_gspo"
MOST_NAMED = 8
MOST_CHARACTERS = 200
"""Of a text in a beat."""


@dataclass(frozen=True)
class Beat:
    """What a rank says of itself."""

    rank: int
    count: int = 0
    """Grows with each."""
    phase: str = "starting"
    place: str = ""
    """The functions of this package that the main thread is in, and the line of the last."""
    collective: str = ""
    """The one that it waits in, or empty."""
    idle_s: float = 0.0
    """Seconds for which it has been there without computing."""
    host: str = ""
    pid: int = 0
    started: float = 0.0
    """When its process was, by its machine's clock: a number may be another process's by now."""

    def describe(self) -> str:
        """What it is doing, or was when it was last heard."""
        where = f"in {self.place}" if self.place else "outside of this package"
        where = f"waiting in {self.collective}, {where}" if self.collective else where
        return f"rank {self.rank} (host {self.host}, process {self.pid}; phase: {self.phase}; last seen {where})"


def named(beats: Sequence[Beat]) -> str:
    """The ranks, and what they do or did."""
    more = f", and {len(beats) - MOST_NAMED} more" if len(beats) > MOST_NAMED else ""
    return ", ".join(beat.describe() for beat in beats[:MOST_NAMED]) + more


def look_at(frame: FrameType | None) -> tuple[str, str]:
    """(place, collective) of a thread by its innermost frame, as in ``Beat``."""
    collective, own = "", list[FrameType]()
    while frame is not None:
        module = str(frame.f_globals.get("__name__"))
        if module == COLLECTIVES and not own:
            collective = frame.f_code.co_name
        if module.partition(".")[0] == PACKAGE and len(own) < 4:
            own.append(frame)
        frame = frame.f_back
    if not own:
        return "", collective
    file = own[0].f_code.co_filename.rpartition(f"{PACKAGE}/")[2]
    names = " > ".join(each.f_code.co_name for each in reversed(own))
    return f"{file}:{own[0].f_lineno} ({names})"[:MOST_CHARACTERS], collective


@dataclass
class _Watched:
    """What this rank knows of another."""

    beat: Beat
    silent_s: float = 0.0

    def hear(self, beat: Beat | None, passed_s: float) -> None:
        """The silence ends with a beat that is new."""
        if beat is not None and (beat.count, beat.pid) != (self.beat.count, self.beat.pid):
            self.beat, self.silent_s = beat, 0.0
        else:
            self.silent_s += passed_s


@dataclass
class Watchdog:
    """A thread that beats and watches, as long as the block lasts."""

    directory: Path
    """Of the beats of all ranks; it is made where it is missing."""
    rank: int
    world: int
    timeout_s: float
    give_up: Callable[[str], None]
    """Called with a line when a rank is missing: says it. If the main thread then goes on, its error ends the run."""
    end: Callable[[str], None]
    """Called with that line when the main thread still waits: ends the process."""
    warn: Callable[[str], None]
    """Called with a line about ranks that live and do not come."""
    phase: Callable[[], str] = lambda: "starting"
    """What the run is doing now."""
    grace_s: float = LONGEST_S
    """That the main thread gets to notice that its connections are broken, once who is missing was killed."""
    _stop: threading.Event = field(default_factory=threading.Event)
    _known: dict[int, _Watched] = field(default_factory=dict)

    def __post_init__(self) -> None:
        process = psutil.Process()
        self._own = Beat(
            self.rank, host=socket.gethostname()[:MOST_CHARACTERS], pid=process.pid, started=process.create_time()
        )
        self._main = threading.main_thread().ident or 0
        self._interval_s = min(LONGEST_S, max(SHORTEST_S, self.timeout_s / BEATS))
        self._limit_s = SHARE * self.timeout_s
        self._still_s = 0.0
        self._cpu_s = 0.0
        self._warned = False
        self._descriptor = -1
        self._line = ""

    def __enter__(self) -> Self:
        self._beat(0.0)  # one that never was heard is not missed
        self._thread = threading.Thread(target=self._run, name="watchdog", daemon=True)
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._stop.set()
        self._thread.join(timeout=LONGEST_S)

    @contextlib.contextmanager
    def blamed(self) -> Iterator[None]:
        """Raises RankMissingError in the place of what a missing rank has caused within."""
        try:
            yield
        except Exception as error:
            if not self._line:
                raise
            raise RankMissingError(self._line) from error

    def _run(self) -> None:
        before = time.monotonic()
        while not self._stop.wait(self._interval_s):
            now = time.monotonic()
            passed_s = min(now - before, 2 * self._interval_s)  # who was stopped himself has watched nobody
            before = now
            self._beat(passed_s)
            if self.world > 1:
                self._watch(passed_s)

    def _beat(self, passed_s: float) -> None:
        place, collective = look_at(sys._current_frames().get(self._main))
        cpu_s = time.clock_gettime(time.pthread_getcpuclockid(self._main))
        moved = (place, collective) != (self._own.place, self._own.collective)
        idle = not moved and cpu_s - self._cpu_s < IDLE * max(passed_s, self._interval_s)
        self._cpu_s = cpu_s
        self._still_s = 0.0 if moved else self._still_s + passed_s
        self._own = replace(
            self._own,
            count=self._own.count + 1,
            phase=self.phase()[:MOST_CHARACTERS],
            place=place,
            collective=collective,
            idle_s=self._own.idle_s + passed_s if idle else 0.0,
        )
        text = json.dumps(asdict(self._own)).encode()
        with contextlib.suppress(OSError):  # a full disk, or the directory of a run that is being replaced
            if self._descriptor < 0:
                self.directory.mkdir(parents=True, exist_ok=True)
                self._descriptor = os.open(self._path(self.rank), os.O_WRONLY | os.O_CREAT, 0o644)
            os.pwrite(self._descriptor, text[:BEAT_BYTES].ljust(BEAT_BYTES), 0)
            os.fsync(self._descriptor)  # a network's file system sends it now

    def _watch(self, passed_s: float) -> None:
        for rank in {0, (self.rank + 1) % self.world} - {self.rank}:
            self._hear(rank, passed_s)
        if self._still_s < self._limit_s:
            self._warned &= self._still_s > 0
        elif any(watched.silent_s >= self._limit_s for watched in self._known.values()):
            self._give_up(self._missing())
        elif self.rank <= 1 and self._own.collective and not self._warned:
            self._judge_the_living()

    def _hear(self, rank: int, passed_s: float) -> None:
        beat = self._read(rank)
        if rank in self._known:
            self._known[rank].hear(beat, passed_s)
        elif beat is not None:
            self._known[rank] = _Watched(beat)

    def _missing(self) -> list[Beat]:
        """The last beats of whoever is silent now: all ranks are looked at for the time of some beats."""
        everyone = [_Watched(beat) for rank in range(self.world) if (beat := self._read(rank)) is not None]
        for _ in range(LOOKS):
            if self._stop.wait(self._interval_s):
                return []  # the block has ended, and no time has passed in which anybody could be heard
            self._beat(self._interval_s)  # others look, too
            for watched in everyone:
                watched.hear(self._read(watched.beat.rank), 1.0)
        return [each.beat for each in everyone if each.silent_s == LOOKS and each.beat.rank != self.rank]

    def _judge_the_living(self) -> None:
        """On the first rank that waits: if all do, that is a deadlock; if some are at something else, it is said."""
        others = [beat for rank in range(self.world) if rank != self.rank and (beat := self._read(rank)) is not None]
        if self._own.idle_s < self._limit_s or (self.rank == 1 and others[:1] and others[0].collective):
            return
        if all(beat.collective and beat.idle_s >= self._limit_s for beat in others) and len(others) == self.world - 1:
            self._say([self._own, *others], "no rank is missing, and they do not wait for the same thing")
            self.end(self._line)
        elif busy := [beat for beat in others if not beat.collective]:
            self._warned = True
            self.warn(f"the others have waited for {self._own.idle_s:.0f} s for {named(busy)}")

    def _say(self, beats: list[Beat], what: str) -> None:
        self._line = (
            f"rank {self.rank} has waited for {self._still_s:.0f} s in {self._own.collective or 'one place'} (phase: "
            f"{self.phase()}; train.collective_timeout_s = {self.timeout_s:g}); {what}: {named(beats)}"
        )
        self.give_up(self._line)

    def _give_up(self, missing: list[Beat]) -> None:
        """Says it, kills who is missing here, and ends this process if that does not make it go on by itself."""
        if not missing or self._still_s < self._limit_s:  # they are back; or who was first has said it, and killed them
            return
        self._say(missing, "missing")
        for beat in missing:
            self._kill(beat)
        place = look_at(sys._current_frames().get(self._main))
        begin = time.monotonic()
        while time.monotonic() - begin < self.grace_s:
            self._beat(self._interval_s)
            if self._stop.wait(self._interval_s) or look_at(sys._current_frames().get(self._main)) != place:
                return  # its own error ends it
        self.end(self._line)

    def _kill(self, beat: Beat) -> None:
        with contextlib.suppress(psutil.Error, OSError):
            if beat.host == self._own.host and psutil.Process(beat.pid).create_time() == beat.started:
                os.kill(beat.pid, signal.SIGKILL)

    def _read(self, rank: int) -> Beat | None:
        try:
            return Beat(**json.loads(self._path(rank).read_bytes()))
        except (OSError, ValueError, TypeError):  # not there yet, or half of it
            return None

    def _path(self, rank: int) -> Path:
        return self.directory / f"{rank:05d}.json"
