"""``megatron-gspo bench convert``."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

SUMMARY = "rate and peak memory of convert, both ways, beside cp"
EXAMPLE = "megatron-gspo bench convert --gb 4 --json"
DOCS = "docs/benchmarks.md"
MORE = """Makes a random Qwen3-MoE checkpoint (128
experts per layer), converts it to Megatron's format and back, copies its files with cp, and compares what came back."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of the command."""
    parser.add_argument("--gb", type=float, default=4.0, help="size of the checkpoint, 1e9 bytes (default: 4)")
    parser.add_argument("--directory", type=Path, default=Path("."), help="where to write (default: here)")
    parser.add_argument("--keep", action="store_true", help="leave the checkpoints there")


def run(options: argparse.Namespace) -> int:
    """Runs the command; returns the exit status."""
    import json

    from megatron_gspo.bench import convert
    from megatron_gspo.errors import ConfigError

    if not options.gb > 0:
        raise ConfigError(f"--gb {options.gb:g}: it must be above 0")
    result = convert.run(gb=options.gb, directory=options.directory, keep=options.keep)
    print(json.dumps(result, indent=2) if options.json else _table(result))
    return 0 if result["same_bytes"] else 1


def _table(result: dict[str, Any]) -> str:
    machine, checkpoint = result["machine"], result["checkpoint"]
    lines = [
        f"{machine['device']}, {machine['cores']} cores, torch {machine['torch']}, {machine['date']}",
        f"{checkpoint['bytes'] / 1e9:.2f} GB, {checkpoint['layers']} layers of {checkpoint['experts']} experts "
        f"({checkpoint['layer_experts_bytes'] / 1e9:.2f} GB of experts per layer)",
        f"cp: {result['cp']['bytes_per_s'] / 1e6:.0f} MB/s",
    ]
    for row in result["rows"]:
        extra = row["peak_rss_bytes"] - row["start_rss_bytes"]
        lines.append(
            f"to {row['to']}: {row['bytes_per_s'] / 1e6:.0f} MB/s, {row['of_cp']:.2f} of cp's rate (aim: "
            f"{row['aim']}); peak memory {row['peak_rss_bytes'] / 1e9:.2f} GB, {extra / 1e9:.2f} GB above the start"
        )
    return "\n".join([*lines, f"the same bytes came back: {'yes' if result['same_bytes'] else 'NO'}"])
