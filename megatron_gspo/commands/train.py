"""``megatron-gspo train``."""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path

SUMMARY = "train a policy (or fine-tune it: algorithm.name=sft)"
EXAMPLE = "megatron-gspo train examples/quickstart/gspo.toml parallel.tensor=2 train.seed=1"
MORE = "Starts its own ranks on this machine; under torchrun it is one rank of the run."


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of the command."""
    parser.add_argument("config", type=Path, help="TOML file")
    parser.add_argument(
        "overrides", nargs="*", default=[], metavar="section.key=value", help="settings that replace the file's"
    )
    parser.set_defaults(watched=lambda options: f"rank {os.environ['RANK']}" if "RANK" in os.environ else None)


def run(options: argparse.Namespace) -> int:
    """Runs the command; returns the exit status."""
    from megatron_gspo.config import load
    from megatron_gspo.config.inputs import check_inputs

    config = load(options.config, options.overrides)
    from megatron_gspo.runs.rank import run_rank, world_of_torchrun

    world = world_of_torchrun()
    check_inputs(config, options.config)
    if world is not None:
        from megatron_gspo.report.recorder import RunRecorder

        return run_rank(config, RunRecorder)
    from megatron_gspo.hooks import run_at_end
    from megatron_gspo.report.text import count
    from megatron_gspo.runs.launch import check_before_start, launch
    from megatron_gspo.runs.restarts import Restarts

    check_before_start(config)
    ranks = config.parallel.world_size()
    if sys.stderr.isatty():  # the first rank's header takes some ten seconds
        print(f"starting {count(ranks, 'rank')} ...", file=sys.stderr, flush=True)
    run_dir = Path(config.train.run_dir)
    status = launch(
        options.config,
        options.overrides,
        ranks=ranks,
        servers=config.rollout.places,
        run_dir=run_dir,
        restarts=Restarts(run_dir, config.train.max_restarts, resumes=config.train.resume),
    )
    status = status or check_finished(run_dir)
    if config.train.on_end:
        run_at_end(config.train.on_end, status, config.train.hook_timeout_s, str(run_dir.absolute()))
    return status


def check_finished(run_dir: Path) -> int:
    """0 where the run's manifest says that it is finished, whatever its processes' exit statuses say; else 1."""
    from megatron_gspo.report.rundir import RunDirectory

    said = RunDirectory(run_dir).manifest().get("status")
    if said == "finished":
        return 0
    print(f"error: every rank ended with status 0, but {run_dir}/manifest.json says {said!r}", file=sys.stderr)
    return 1
