"""``megatron-gspo bench``: a benchmark a file beside this one, ``bench_NAME.py``, each written like a command."""

from __future__ import annotations

import argparse
from importlib import import_module

SUMMARY = "measure time, memory and balance on this machine"
EXAMPLE = "megatron-gspo bench logprobs --quick"

BENCHMARKS = ("logprobs", "packing", "replay", "sync", "convert")
"""In the order in which ``--help`` lists them."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    benchmarks = parser.add_subparsers(required=True, metavar="BENCHMARK")
    for name in BENCHMARKS:
        module = import_module(f"megatron_gspo.commands.bench_{name}")
        summary: str = module.SUMMARY
        benchmark = benchmarks.add_parser(
            name,
            help=summary,
            description=f"{summary[0].upper()}{summary[1:]}. {module.MORE}",
            epilog=f"example: {module.EXAMPLE}",
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        module.add_arguments(benchmark)
        benchmark.add_argument("--json", action="store_true", help="print JSON")
        benchmark.set_defaults(benchmark=module.run)


def positive(text: str) -> int:
    """An argument's type: an integer from 1."""
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{value} is not positive")
    return value


def run(options: argparse.Namespace) -> int:
    return int(options.benchmark(options))
