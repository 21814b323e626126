"""``megatron-gspo bench experts``."""

from __future__ import annotations

import argparse
from typing import Any

from megatron_gspo.commands.bench import positive

SUMMARY = "time of a layer's experts: grouped products against one expert after the other"
EXAMPLE = "megatron-gspo bench experts --widths 64 256 --rows 8"
DOCS = "docs/benchmarks.md"
MORE = """Forward and backward of a layer's experts, by each
form of the product, in turns within one process; the form that a run would take is marked."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of the command."""
    parser.add_argument("--widths", type=positive, nargs="+", default=[64, 256, 1024], help="hidden sizes")
    parser.add_argument("--experts", type=positive, default=128, help="experts (default: %(default)s)")
    parser.add_argument("--rows", type=positive, default=8, help="tokens of each expert (default: %(default)s)")
    parser.add_argument(
        "--dtype", choices=("float32", "bfloat16", "float64"), default="float32", help="default: %(default)s"
    )
    parser.add_argument("--repetitions", type=positive, default=9, help="passes of each form (default: %(default)s)")


def run(options: argparse.Namespace) -> int:
    """Runs the command; returns the exit status."""
    import json

    import torch

    from megatron_gspo.bench import experts

    torch.set_num_threads(1)
    settings = experts.Settings(
        tuple(options.widths), options.experts, options.rows, options.dtype, options.repetitions
    )
    result = experts.run(settings)
    print(json.dumps(result, indent=2) if options.json else _table(result))
    return 0


def _table(result: dict[str, Any]) -> str:
    machine, settings = result["machine"], result["settings"]
    lines = [
        f"{machine['device']}, one thread, torch {machine['torch']}, {machine['date']}",
        f"{settings['experts']} experts of {settings['rows']} tokens, {settings['dtype']}, forward and backward, "
        f"{settings['repetitions']} passes in turns; milliseconds: median (smallest to largest)",
        "",
        f"{'width':>5}  {'form':12} {'milliseconds':26} {'sequential / this':>17}",
    ]
    sequential = {row["width"]: row["ms"]["median"] for row in result["rows"] if row["form"] == "sequential"}
    for row in result["rows"]:
        ms = row["ms"]
        spread = f"{ms['median']:7.2f} ({ms['smallest']:.2f} to {ms['largest']:.2f})"
        ratio = sequential[row["width"]] / ms["median"]
        chosen = "  chosen" if row["chosen"] else ""
        lines.append(f"{row['width']:5d}  {row['form']:12} {spread:26} {ratio:17.2f}{chosen}")
    return "\n".join(lines)
