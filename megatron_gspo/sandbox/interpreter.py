"""Which Python runs Python programs, and what it needs to see."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

from megatron_gspo.errors import ConfigError

ASK = "import json, sys; print(json.dumps([sys.executable, sys.prefix, sys.base_prefix]))"
SYSTEM = "/usr/bin/python3"
ASK_S = 30.0


@dataclass(frozen=True)
class Interpreter:
    """A Python."""

    executable: str
    prefixes: tuple[str, ...]
    """Directories that hold it and its packages."""


def find(python: str, *, as_other_user: bool) -> Interpreter:
    """The interpreter of ``sandbox.python``; where that is empty, the one that this environment was made from, or the
    system's.

    Args:
        python: ``sandbox.python``.
        as_other_user: programs run as a user who reads only what everybody does. (A Python in root's home directory
            is not.)

    Raises ConfigError.
    """
    if python:
        return _asked(python, as_other_user=as_other_user)
    own = getattr(sys, "_base_executable", None) or sys.executable
    tried = [path for path in (os.path.realpath(own), SYSTEM) if Path(path).exists()]
    for path in tried:
        if not as_other_user or is_for_everybody(path):
            return _asked(path, as_other_user=as_other_user)
    raise ConfigError(
        f"no Python for programs: {', '.join(tried)} lies where only its owner reads, and programs run as another "
        f"user; install the system's python3, or name one: sandbox.python"
    )


def _asked(python: str, *, as_other_user: bool) -> Interpreter:
    try:
        done = subprocess.run(
            [python, "-I", "-c", ASK], capture_output=True, timeout=ASK_S, check=True, stdin=subprocess.DEVNULL
        )
        executable, prefix, base = json.loads(done.stdout)
    except (OSError, subprocess.SubprocessError, ValueError) as error:
        raise ConfigError(f"sandbox.python = {python!r} is no Python that runs: {error}") from None
    prefixes = tuple(dict.fromkeys((prefix, base)))
    for path in (executable, *prefixes):
        if as_other_user and not is_for_everybody(path):
            raise ConfigError(
                f"sandbox.python = {python!r} needs {path}, which only its owner reads: programs run as another user "
                f"when this is started as root; name a Python elsewhere"
            )
    return Interpreter(executable, prefixes)


def is_for_everybody(path: str) -> bool:
    """Whether any user may read and enter a path and all that it leads through, links included."""
    every = {Path(path), Path(path).resolve()}
    every |= {parent for one in every for parent in one.parents}
    return all(one.stat().st_mode & 0o5 == 0o5 or (one.is_dir() and one.stat().st_mode & 0o1) for one in every)
