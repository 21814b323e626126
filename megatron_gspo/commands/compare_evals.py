"""``megatron-gspo compare-evals``."""

from __future__ import annotations

import argparse
from pathlib import Path

SUMMARY = "compare two evaluations of the same problems, and read both answers to each"
EXAMPLE = "megatron-gspo compare-evals evals/before evals/after --out before-after.html"
DOCS = "docs/evaluation.md"
MORE = (
    "A and B are directories that eval has written, of suites or of prompts. Differences are taken by problem, B\n"
    "less A, with 95% intervals over problems; the page has every problem with both answers and verdicts."
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of the command."""
    parser.add_argument("first", type=Path, metavar="A", help="evaluation, or a directory of suites")
    parser.add_argument("second", type=Path, metavar="B", help="evaluation of the same problems")
    parser.add_argument("--out", type=Path, metavar="FILE", help="page to write (default: compared.html in B)")
    parser.add_argument("--json", action="store_true", help="print the comparison as JSON")


def run(options: argparse.Namespace) -> int:
    """Runs the command; returns the exit status."""
    import json

    from megatron_gspo.report.paired_evaluations import as_json, compare, describe, write_comparison
    from megatron_gspo.storage import claiming

    pairs = compare(options.first, options.second)
    names = (str(options.first), str(options.second))
    out = options.out or options.second / "compared.html"
    with claiming(f"{out} (--out names another place)", out):
        write_comparison(pairs, names, out)
    print(
        json.dumps(as_json(pairs, names), indent=2) if options.json else f"{describe(pairs, names)}\nwritten to {out}"
    )
    return 0
