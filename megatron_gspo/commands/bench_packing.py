"""``megatron-gspo bench packing``."""

from __future__ import annotations

import argparse
from typing import Any

from megatron_gspo.commands.bench import positive

SUMMARY = "time and balance of the micro-batch planner"
EXAMPLE = "megatron-gspo bench packing --sequences 100000 --ranks 8 64"
DOCS = "docs/benchmarks.md"
MORE = """Sequences of four realistic mixes of lengths over
several data-parallel sizes: milliseconds on one core, the heaviest rank over the lower bound, and the number of
micro-batches over the lower bound."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of the command."""
    parser.add_argument(
        "--sequences", type=positive, default=100_000, help="sequences per mini-batch (default: %(default)s)"
    )
    parser.add_argument("--ranks", type=positive, nargs="+", default=[1, 8, 64, 512], help="data-parallel ranks")
    parser.add_argument(
        "--token-budget", type=positive, default=32768, help="tokens per micro-batch (default: %(default)s)"
    )
    parser.add_argument("--repetitions", type=positive, default=5, help="plans of each kind (default: %(default)s)")


def run(options: argparse.Namespace) -> int:
    """Runs the command; returns the exit status."""
    import json

    from megatron_gspo.bench import packing

    result = packing.run(
        sequences=options.sequences,
        ranks=tuple(options.ranks),
        token_budget=options.token_budget,
        repetitions=options.repetitions,
    )
    print(json.dumps(result, indent=2) if options.json else _table(result))
    return 0


def _table(result: dict[str, Any]) -> str:
    machine, settings = result["machine"], result["settings"]
    lines = [
        f"{machine['device']}, {machine['cores']} cores, {machine['date']}",
        f"{settings['sequences']:,} sequences, {settings['token_budget']:,} tokens per micro-batch, "
        f"{settings['repetitions']} plans; milliseconds on one core: median (smallest to largest)",
        "",
        f"{'mix':14} {'ranks':>5}  {'milliseconds':22} {'heaviest rank':>14} {'micro-batches':>14}",
    ]
    for row in result["rows"]:
        ms = row["ms"]
        spread = f"{ms['median']:6.1f} ({ms['smallest']:.1f} to {ms['largest']:.1f})"
        lines.append(
            f"{row['mix']:14} {row['ranks']:5d}  {spread:22} {row['heaviest_rank']:14.5f} {row['microbatches']:14.4f}"
        )
    return "\n".join([*lines, "", "Both ratios are to lower bounds that no plan can go below."])
