"""The command line: finds a command, runs it, and turns its failure into one line.

Exit status: 0 done, 1 a run failed, 2 the user's mistake (one line says which).
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from importlib import import_module
from pathlib import Path

from megatron_gspo import __version__
from megatron_gspo.commands import COMMANDS
from megatron_gspo.errors import MegatronGspoError, UserError
from megatron_gspo.storage import ROOM, free_space, is_mistake

FAILED, USER_ERROR = 1, 2


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs one command and returns its exit status."""
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
    parser = _parser()
    options, rest = parser.parse_known_args(arguments)
    if rest and not (hasattr(options, "overrides") and all("=" in word and word[0] != "-" for word in rest)):
        parser.error(f"unrecognized arguments: {' '.join(rest)}")
    if rest:
        options.overrides = [*options.overrides, *rest]
    return options


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="megatron-gspo", description="GSPO on Megatron-Core with SGLang rollouts.")
    parser.add_argument("--version", action="version", version=__version__)
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    for name in COMMANDS:
        module = import_module(f"megatron_gspo.commands.{name}")
        summary: str = module.SUMMARY
        command = commands.add_parser(
            name,
            help=summary,
            description=f"{summary[0].upper()}{summary[1:]}. {getattr(module, 'MORE', '')}".strip(),
            epilog=f"example: {module.EXAMPLE}",
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        module.add_arguments(command)
        command.set_defaults(run=module.run)
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
