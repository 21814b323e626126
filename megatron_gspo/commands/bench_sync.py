"""``megatron-gspo bench sync``."""

from __future__ import annotations

import argparse
import sys
from typing import Any

from megatron_gspo.commands.bench import positive

SUMMARY = "rate and peak memory of weight sync"
EXAMPLE = "megatron-gspo bench sync --layers 2 --repetitions 5"
DOCS = "docs/benchmarks.md"
MORE = """Starts one SGLang server on this machine's CPU with a random Qwen3-MoE (435 MB
of float32 by default) and pushes its weights by every method, beside a bare broadcast of the same bytes over gloo."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of the command."""
    parser.add_argument("--layers", type=positive, default=2, help="layers (default: %(default)s)")
    parser.add_argument("--hidden", type=positive, default=1024, help="hidden size (default: %(default)s)")
    parser.add_argument("--experts", type=positive, default=32, help="experts per layer (default: %(default)s)")
    parser.add_argument("--expert-width", type=positive, default=384, help="width of an expert (default: %(default)s)")
    parser.add_argument("--vocab", type=positive, default=16384, help="vocabulary (default: %(default)s)")
    parser.add_argument("--bucket-mb", type=positive, help="sync.bucket_mb (default: the configuration's)")
    parser.add_argument("--methods", nargs="+", help="of sync.method (default: all)")
    parser.add_argument("--repetitions", type=positive, default=5, help="turns, each of which sends it every way")


def run(options: argparse.Namespace) -> int:
    """Runs the command; returns the exit status."""
    import json

    import torch

    from megatron_gspo.quiet import mute

    mute()
    from megatron_gspo.bench import sync

    torch.set_num_threads(1)
    names = ("layers", "hidden", "experts", "expert_width", "vocab", "bucket_mb", "methods", "repetitions")
    chosen = {name: value for name in names if (value := getattr(options, name)) is not None}
    result = sync.run(sync.Settings(**chosen), lambda text: print(text, file=sys.stderr, flush=True))
    print(json.dumps(result, indent=2) if options.json else _table(result))
    return 0


def _table(result: dict[str, Any]) -> str:
    """Lines to print: the machine, a line a method, and the aim."""
    machine, settings = result["machine"], result["settings"]
    lines = [
        f"{machine['device']}, {machine['cores']} cores, torch {machine['torch']}, {machine['date']}",
        f"{result['bytes'] / 1e6:.0f} MB of float32 in buckets of {settings['bucket_mb']} MB; median of "
        f"{settings['repetitions']} turns (smallest to largest); cpu: both ends; extra: peak above the start",
        "",
        f"{'method':12} {'path':25} {'seconds':22} {'rate':>10}  {'of the broadcast':20} {'cpu s':>6} {'of it':>6} "
        f"{'trainer extra':>14} {'server extra':>13}",
    ]
    lines += [
        f"{row['method']:12} {row['path']:25} {_spread(row['seconds']):22} {_rate(row['bytes_per_s']):>10}  "
        f"{_spread(row['ratio']):20} "
        f"{row['cpu_seconds']['median']:6.2f} {row['cpu_ratio']['median']:6.2f} "
        f"{row['trainer_bytes'] / 1e6:11.0f} MB {row['server_bytes'] / 1e6:10.0f} MB"
        for row in result["rows"]
    ]
    lines.append(f'\n(aim: "distributed" at least {result["aim"]} of the broadcast)')
    return "\n".join(lines)


def _rate(bytes_per_s: float) -> str:
    return f"{bytes_per_s / 1e9:.2f} GB/s" if bytes_per_s >= 1e9 else f"{bytes_per_s / 1e6:.0f} MB/s"


def _spread(values: dict[str, float]) -> str:
    return f"{values['median']:.2f} ({values['smallest']:.2f} to {values['largest']:.2f})"
