"""A run that is struck by faults, and started again until it is done, as a scheduler would.

A run's place is a directory, a small tmpfs where that can be mounted: then its disk can be filled. What came out is
held against the run that nobody disturbed, to the last bit.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil

from megatron_gspo.supervise import PREFIXES, remove_abandoned
from megatron_gspo.sync import disk
from tests.chaos.faults import Fault
from tests.chaos.servers import Servers

ROOT = Path(__file__).parents[2]
CONFIG = ROOT / "examples" / "quickstart" / "gspo.toml"
REWARDS = ROOT / "tests" / "training" / "rewards.py"
STEPS = 4
LOOK_S = 0.002
PATIENCE_S = 240.0
"""That one start may take; longer is a hang."""
PAUSE_S = 1.0
SYNCS = ("/begin_weight_update", "/update_weights_from_disk")
MOST_TMPFS = "96m"
INEXACT = ("time/", "tokens_per_s", "servers/")
"""Clocks, and what became of servers, which is what the faults were."""
OF_REAL_SERVERS = ("kl/engine_", "rollout_logprobs")
"""The last digits of an engine's logprobs depend on which requests met in a batch."""


class HangError(AssertionError):
    """A run did not end."""


@dataclass
class Outcome:
    """What became of a disturbed run."""

    struck: list[Fault] = field(default_factory=list)
    statuses: list[int] = field(default_factory=list)
    """Exit status of each start."""
    said: list[str] = field(default_factory=list)
    """The last line of each."""


def settings(place: Path, quickstart: Path, urls: list[str], sync: str, *more: str) -> list[str]:
    """Of a run of some seconds on two ranks, with a checkpoint after every outer step."""
    return [
        f'model.path="{quickstart}/model"',
        f'data.path="{quickstart}/train.jsonl"',
        'data.eval_path=""',
        f'reward.function="{REWARDS}:share_of_even_tokens_and_chance"',
        f'train.run_dir="{place}/run"',
        f"train.outer_steps={STEPS}",
        "train.overwrite=false",
        "train.resume=true",
        "train.prompts_per_step=4",
        "train.minibatches=2",
        "train.checkpoint_every=1",
        "train.noise_floor_every=0",
        "train.tensorboard=false",
        "optimizer.schedule=linear",
        'correction.rule="truncate"',
        f'sync.method="{sync}"',
        f'sync.directory="{place}"',
        'sync.verify="off"',
        "sync.timeout_s=20",
        f"rollout.servers={json.dumps(urls)}",
        "rollout.timeout_s=20",
        "rollout.retries=3",
        "train.collective_timeout_s=15",
        "train.max_restarts=2",
        "rollout.max_engine_k3=0",
        "eval.every=0",
        *more,
    ]


