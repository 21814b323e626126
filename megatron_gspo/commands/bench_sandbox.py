"""``megatron-gspo bench sandbox``."""

from __future__ import annotations

import argparse
from typing import Any

from megatron_gspo.commands.bench import positive

SUMMARY = "programs a second in the sandbox, Python and C++, and whether every verdict is right"
EXAMPLE = "megatron-gspo bench sandbox --programs 10000"
DOCS = "docs/benchmarks.md"
MORE = """Tiny programs whose verdict is known, right and wrong ones by turns,
each in namespaces of its own. Exit status 1 when a verdict is wrong."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of the command."""
    parser.add_argument(
        "--programs",
        type=positive,
        default=500,
        help="right ones in Python, and as many wrong ones (default: %(default)s)",
    )
    parser.add_argument(
        "--compiles", type=positive, default=20, help="C++ programs of each kind of header (default: %(default)s)"
    )
    parser.add_argument("--concurrency", type=positive, help="programs at once (default: one a core)")


def run(options: argparse.Namespace) -> int:
    """Runs the command; returns the exit status."""
    import json

    from megatron_gspo.bench import sandbox

    result = sandbox.run(sandbox.Settings(options.programs, options.compiles, options.concurrency))
    print(json.dumps(result, indent=2) if options.json else _table(result))
    return int(any(row["wrong_verdicts"] for row in result["rows"]))


def _table(result: dict[str, Any]) -> str:
    machine = result["machine"]
    lines = [
        f"{machine['device']}, {machine['cores']} cores, {result['concurrency']} programs at once; {machine['date']}"
    ]
    lines.append(
        f"{'programs':18}{'count':>8}{'a second':>10}{'CPU ms':>8}{'trainer ms':>12}{'load':>6}{'wrong verdicts':>16}"
    )
    for row in result["rows"]:
        cpu_ms = "" if row["cpu_ms"] is None else f"{row['cpu_ms']:.1f}"
        lines.append(
            f"{row['programs']:18}{row['count']:8}{row['per_second']:10.1f}{cpu_ms:>8}"
            f"{row['trainer_cpu_ms']:12.2f}{row['load']:6.1f}{row['wrong_verdicts']:16}"
        )
        lines.append("    " + ", ".join(f"{words} {number}" for words, number in row["verdicts"].items()))
    return "\n".join(lines)
