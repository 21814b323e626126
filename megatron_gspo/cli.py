"""The command line: finds a command, runs it, and turns its failure into one line.

Exit status: 0 done, 1 a run failed, 2 the user's mistake (one line says which).
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from importlib import import_module
from io import TextIOWrapper
from pathlib import Path

from megatron_gspo.commands import COMMANDS, GROUPS
from megatron_gspo.commands.parsing import DOCS, Parser
from megatron_gspo.errors import MegatronGspoError, UserError
from megatron_gspo.storage import ROOM, free_space, is_mistake

FAILED, USER_ERROR = 1, 2


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs one command and returns its exit status. Raises SystemExit for help, a version and words that are wrong."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")  # not every terminal has a sign for "≥"
    options = _parse(arguments)
    try:
        return int(options.run(options))
    except UserError as error:
        return _say(error, USER_ERROR)
    except MegatronGspoError as error:
        return _say(error, FAILED)
    except OSError as error:  # a name that cannot be read or written; anything else is the machine's
        return _say(error, USER_ERROR) if is_mistake(error) else _say(_with_room(error), FAILED)
    except KeyboardInterrupt:
        return 130


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
    parser.add_commands("COMMAND", GROUPS, {name: import_module(f"megatron_gspo.commands.{name}") for name in COMMANDS})
    parser.set_defaults(run=lambda options: parser.say_commands(), parser=parser)
    return parser


def _with_room(error: OSError) -> Exception:
    """A full disk, with the room there is."""
    path = Path(error.filename) if isinstance(error.filename, str) else Path.cwd()
    return OSError(f"{error} ({free_space(path)}): make room") if error.errno in ROOM else error


def _say(error: Exception, status: int) -> int:
    print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
    return status


if __name__ == "__main__":
    sys.exit(main())