class Disturbed:
    """One run, started as often as it takes."""

    def __init__(self, place: Path, overrides: list[str], servers: Servers, say: Callable[[str], None]) -> None:
        self._place, self._run, self._overrides, self._servers = place, place / "run", overrides, servers
        self._say = say
        self.outcome = Outcome()
        self._undo: list[tuple[float, Callable[[], object]]] = []

    def finish(self, faults: deque[Fault]) -> Outcome:
        """Runs to the end; faults that have struck are taken from ``faults``. Raises HangError."""
        while not (self.outcome.statuses and self.outcome.statuses[-1] == 0):
            self._start(faults)
            starts = len(self.outcome.statuses)
            if starts > 3 * (len(self.outcome.struck) + 3):
                raise HangError(f"{starts} starts after {len(self.outcome.struck)} faults: {self.outcome.said[-3:]}")
        return self.outcome

    def _start(self, faults: deque[Fault]) -> None:
        began = time.monotonic()
        log = self._place.parent / f"{self._place.name}-{len(self.outcome.statuses)}.log"
        command = [sys.executable, "-m", "megatron_gspo.cli", "train", str(CONFIG), *self._overrides]
        environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), "TMPDIR": str(self._place.parent)}
        with log.open("w") as out:
            process = subprocess.Popen(
                command, stdin=subprocess.DEVNULL, stdout=out, stderr=out, cwd=ROOT, env=environment
            )
        try:
            self._watch(process, faults)
        except BaseException:
            self._kill_all(process)
            raise
        finally:
            for _, undo in self._undo:
                undo()
            self._undo.clear()
        lines = [line for line in log.read_text(errors="replace").splitlines() if line.strip()]
        said = next((line for line in reversed(lines) if "error:" in line or "stopped" in line), (lines or [""])[-1])
        self.outcome.statuses.append(process.returncode)
        self.outcome.said.append(said)
        number, took = len(self.outcome.statuses), time.monotonic() - began
        self._say(f"    start {number} ended with {process.returncode} after {took:.1f} s: {said[:200]}")

    def _watch(self, process: subprocess.Popen[bytes], faults: deque[Fault]) -> None:
        began, armed = time.monotonic(), _Armed(self, time.monotonic())
        family: dict[int, psutil.Process] = {}
        looked = 0.0
        while process.poll() is None:
            now = time.monotonic()
            if now - looked > 0.25:
                family |= _descendants(process.pid)
                looked = now
            if now - began > PATIENCE_S:
                raise HangError(f"still running after {PATIENCE_S:.0f} s; {self.outcome.struck[-1:]}")
            for due in [due for due in self._undo if due[0] <= now]:
                self._undo.remove(due)
                due[1]()
            if faults and armed.is_time(faults[0], now):
                family |= _descendants(process.pid)
                if self._strike(faults[0], process):
                    self.outcome.struck.append(faults.popleft())
                    self._say(f"  {now - began:5.1f} s {self.outcome.struck[-1]}")
                    armed = _Armed(self, time.monotonic())
            time.sleep(LOOK_S)
        self._check_gone(family)

    def _strike(self, fault: Fault, process: subprocess.Popen[bytes]) -> bool:
        """Whether there was something to strike: a rank may not have been started yet."""
        later = time.monotonic() + PAUSE_S
        if fault.kind == "kill the launcher":
            process.kill()
        elif fault.kind == "kill a server":
            self._servers.kill(fault.target % len(self._servers.links))
        elif fault.kind == "pause a server":
            server = fault.target % len(self._servers.links)
            self._servers.signal(server, signal.SIGSTOP)
            self._undo.append((later, lambda: self._servers.signal(server, signal.SIGCONT)))
        elif fault.kind == "cut connections":
            for link in self._servers.links:
                link.cut(PAUSE_S)
        elif fault.kind == "fill the disk":
            self._fill()
            self._undo.append((later + 4 * PAUSE_S, lambda: (self._place / "ballast").unlink(missing_ok=True)))
        elif (rank := _rank(process.pid, fault.target, watcher="watcher" in fault.kind)) is None:
            return False
        else:
            kind = signal.SIGKILL if "kill" in fault.kind else signal.SIGSTOP
            _signal(rank, kind)
            if fault.kind == "pause a rank":
                self._undo.append((later, lambda: _signal(rank, signal.SIGCONT)))
        return True

    def _fill(self) -> None:
        with contextlib.suppress(OSError), (self._place / "ballast").open("wb", buffering=0) as file:
            for size in (2**20, 2**12):
                with contextlib.suppress(OSError):
                    while True:
                        if file.write(b"\0" * size) < size:
                            break

    def _check_gone(self, family: dict[int, psutil.Process]) -> None:
        """Nothing of a start is left some seconds after its launcher: the next one would meet it."""
        deadline = time.monotonic() + 45
        while left := [each for each in family.values() if _lives(each)]:
            if time.monotonic() > deadline:
                raise HangError(f"the launcher is gone, and its processes are not: {left}")
            time.sleep(0.05)

    def _kill_all(self, process: subprocess.Popen[bytes]) -> None:
        for each in (*_descendants(process.pid).values(), psutil.Process(process.pid)):
            with contextlib.suppress(psutil.Error):
                each.kill()
        process.wait()

    # ------------------------------------------------------------------------------------------------- moments

    def seen(self, moment: str) -> Any:
        """Something that is another once a moment has come, since it was asked for."""
        if moment in ("rollout", "training"):
            return self._servers.count("/generate")
        if moment == "sync":
            return self._servers.count(*SYNCS)
        root = self._run / "checkpoints"
        if moment == "checkpoint":
            return sorted(path.name for path in root.glob("*.unfinished/*.distcp"))
        if moment == "publication":
            return sorted(path.name for path in root.glob("outer_*/checkpoint.json")) + _content(root / "latest")
        return None


