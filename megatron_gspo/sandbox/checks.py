"""What a program must be, and whether programs can be run behind namespaces here."""

from __future__ import annotations

import os
import platform
import random
import re
import shutil
import subprocess
from pathlib import Path, PurePosixPath

from megatron_gspo.config.sandbox import UNPROTECTED, SandboxConfig
from megatron_gspo.errors import ConfigError
from megatron_gspo.sandbox import box, seccomp
from megatron_gspo.sandbox.interface import MIB, Outcome, Program, Verdict
from megatron_gspo.sandbox.interpreter import find
from megatron_gspo.sandbox.languages import LANGUAGES

OLDEST_BWRAP = (0, 8)
OLDEST_KERNEL = (5, 4)
OWN_COUNT = (5, 14)
"""Linux from which a user namespace counts its own processes for RLIMIT_NPROC."""
USERS = ((2_000_000_000, 100_000_000), (60_100, 4_800))
"""(first, number) of user ids that no system hands out; the first range that is mapped here is taken."""
DOCKER = "--security-opt seccomp=unconfined --security-opt apparmor=unconfined --security-opt systempaths=unconfined"
"""Options of ``docker run`` with which a container may make namespaces of its own."""
SYSCTLS = (
    "user.max_user_namespaces above 0, kernel.apparmor_restrict_unprivileged_userns=0 (Ubuntu), "
    "kernel.unprivileged_userns_clone=1 (older Debian)"
)
ELSEWHERE = (
    "or start `megatron-gspo sandbox serve` on a host that allows them and name it: "
    'sandbox.backend = "server", sandbox.servers'
)


def checked(program: Program) -> tuple[bytes, Outcome | None]:
    """(the text as bytes, None); or the compile error of a text that has none. Raises ConfigError."""
    if program.language not in LANGUAGES:
        raise ConfigError(f"no language {program.language!r}: there are {', '.join(LANGUAGES)}")
    language = LANGUAGES[program.language]
    taken = {language.file, language.binary}
    for name in program.files:
        parts = PurePosixPath(name).parts
        plain = parts and not name.startswith("/") and ".." not in parts and "\0" not in name and name[-1] != "/"
        if not plain or name.encode(errors="replace").decode() != name or str(PurePosixPath(name)) in taken:
            raise ConfigError(
                f"a program's file is called {name!r}: a name within its directory is needed, other than "
                f"{', '.join(sorted(taken - {''}))}"
            )
    try:
        return program.source.encode(), None
    except UnicodeEncodeError as error:
        return b"", Outcome(Verdict.COMPILE, None, b"", f"the program is no text: {error}".encode(), 0.0, 0.0)


def settings_here(config: SandboxConfig) -> box.Settings:
    """How programs are run on this machine. Raises ConfigError where they cannot be, with what to do."""
    protected = config.backend != UNPROTECTED
    root = os.geteuid() == 0
    python = find(config.python, as_other_user=root)
    if shutil.which("prlimit", path="/usr/bin") is None:
        raise ConfigError("no /usr/bin/prlimit, which holds a program's limits: install util-linux")
    if kernel() < OLDEST_KERNEL or not Path(f"/proc/self/task/{os.getpid()}/children").exists():
        raise ConfigError(
            f"Linux {platform.release()} does not tell which processes a program has started (pidfd_open, "
            f"/proc/PID/task/TID/children): {OLDEST_KERNEL[0]}.{OLDEST_KERNEL[1]} or newer is needed, {ELSEWHERE}"
        )
    return box.Settings(
        protected=protected,
        bwrap=_bwrap() if protected else "",
        python=python.executable,
        prefixes=python.prefixes,
        disk_bytes=config.disk_mb * MIB,
        uid=other_user() if root else None,
        count_by_kernel=root or (protected and kernel() >= OWN_COUNT),
    )


def _bwrap() -> str:
    found = shutil.which("bwrap")
    if found is None:
        raise ConfigError(
            f"programs cannot be isolated here: there is no bwrap; apt-get install bubblewrap, {ELSEWHERE}"
        )
    words = subprocess.run([found, "--version"], capture_output=True, text=True, check=False).stdout
    version = tuple(map(int, re.findall(r"\d+", words)[:2]))
    if version < OLDEST_BWRAP:
        raise ConfigError(
            f"{found} is {words.strip() or 'of no version'}: {'.'.join(map(str, OLDEST_BWRAP))} or newer is needed, "
            f"{ELSEWHERE}"
        )
    if not seccomp.supported():
        raise ConfigError(
            f"programs cannot be isolated here: there is no filter of system calls for {platform.machine()}, only for "
            f"{', '.join(seccomp.MACHINES)}; {ELSEWHERE}"
        )
    return found


def other_user() -> int:
    """A user id that nobody has, drawn anew for each start: those who share one share its count of processes."""
    mapped = [tuple(map(int, line.split())) for line in Path("/proc/self/uid_map").read_text().splitlines()]
    for first, number in USERS:
        if any(start <= first and first + number <= start + size for start, _, size in mapped):
            return random.SystemRandom().randrange(first, first + number)
    raise ConfigError(
        f"started as root, and none of the user ids {', '.join(str(first) for first, _ in USERS)} is mapped in this "
        f"container (/proc/self/uid_map): programs need another user than root; start it as one"
    )


def kernel() -> tuple[int, int]:
    """(major, minor) of Linux."""
    major, minor = re.findall(r"\d+", platform.release())[:2]
    return int(major), int(minor)


def why_not(settings: box.Settings, outcome: Outcome) -> str:
    """What to do where the first program has not run."""
    words = " ".join(outcome.stderr.decode(errors="replace").split())[:300] or "no word of why"
    if outcome.verdict is not Verdict.FAILED or not settings.protected:
        return (
            f"a first program, print(6 * 7) with {settings.python}, ended as {outcome.verdict} "
            f"(status {outcome.status}): {words}"
        )
    return (
        f"programs cannot be isolated here: {words}; in Docker: docker run {DOCKER}; on a host, as root: "
        f"sysctl {SYSCTLS}; {ELSEWHERE}"
    )


def described(config: SandboxConfig) -> list[str]:
    """What holds programs here, a line each; or where they are sent. Raises ConfigError."""
    if config.servers:
        return [f"programs go to {', '.join(config.servers)}"]
    settings = settings_here(config)
    counted = (
        "by the kernel" if settings.count_by_kernel else "by looking alone (the kernel counts a user's, not a run's)"
    )
    user = "this user" if settings.uid is None else f"another user (id {settings.uid}, say)"
    held = (
        f"namespaces of {settings.bwrap}, and a filter of {len(seccomp.CALLS)} system calls"
        if settings.protected
        else "NOTHING: programs have your files, your network and your rights"
    )
    return [
        f"behind {held}",
        f"as {user}; interpreter {settings.python}, {settings.disk_bytes // MIB} MiB of files in memory",
        f"processes are counted {counted}; memory of each by the kernel, of all by looking each hundredth of a second",
    ]
