"""``megatron-gspo report``."""

from __future__ import annotations

import argparse
from pathlib import Path

SUMMARY = "write one HTML page for one run or several"
EXAMPLE = "megatron-gspo report runs/a runs/b --out ab.html"
DOCS = "docs/metrics.md"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of the command."""
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUN", help="run directory")
    parser.add_argument("--out", type=Path, help="file to write (default: report.html in the first run)")


def run(options: argparse.Namespace) -> int:
    """Runs the command; returns the exit status."""
    from megatron_gspo.report.html import write_report
    from megatron_gspo.storage import claiming

    out = options.out or options.runs[0] / "report.html"
    with claiming(f"{out} (--out names another place)", out):
        print(write_report(options.runs, out))
    return 0
