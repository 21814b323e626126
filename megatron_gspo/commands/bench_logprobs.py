"""``megatron-gspo bench logprobs``."""

from __future__ import annotations

import argparse
from typing import Any

from megatron_gspo.commands.bench import positive

SUMMARY = "time and peak memory of the logprob pass"
EXAMPLE = "megatron-gspo bench logprobs --tokens 1024 4096 --ranks 1 2"
DOCS = "docs/benchmarks.md"
MORE = """Forward and backward, beside the four matrix products
alone, full logits with log_softmax, and Megatron's vocab_parallel_cross_entropy. Starts a process for each tensor rank.
On a GPU: bfloat16, 4,096 and 32,768 tokens. On a CPU: float32, 1,024 and 4,096 tokens and ours alone at 32,768, which
takes more than an hour of a core; --quick takes minutes."""

CPU: dict[str, Any] = {"tokens": [1024, 4096], "alone": [32768], "dtype": "float32", "repetitions": 3}
GPU: dict[str, Any] = {"tokens": [4096, 32768], "alone": [], "dtype": "bfloat16", "repetitions": 7}
QUICK: dict[str, Any] = {"tokens": [512], "alone": [], "repetitions": 1}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of the command."""
    parser.add_argument("--tokens", type=positive, nargs="*", help="micro-batch sizes, over all tensor ranks")
    parser.add_argument("--alone", type=positive, nargs="*", help="sizes at which ours alone runs, once, for its peak")
    parser.add_argument("--ranks", type=positive, nargs="+", help="tensor ranks (default: 1 2; on one GPU: 1)")
    parser.add_argument(
        "--vocab", type=positive, default=151_936, help="rows of the output layer (default: %(default)s)"
    )
    parser.add_argument("--hidden", type=positive, default=2048, help="hidden size (default: %(default)s)")
    parser.add_argument("--chunk", type=positive, help="model.logprob_chunk (default: the configuration's)")
    parser.add_argument("--dtype", choices=["float32", "bfloat16", "float64"], help="parameters and hidden states")
    parser.add_argument("--repetitions", type=positive, help="turns, each of which runs every head once")
    parser.add_argument("--threads", type=positive, default=1, help="threads a rank, on a CPU (default: %(default)s)")
    parser.add_argument("--quick", action="store_true", help="512 tokens, once")


def run(options: argparse.Namespace) -> int:
    """Runs the command; returns the exit status."""
    import json

    import torch

    from megatron_gspo.quiet import mute

    mute()
    from megatron_gspo.bench import logprobs
    from megatron_gspo.config import ModelConfig

    gpus = torch.cuda.device_count()
    defaults = (GPU if gpus else CPU) | (QUICK if options.quick else {})
    chosen = defaults | {name: value for name in defaults if (value := getattr(options, name)) is not None}
    settings = logprobs.Settings(
        tokens=tuple(chosen["tokens"]),
        alone=tuple(chosen["alone"]),
        dtype=chosen["dtype"],
        repetitions=chosen["repetitions"],
        ranks=tuple(options.ranks or ((1,) if gpus == 1 else (1, 2))),
        vocab=options.vocab,
        hidden=options.hidden,
        chunk=options.chunk or ModelConfig.model_fields["logprob_chunk"].default,
        threads=options.threads,
    )
    result = logprobs.run(settings)
    print(json.dumps(result, indent=2) if options.json else _table(result))
    return 0


def _table(result: dict[str, Any]) -> str:
    """Lines to print: the machine, a line a head and size, and what was reached of the aims."""
    machine, settings = result["machine"], result["settings"]
    lines = [
        f"{machine['device']}, {machine['cores']} cores, {machine['threads_per_rank']} thread(s) a rank, "
        f"torch {machine['torch']}, {machine['date']}",
        f"vocabulary {settings['vocab']:,}, hidden {settings['hidden']:,}, {settings['dtype']}, "
        f"chunk {settings['chunk']:,}; seconds: median (smallest to largest); cpu: seconds of a rank's threads; "
        "extra: peak above the inputs",
        "",
        f"{'tokens':>7} {'ranks':>5}  {'head':14} {'forward':>8} {'backward':>8}  {'total':24} {'cpu':>8} {'extra':>9}",
    ]
    for row in result["rows"]:
        total = row["total_s"]
        spread = f"{total['median']:8.3f} ({total['smallest']:.3f} to {total['largest']:.3f})"
        lines.append(
            f"{row['tokens']:7d} {row['ranks']:5d}  {row['head']:14} {row['forward_s']['median']:8.3f} "
            f"{row['backward_s']['median']:8.3f}  {spread:24} {row['cpu_s']['median']:8.3f} "
            f"{row['extra_bytes'] / 1e6:6.0f} MB"
        )
    lines.append("")
    for ratio in result["ratios"]:
        memory = "not measured" if ratio["memory"] is None else f"{ratio['memory']:.3f}"
        lines.append(
            f"{ratio['tokens']} tokens, {ratio['ranks']} rank(s): {ratio['time']:.3f} times the products' time "
            f"({ratio['cpu_time']:.3f} in processor time; aim: at most {ratio['time_aim']}), "
            f"{memory} of the extra memory of full logits (aim: below {ratio['memory_aim']})"
        )
    return "\n".join(lines)
