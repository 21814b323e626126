"""``megatron-gspo doctor``: what will not work, said before any training.

megatron-gspo doctor examples/quickstart/gspo.toml parallel.tensor=3
...
error    layout    4 attention heads / parallel.tensor 3 = 1.33333: it must divide
"""

from __future__ import annotations

import argparse
import contextlib
import logging
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from megatron_gspo.quiet import apart_from_stdout

if TYPE_CHECKING:
    from megatron_gspo.doctor.check import Check

SUMMARY = "say what of a configuration will not work, before any training"
EXAMPLE = "megatron-gspo doctor examples/quickstart/gspo.toml rollout.group_size=16 --json"
MORE = (
    "Looks at versions, devices, model, layout, memory, data, reward, settings, servers and disk, a line each. "
    "Exit status 0, or 2 with the first thing to mend."
)
COLOURS = {"ok": "green", "warning": "yellow", "error": "bold red"}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of the command."""
    parser.add_argument("config", type=Path, help="TOML file")
    parser.add_argument(
        "overrides", nargs="*", default=[], metavar="section.key=value", help="settings that replace the file's"
    )
    parser.add_argument(
        "--ranks", type=int, metavar="N", help="world size under torchrun (default: what it needs here)"
    )
    parser.add_argument(
        "--ranks-per-node", type=int, metavar="N", help="ranks of each machine, which this one stands for"
    )
    parser.add_argument("--json", action="store_true", help="print JSON")
    parser.set_defaults(watched=lambda options: "doctor")


def run(options: argparse.Namespace) -> int:
    """Runs the command; returns the exit status."""
    import json

    from megatron_gspo.errors import ConfigError

    for option, value in (("--ranks", options.ranks), ("--ranks-per-node", options.ranks_per_node)):
        if value is not None and value < 1:
            raise ConfigError(f"{option} = {value}: the number of ranks is at least 1")
    from megatron_gspo.doctor.catalog import CHECKS
    from megatron_gspo.doctor.check import as_json, examine, first_error
    from megatron_gspo.doctor.facts import Facts

    with quiet():
        facts = Facts(options.config, options.overrides, options.ranks, options.ranks_per_node)
        unread = facts.problem("config") is not None
        checks = examine(facts, CHECKS if options.json or not unread else CHECKS[:1])
    if options.json:
        print(json.dumps(as_json(checks), indent=2))
    elif not unread:  # else the one error says all
        show(checks)
    first = first_error(checks)
    if first is not None:
        raise ConfigError(f"{first.name}: {first.detail}" + (f" -> {first.fix}" if first.fix else ""))
    return 0


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Without the remarks of libraries; what a reward function prints goes to stderr, apart from the checks."""
    disabled = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings(), apart_from_stdout():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(disabled)


def show(checks: list[Check]) -> None:
    """A line a check, aligned; colours on a terminal only. What was not looked at for one reason is one line."""
    from rich.console import Console
    from rich.text import Text

    from megatron_gspo.doctor.check import fold, summary

    console = Console(highlight=False, soft_wrap=True)
    lines = fold(checks)
    width = max(len(line.name) for line in lines)
    for check in lines:
        fix = f"  ->  {check.fix}" if check.fix else ""
        status = (f"{check.status:7}", COLOURS[check.status])
        console.print(Text.assemble(status, f"  {check.name:{width}}  {check.detail}{fix}"))
    console.print(summary(checks))
