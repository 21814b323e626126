"""One rank of a run: its failure becomes one line, said once, and an exit status."""

from __future__ import annotations

import os
import re
import sys
import time
import traceback
from pathlib import Path
from typing import TYPE_CHECKING

from megatron_gspo.config import RunConfig
from megatron_gspo.errors import ConfigError, MegatronGspoError, RunStopped, UserError
from megatron_gspo.limits import allow_open_files, explain
from megatron_gspo.quiet import mute
from megatron_gspo.runs.saying import FIRST_RANKS_TURN_S, is_first, say_once
from megatron_gspo.supervise import INTERRUPTED, STORE, listen_early, run_afterwards, was_interrupted
from megatron_gspo.versions import untested_here

if TYPE_CHECKING:
    from megatron_gspo.runs.recording import MakeRecorder

STOPPED = os.EX_TEMPFAIL
"""Exit status (75) of a run that SIGTERM or SIGUSR1 stopped after saving: queue it again with train.resume = true.
Under ``torchrun --max-restarts N``, which starts again whatever does not end with 0, it is 0."""
ANOTHER_IS_MISSING = re.compile("Connection (closed by|reset by) peer|Broken pipe|gloo/transport", re.IGNORECASE)
"""In the text of a failed collective: another rank has ended, and what that one says is the reason."""

TORCHRUN = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")


def world_of_torchrun() -> int | None:
    """Ranks of the world that this process is one of, by torchrun's variables; None without ``RANK``.

    Raises ConfigError when they contradict themselves: a ``RANK`` that something else has set, perhaps.
    """
    if "RANK" not in os.environ:
        return None
    found = {name: os.environ.get(name) for name in TORCHRUN}
    rank, world = found["RANK"] or "", found["WORLD_SIZE"] or ""
    if None in found.values() or not (rank.isdecimal() and world.isdecimal() and int(rank) < int(world)):
        shown = ", ".join(f"{name} = {value!r}" for name, value in found.items())
        raise ConfigError(f"{shown} are not torchrun's: unset RANK to start the ranks here, or start with torchrun")
    return int(world)


def restarts_of_torchrun() -> int:
    """How often torchrun starts ranks again (``--max-restarts``); 0 for ranks that ``megatron-gspo train`` starts."""
    count = os.environ.get("TORCHELASTIC_MAX_RESTARTS", "")
    return int(count) if count.isdecimal() and STORE not in os.environ else 0


def check_restarts(config: RunConfig) -> None:
    """Raises ConfigError where ranks that torchrun starts again, with the same command line, would not go on."""
    if (most := restarts_of_torchrun()) and not config.train.resume:
        raise ConfigError(
            f"torchrun --max-restarts {most} starts ranks again with the same command line, which would "
            f"{'replace what the run has written' if config.train.overwrite else 'find its run directory in the way'}: "
            f"add train.resume=true train.overwrite=false"
        )


def run_rank(config: RunConfig, make_recorder: MakeRecorder) -> int:
    """Trains as one rank; returns the process's exit status."""
    mute()
    listen_early()
    if too_few := allow_open_files():
        raise ConfigError(too_few)
    check_restarts(config)
    if os.environ["RANK"] == "0":
        from megatron_gspo.parallel.rendezvous import exposed_store

        for line in filter(None, (*untested_here(), exposed_store())):
            print(f"warning: {line}", file=sys.stderr)
        if config.train.on_end:
            run_dir = str(Path(config.train.run_dir).absolute())
            run_afterwards(config.train.on_end, config.train.hook_timeout_s, run_dir)
    from megatron_gspo.runs.loop import train

    try:
        train(config, make_recorder)
        leave_world()
    except BaseException as error:
        return _said(error)
    return 0


def _said(error: BaseException) -> int:
    """The exit status of a run that has raised, which is said, once for all ranks."""
    if was_interrupted() or isinstance(error, KeyboardInterrupt):  # the launcher says so
        return INTERRUPTED
    if isinstance(error, RunStopped):
        again = restarts_of_torchrun()
        say_once(f"{error}{' (exit status 0, or torchrun would start it again)' if again else ''}")
        return 0 if again else STOPPED
    if isinstance(error, MegatronGspoError):
        _show_the_unforeseen(error)
        say_once(f"error: {_line(error)}")
        return 2 if isinstance(error, UserError) else 1
    if words := explain(error):
        say_once(f"error: rank {os.environ['RANK']}: {words}")
        return 1
    if ANOTHER_IS_MISSING.search(str(error)):
        time.sleep(FIRST_RANKS_TURN_S)
    told = "".join(traceback.format_exception(error))
    say_once(f"{told}error: rank {os.environ['RANK']}: {type(error).__name__}: {_line(error)}")
    return 1


def leave_world() -> None:
    """Ends the process groups of a run that is done, with their threads: those of gloo let go of tensors, for which
    they ask for the interpreter's lock, and abort the process when there is no interpreter left."""
    import torch.distributed as dist

    if dist.is_initialized():
        dist.barrier()  # none is still waiting for another's last words
        dist.destroy_process_group()


def _show_the_unforeseen(error: MegatronGspoError) -> None:
    """Prints the traceback of what is none of our errors, and which ``parallel.exchange.agree`` has wrapped in one."""
    cause = error.__cause__
    if cause and explain(cause):
        return
    if type(error) is MegatronGspoError and cause and not isinstance(cause, OSError) and is_first("traceback"):
        print("".join(traceback.format_exception(cause)), end="", file=sys.stderr, flush=True)


def _line(error: BaseException) -> str:
    return " ".join(str(error).split())
