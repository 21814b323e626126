"""``megatron-gspo status``."""

from __future__ import annotations

import argparse
from pathlib import Path

SUMMARY = "say how a run is doing"
EXAMPLE = "megatron-gspo status runs/quickstart"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("path", type=Path, metavar="RUN", help="run directory")
    parser.add_argument("--json", action="store_true", help="print JSON")


def run(options: argparse.Namespace) -> int:
    import json

    from megatron_gspo.report.status import format_status, summarise

    summary = summarise(options.path)
    print(json.dumps(summary, indent=2) if options.json else format_status(summary))
    return 0
