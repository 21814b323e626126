"""``megatron-gspo bench replay``."""

from __future__ import annotations

import argparse
from typing import Any

from megatron_gspo.commands.bench import positive

SUMMARY = "bytes and time of routes, and what replay adds to a step"
EXAMPLE = "megatron-gspo bench replay --hidden 64"
DOCS = "docs/benchmarks.md"
MORE = """Routes of Qwen3-30B-A3B's shape are decoded and
checked, swapped between leaders and dealt to the ranks of a replica; steps of a small model are taken with replay off,
r2 and r3 in turns. On CPU ranks."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of the command."""
    parser.add_argument(
        "--tokens", type=positive, default=20_000, help="tokens whose routes move (default: %(default)s)"
    )
    parser.add_argument("--layers", type=positive, default=48, help="MoE layers (default: %(default)s)")
    parser.add_argument("--top-k", type=positive, default=8, help="experts per token (default: %(default)s)")
    parser.add_argument("--experts", type=positive, default=128, help="experts per layer (default: %(default)s)")
    parser.add_argument(
        "--hidden", type=positive, default=64, help="width of the stepping model (default: %(default)s)"
    )
    parser.add_argument("--repetitions", type=positive, default=10, help="times each (default: %(default)s)")


def run(options: argparse.Namespace) -> int:
    """Runs the command; returns the exit status."""
    import json

    from megatron_gspo.quiet import mute

    mute()
    from megatron_gspo.bench import replay

    result = replay.run(
        replay.Settings(
            tokens=options.tokens,
            layers=options.layers,
            top_k=options.top_k,
            experts=options.experts,
            hidden=options.hidden,
            repetitions=options.repetitions,
        )
    )
    print(json.dumps(result, indent=2) if options.json else table(result))
    return 0


def table(result: dict[str, Any]) -> str:
    """The result to read."""
    machine, settings, size, step = (result[key] for key in ("machine", "settings", "bytes", "step"))
    lines = [
        f"{machine['device']}, {machine['cores']} cores, {machine['date']}",
        f"{settings['layers']} layers, top-{settings['top_k']} of {settings['experts']} experts; processor time of one "
        f"thread, median (smallest to largest) of {settings['repetitions']}",
        "",
        f"bytes per token:  {size['reply']:,} in the server's reply, {size['kept']:,} kept and swapped by leaders, "
        f"{size['a_rank']:,.1f} to a rank of tensor 2 x pipeline 2",
        "",
        "milliseconds per 100,000 tokens",
        f"  decode and check      {_spread(result['decode'])}",
        f"  swap between leaders  {_spread(result['move']['swap'])}",
        f"  deal to a replica     {_spread(result['move']['deal'])}",
        "",
        f"milliseconds of a step: 4 mini-batches, {step['tokens']:,} tokens, 4 layers, width {settings['hidden']}",
    ]
    for mode, seconds in step["seconds"].items():
        share = f"{step['share'][mode]:+7.1%}" if mode in step["share"] else ""
        lines.append(f"  {mode:20}  {_spread(seconds, 1e3)}  {share}".rstrip())
    return "\n".join(lines)


def _spread(values: dict[str, float], factor: float = 1.0) -> str:
    middle, low, high = (factor * values[name] for name in ("median", "smallest", "largest"))
    return f"{middle:8.1f} ({low:.1f} to {high:.1f})"
