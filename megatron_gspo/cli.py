"""The command line: parse, build, run.

Exit status: 0 done, 1 a run failed, 2 the user's mistake (one line says which).
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path

from megatron_gspo import __version__
from megatron_gspo.errors import MegatronGspoError, UserError

FAILED, USER_ERROR = 1, 2


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs one command and returns its exit status."""
    options = _parser().parse_args(arguments)
    try:
        return int(options.run(options))
    except UserError as error:
        return _say(error, USER_ERROR)
    except MegatronGspoError as error:
        return _say(error, FAILED)
    except OSError as error:  # a file that cannot be read or written
        return _say(error, USER_ERROR)
    except KeyboardInterrupt:
        return 130


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="megatron-gspo", description="GSPO on Megatron-Core with SGLang rollouts.")
    parser.add_argument("--version", action="version", version=__version__)
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    train = _command(
        commands,
        "train",
        "train a policy (or fine-tune it: algorithm.name=sft)",
        "megatron-gspo train examples/quickstart/gspo.toml parallel.tensor=2 train.seed=1",
        "Starts its own ranks on this machine; under torchrun it is one rank of the run.",
    )
    train.add_argument("config", type=Path, help="TOML file")
    train.add_argument("overrides", nargs="*", metavar="section.key=value", help="settings that replace the file's")
    train.set_defaults(run=_train)

    report = _command(
        commands,
        "report",
        "write one HTML page for one run or several",
        "megatron-gspo report runs/a runs/b --out ab.html",
    )
    report.add_argument("runs", nargs="+", type=Path, metavar="RUN", help="run directory")
    report.add_argument("--out", type=Path, help="file to write (default: report.html in the first run)")
    report.set_defaults(run=_report)

    status = _command(commands, "status", "say how a run is doing", "megatron-gspo status runs/quickstart")
    status.add_argument("path", type=Path, metavar="RUN", help="run directory")
    status.add_argument("--json", action="store_true", help="print JSON")
    status.set_defaults(run=_status)
    return parser


def _command(
    commands: argparse._SubParsersAction[argparse.ArgumentParser], name: str, summary: str, example: str, more: str = ""
) -> argparse.ArgumentParser:
    return commands.add_parser(
        name,
        help=summary,
        description=f"{summary[0].upper()}{summary[1:]}. {more}".strip(),
        epilog=f"example: {example}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )


def _train(options: argparse.Namespace) -> int:
    from megatron_gspo.config import load

    config = load(options.config, options.overrides)
    if "RANK" in os.environ:
        from megatron_gspo.report.recorder import RunRecorder
        from megatron_gspo.train.rank import run_rank

        return run_rank(config, RunRecorder)
    from megatron_gspo.train.launch import check_before_start, launch

    check_before_start(config)
    return launch(options.config, options.overrides, ranks=config.parallel.world_size())


def _report(options: argparse.Namespace) -> int:
    from megatron_gspo.report.html import write_report

    print(write_report(options.runs, options.out or options.runs[0] / "report.html"))
    return 0


def _status(options: argparse.Namespace) -> int:
    import json

    from megatron_gspo.report.status import format_status, summarise

    summary = summarise(options.path)
    print(json.dumps(summary, indent=2) if options.json else format_status(summary))
    return 0


def _say(error: Exception, status: int) -> int:
    print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
    return status


if __name__ == "__main__":
    sys.exit(main())
