"""``megatron-gspo bench``: a benchmark a file beside this one, ``bench_NAME.py``, each written like a command."""

from __future__ import annotations

import argparse
from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from megatron_gspo.commands.parsing import Parser

SUMMARY = "measure time, memory and balance on this machine"
EXAMPLE = "megatron-gspo bench logprobs --quick"
DOCS = "docs/benchmarks.md"

BENCHMARKS = ("logprobs", "packing", "replay", "sync", "convert", "experts", "sandbox")
"""In the order in which ``--help`` lists them."""


def add_arguments(parser: Parser) -> None:
    """The options of the command."""
    modules = {name: import_module(f"megatron_gspo.commands.bench_{name}") for name in BENCHMARKS}
    parser.add_commands("BENCHMARK", {"benchmarks": BENCHMARKS}, modules)
    for benchmark in parser.commands.choices.values():
        benchmark.add_argument("--json", action="store_true", help="print JSON")


def positive(text: str) -> int:
    """An argument's type: an integer from 1."""
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{value} is not positive")
    return value


def run(options: argparse.Namespace) -> int:
    """Without the name of a benchmark: says which there are."""
    return int(options.parser.say_commands())
