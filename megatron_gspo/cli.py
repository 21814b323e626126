"""The command line: finds a command, runs it, and turns its failure into one line.

Exit status: 0 done, 1 a run failed, 2 the user's mistake (one line says which), 130 interrupted, 141 nobody reads on.
"""

from __future__ import annotations

import signal

if __name__ == "__main__" and signal.getsignal(signal.SIGINT) is signal.default_int_handler:
    # Until ``main`` can end without a traceback.
    signal.signal(signal.SIGINT, signal.SIG_DFL)

import argparse
import os
import sys
from collections.abc import Sequence
from importlib import import_module
from io import TextIOWrapper
from pathlib import Path

from megatron_gspo.commands import COMMANDS, GROUPS
from megatron_gspo.commands.parsing import DOCS, Parser
from megatron_gspo.errors import MegatronGspoError, UserError
from megatron_gspo.limits import explain
from megatron_gspo.storage import ROOM, free_space, is_mistake
from megatron_gspo.supervise import interrupt_quietly, supervised, was_interrupted

FAILED, USER_ERROR, INTERRUPTED, UNREAD = 1, 2, 130, 141
"""The last two as a shell counts them: 128 and the number of the signal, SIGINT and SIGPIPE."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs one command and returns its exit status. Raises SystemExit for help, a version and words that are wrong.

    Without ``arguments`` it is this process's command line, and commands that run other people's code do so in a child
    (``supervise``).
    """
    own = arguments is None
    if own:
        _open_closed_streams()
        interrupt_quietly()
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")  # not every terminal has a sign for "≥"
    try:
        options = _parse(arguments)
        who = _watched(options) if own else None
        if who is not None:
            return _run_supervised(options, who)
        return _run_and_flush(options)
    except SystemExit:
        if unsaid := _unsaid():
            raise SystemExit(unsaid) from None
        raise
    except BaseException:
        if was_interrupted():
            return INTERRUPTED
        raise


def _open_closed_streams() -> None:
    """Standard streams that are closed (``>&-``, some schedulers) lead nowhere from here on: the next file to be opened
    would take their number, and whatever prints would write into it."""
    for number, name in enumerate(("stdin", "stdout", "stderr")):
        try:
            os.fstat(number)
        except OSError:
            nowhere = os.open(os.devnull, os.O_RDWR)
            if nowhere == number:
                os.set_inheritable(number, True)
            else:
                os.dup2(nowhere, number)
                os.close(nowhere)
            setattr(sys, name, open(number, "w" if number else "r", encoding="utf-8", closefd=False))  # noqa: SIM115  it stays open


def _run_supervised(options: argparse.Namespace, who: str) -> int:
    try:
        os.getcwd()  # libraries under torch end the process without it, and no path of the configuration means anything
    except FileNotFoundError:
        return _say(UserError("the working directory has been removed: change to one that is there"), USER_ERROR)
    try:
        return supervised(lambda: _run_and_flush(options), who, launched="TORCHELASTIC_RUN_ID" in os.environ)
    except OSError as error:  # no room for temporary files, no process more
        return _say(MegatronGspoError(explain(error) or str(error)), FAILED)


def _run_and_flush(options: argparse.Namespace) -> int:
    status = _run(options)
    return _unsaid() or status


def _watched(options: argparse.Namespace) -> str | None:
    """What a command that runs other people's code calls itself when it ends without a word; None for others."""
    who = getattr(options, "watched", None)
    return who(options) if who else None


def _run(options: argparse.Namespace) -> int:
    try:
        return int(options.run(options))
    except UserError as error:
        return _say(error, USER_ERROR)
    except MegatronGspoError as error:
        return _say(error, FAILED)
    except BrokenPipeError as error:
        return _unheard(error)
    except Exception as error:
        if words := explain(error):
            return _say(MegatronGspoError(words), FAILED)
        if not isinstance(error, OSError):
            raise
        # A name that cannot be read or written; anything else is the machine's.
        return _say(error, USER_ERROR) if is_mistake(error) else _say(_with_room(error), FAILED)
    except KeyboardInterrupt:
        return INTERRUPTED


def _unsaid() -> int:
    """The exit status when what was printed does not get out; 0 when it does."""
    try:
        if sys.stdout is not None:
            sys.stdout.flush()
    except OSError as error:
        return _unheard(error)
    return 0


def _unheard(error: OSError) -> int:
    """A reader who has seen enough (``| head -1``) is told nothing more; a full disk behind ``>`` is a line."""
    with open(os.devnull, "w") as nowhere:  # or Python writes the rest at its end, and fails again
        os.dup2(nowhere.fileno(), 1)
    if isinstance(error, BrokenPipeError):
        return UNREAD
    return _say(OSError(f"standard output cannot be written: {error}"), FAILED)


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """The options. Overrides may stand behind them too, where argparse takes no more positional words."""
    options, rest = _parser().parse_known_args(arguments)
    if rest and not (hasattr(options, "overrides") and all("=" in word and word[0] != "-" for word in rest)):
        options.parser.refuse(rest)
    if rest:
        options.overrides = [*options.overrides, *rest]
    return options


def _parser() -> Parser:
    parser = Parser(
        prog="megatron-gspo",
        description="GSPO for mixture-of-experts models on Megatron-Core, with rollouts from SGLang.",
        epilog=f"megatron-gspo COMMAND --help says how a command is used, megatron-gspo explain SECTION.KEY what a "
        f"setting means.\n\nThe docs: {DOCS} to begin with; docs/configuration.md has every setting.",
    )
    parser.add_commands(
        "COMMAND",
        GROUPS,
        {name: import_module(f"megatron_gspo.commands.{name.replace('-', '_')}") for name in COMMANDS},
    )
    parser.set_defaults(run=lambda options: parser.say_commands(), parser=parser)
    return parser


def _with_room(error: OSError) -> Exception:
    """A full disk, with the room there is where the error names a file: standard output, for one, has no name."""
    if error.errno not in ROOM:
        return error
    room = f" ({free_space(Path(error.filename))})" if isinstance(error.filename, str) else ", perhaps behind > or |"
    return OSError(f"{error}{room}: make room")


def _say(error: Exception, status: int) -> int:
    print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
    return status


if __name__ == "__main__":
    sys.exit(main())