class _Armed:
    """Waits for the next fault's moment."""

    def __init__(self, run: Disturbed, now: float) -> None:
        self._run, self._since = run, now
        self._fault: Fault | None = None
        self._before: Any = None
        self._begun: float | None = None

    def is_time(self, fault: Fault, now: float) -> bool:
        """Whether its moment began long enough ago."""
        if fault is not self._fault:
            self._fault, self._before, self._begun = fault, self._run.seen(fault.moment), None
        if self._begun is None:
            found = self._run.seen(fault.moment)
            if fault.moment == "start" or (found != self._before and found):
                self._begun = now
            elif found != self._before:
                self._before = found
        return self._begun is not None and now - self._begun >= fault.after_s


def results(run: Path, *, real: bool) -> dict[str, Any]:
    """What a run has to show, without clocks: by file, hashes of tensors, and lines of numbers and responses."""
    inexact = (*INEXACT, *OF_REAL_SERVERS) if real else INEXACT
    last = run / "checkpoints" / f"outer_{STEPS:05d}"
    tensors = [*last.glob("*.distcp"), *(run / "hf").glob("*.safetensors")]
    found: dict[str, Any] = {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in sorted(tensors)}
    for path in (run / "metrics.jsonl", *sorted((run / "rollouts").glob("*.jsonl"))):
        lines = [json.loads(line) for line in path.read_text().splitlines()]
        found[path.name] = [{name: line[name] for name in line if not name.startswith(inexact)} for line in lines]
    return found


def leftovers(place: Path) -> list[str]:
    """Files of a finished run's place that should not be there, once what a killed process has left, and the next
    command or sync removes when it has lain there for ``SETTLED_S``, is gone."""
    names = re.compile(r"\.(unfinished|replaced|removed|tmp)$|^megatron-gspo-|^mgspo-")
    for left in [
        *place.glob(f"{disk.PREFIX}*"),
        *(left for each in PREFIXES for left in place.parent.glob(f"{each}*")),
    ]:
        os.utime(left, (0, 0))
    disk.remove_abandoned(place)
    before, tempfile.tempdir = tempfile.tempdir, str(place.parent)
    try:
        remove_abandoned()
    finally:
        tempfile.tempdir = before
    return [str(path) for root in (place, place.parent) for path in root.rglob("*") if names.search(path.name)]


@contextlib.contextmanager
def small_disk(place: Path) -> Iterator[bool]:
    """``place`` as a tmpfs of some megabytes; whether it is one: only root can mount it."""
    place.mkdir(parents=True)
    command = ["mount", "-t", "tmpfs", "-o", f"size={MOST_TMPFS},mode=0700", "tmpfs", str(place)]
    mounted = os.getuid() == 0 and subprocess.run(command, check=False, capture_output=True).returncode == 0
    try:
        yield mounted
    finally:
        if mounted:
            subprocess.run(["umount", "-l", str(place)], check=False)


def _content(path: Path) -> list[str]:
    try:
        return [path.read_text()]
    except OSError:
        return []


def _signal(pid: int, number: signal.Signals) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, number)


def _lives(process: psutil.Process) -> bool:
    with contextlib.suppress(psutil.Error):
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    return False


def _descendants(pid: int) -> dict[int, psutil.Process]:
    with contextlib.suppress(psutil.Error):
        return {each.pid: each for each in psutil.Process(pid).children(recursive=True)}
    return {}


def _rank(launcher: int, rank: int, *, watcher: bool) -> int | None:
    """The process that works as a rank, or the one that watches over it; None where it is not there."""
    with contextlib.suppress(psutil.Error):
        for each in psutil.Process(launcher).children():
            if "megatron_gspo.cli" in each.cmdline() and each.environ().get("RANK") == str(rank):
                workers = [child for child in each.children() if child.cmdline() == each.cmdline()]
                return each.pid if watcher else workers[0].pid if workers else None
    return None
