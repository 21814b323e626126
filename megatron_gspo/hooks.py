"""Commands of the user's that a run starts: when a checkpoint is finished, and when the run has ended.

A command is split as a shell would split it, and no shell runs it. It gets its words as further arguments and in the
environment, nothing on its input, and its output goes to ``hooks.log`` in the run's directory. What becomes of it
changes nothing in the run: a failure is a warning.
"""

from __future__ import annotations

import contextlib
import os
import shlex
import signal
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

LOG = "hooks.log"
"""In a run's directory: what hooks print."""
OUTCOMES = {0: "finished", os.EX_TEMPFAIL: "stopped"}
"""Exit status of a run -> its outcome; any other one is "failed"."""


def run_hook(
    setting: str, command: str, words: Sequence[str], environment: Mapping[str, str], timeout_s: float, run_dir: str
) -> bool:
    """Runs the command of a setting to its end; whether it succeeded. When it did not, a warning says why."""
    log = Path(run_dir) / LOG
    variables = {f"MEGATRON_GSPO_{name}": value for name, value in {**environment, "RUN_DIR": run_dir}.items()}
    with contextlib.ExitStack() as stack:
        out = None
        with contextlib.suppress(OSError):  # a directory that is gone, or full: the command runs all the same
            out = stack.enter_context(log.open("ab"))
        try:
            process = subprocess.Popen(
                [*shlex.split(command), *words],
                stdin=subprocess.DEVNULL,
                stdout=out or subprocess.DEVNULL,
                stderr=subprocess.STDOUT,
                env=os.environ | variables,
                start_new_session=True,  # so that what it starts can be ended with it
            )
        except (OSError, ValueError) as error:
            return _warn(f"{setting} was not run: {error}")
        try:
            status = process.wait(timeout_s)
        except subprocess.TimeoutExpired:
            _end(process)
            return _warn(f"{setting} was ended after train.hook_timeout_s = {timeout_s:g} s ({log})")
        except BaseException:
            _end(process)
            raise
    return status == 0 or _warn(f"{setting} ended with exit status {status} ({log})")


def run_at_end(command: str, status: int, timeout_s: float, run_dir: str) -> None:
    """``train.on_end`` of a run that has ended with this exit status."""
    outcome = OUTCOMES.get(status, "failed")
    words = {"OUTCOME": outcome, "STATUS": str(status)}
    run_hook("train.on_end", command, [outcome, run_dir], words, timeout_s, run_dir)


def _end(process: subprocess.Popen[bytes]) -> None:
    with contextlib.suppress(OSError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def _warn(line: str) -> bool:
    with contextlib.suppress(OSError, ValueError, AttributeError):
        print(f"warning: {line}", file=sys.stderr, flush=True)
    return False
