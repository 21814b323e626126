"""A host that would notice: what hostile programs run on, and whether it is afterwards what it was before."""

from __future__ import annotations

import asyncio
import contextlib
import os
import socket
import time
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path

import psutil

from megatron_gspo.config import SandboxConfig
from megatron_gspo.sandbox import Outcome, Program, open_sandbox
from megatron_gspo.sandbox.checks import other_user
from tests.sandbox.cases import DISK_MB, LIMITS, SECRET, Case

USERS_DRAWN: set[int] = set()
SLACK_S = 5.0
"""Seconds that ending a program may take beyond its limit, on a busy machine."""


class World:
    """Files and a listener that no program may reach."""

    def __init__(self, directory: Path) -> None:
        """``directory``: one that everybody may enter."""
        self.directory = directory
        (directory / "secret").write_text(SECRET)
        (directory / "secret").chmod(0o666)
        directory.chmod(0o777)
        self.listener = socket.create_server(("127.0.0.1", 0))
        self.listener.setblocking(False)
        self.port = self.listener.getsockname()[1]
        self._before = self._seen()

    def _seen(self) -> object:
        mounts = [line for line in Path("/proc/self/mounts").read_text().splitlines() if "newroot" in line]
        return (
            (self.directory / "secret").read_text(),
            sorted(os.listdir(self.directory)),
            socket.gethostname(),
            mounts,
        )

    def placed(self, case: Case) -> Program:
        """The program of a case, with the names of this world."""
        source = case.source.replace("@CANARY@", str(self.directory)).replace("@PORT@", str(self.port))
        return Program(case.language, source)

    def complaints(self) -> list[str]:
        """What is not as it was."""
        found = [] if self._seen() == self._before else [f"{self._before} became {self._seen()}"]
        try:
            self.listener.accept()
            found.append("somebody has connected to the host's listener")
        except BlockingIOError:
            pass
        deadline = time.monotonic() + 60
        while (left := strays()) and time.monotonic() < deadline:
            time.sleep(0.05)
        return found + [f"left running: {left}"] * bool(left)

    def close(self) -> None:
        """Gives the port back."""
        self.listener.close()


OTHERS: set[psutil.Process] = set()
"""Descendants of this process from before the test: servers and ranks that other files' tests share."""


def descendants() -> list[psutil.Process]:
    """Processes that this one has started since the test began, and theirs."""
    return [child for child in psutil.Process().children(recursive=True) if child not in OTHERS]


def named(process: psutil.Process) -> str:
    """Its name; "" where it has ended since it was listed."""
    try:
        return str(process.name())
    except psutil.Error:
        return ""


def line_of(process: psutil.Process) -> list[str]:
    """Its command line; [] where it has ended since it was listed."""
    try:
        return list(process.cmdline())
    except psutil.Error:
        return []


def outlasting(processes: Iterable[psutil.Process], within_s: float = 60.0) -> list[str]:
    """Names of those that still run then. Whoever is killed takes a moment to go, on a busy machine a longer one."""

    def runs(process: psutil.Process) -> bool:
        with contextlib.suppress(psutil.Error):
            return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
        return False

    left, deadline = [*processes], time.monotonic() + within_s
    while (left := [process for process in left if runs(process)]) and time.monotonic() < deadline:
        time.sleep(0.02)
    return [f"{process.pid} {named(process)}" for process in left]


def strays() -> list[str]:
    """Processes that this process's sandboxes have left: of the users that they became, or still its children."""
    own = {child.pid for child in descendants()}
    found = []
    for process in psutil.process_iter(["pid", "uids", "cmdline"]):
        uids = process.info["uids"]
        if process.info["pid"] in own or (uids is not None and uids.real in USERS_DRAWN):
            found.append(f"{process.info['pid']} {process.info['cmdline']}")
    return found


def draw() -> int:
    """As ``checks.other_user``; remembers who was drawn."""
    USERS_DRAWN.add(uid := other_user())
    return uid


def wrong(case: Case, outcome: Outcome) -> str:
    """What is wrong with an outcome; "" where nothing is."""
    seen = f"{outcome.verdict}, status {outcome.status}, {outcome.wall_s:.2f} s, "
    seen += f"{outcome.stdout[:200]!r} {outcome.stderr[-300:]!r}"
    if outcome.verdict not in case.verdicts:
        return f"{case.name}: {sorted(case.verdicts)} expected: {seen}"
    if case.says is not None and outcome.stdout != case.says:
        return f"{case.name}: it should have said {case.says!r}: {seen}"
    if case.status is not None and outcome.status != case.status:
        return f"{case.name}: status {case.status} expected: {seen}"
    if SECRET.encode() in outcome.stdout + outcome.stderr:
        return f"{case.name}: it has seen the secret: {seen}"
    if max(len(outcome.stdout), len(outcome.stderr)) > LIMITS.output_bytes:
        return f"{case.name}: {len(outcome.stdout)} and {len(outcome.stderr)} bytes of output"
    limit_s = LIMITS.wall_s if outcome.verdict != "compile_error" else 60
    return f"{case.name}: it went on too long: {seen}" if outcome.wall_s > limit_s + SLACK_S else ""


async def hostile(world: World, cases: Iterable[Case], *, concurrency: int | None = None) -> list[str]:
    """Runs cases at once; what is wrong. The sandbox goes on with honest programs afterwards."""
    config = SandboxConfig(disk_mb=DISK_MB, concurrency=concurrency)
    os.environ["MEGATRON_GSPO_TEST_SECRET"] = SECRET
    async with open_sandbox(config) as sandbox:

        async def one(case: Case) -> str:
            (outcome,) = await sandbox.run(world.placed(case), [b""], LIMITS)
            return wrong(case, outcome)

        found = [text for text in await asyncio.gather(*map(one, cases)) if text]
        (honest,) = await sandbox.run(Program("python", "print(6 * 7)"), [b""], replace(LIMITS, wall_s=30.0))
        return found if honest.stdout == b"42\n" else [*found, f"an honest program afterwards: {honest}"]
