"""``megatron-gspo train``."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

SUMMARY = "train a policy (or fine-tune it: algorithm.name=sft)"
EXAMPLE = "megatron-gspo train examples/quickstart/gspo.toml parallel.tensor=2 train.seed=1"
MORE = "Starts its own ranks on this machine; under torchrun it is one rank of the run."


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("config", type=Path, help="TOML file")
    parser.add_argument(
        "overrides", nargs="*", default=[], metavar="section.key=value", help="settings that replace the file's"
    )


def run(options: argparse.Namespace) -> int:
    from megatron_gspo.config import load
    from megatron_gspo.config.inputs import check_inputs

    config = load(options.config, options.overrides)
    from megatron_gspo.train.rank import run_rank, world_of_torchrun

    world = world_of_torchrun()
    check_inputs(config, options.config)
    if world is not None:
        from megatron_gspo.report.recorder import RunRecorder

        return run_rank(config, RunRecorder)
    from megatron_gspo.report.text import count
    from megatron_gspo.train.launch import check_before_start, launch

    check_before_start(config)
    ranks = config.parallel.world_size()
    if sys.stderr.isatty():  # the first rank's header takes some ten seconds
        print(f"starting {count(ranks, 'rank')} ...", file=sys.stderr, flush=True)
    return launch(options.config, options.overrides, ranks=ranks, servers=config.rollout.servers)
