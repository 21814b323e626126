"""The process in which a dry run is run: it replaces much of torch and never gives it back.

``python -m megatron_gspo.dryrun.child RESULT`` reads pickled ``Job``s from standard input, which ``verify`` writes,
and writes what it found to the file RESULT. Each run has a process of its own, forked from this one when all is
imported: Megatron and torch keep groups and buffers that would be there for the next.
"""

from __future__ import annotations

import multiprocessing
import os
import pickle
import sys
from dataclasses import dataclass
from pathlib import Path

from megatron_gspo.config import RunConfig
from megatron_gspo.dryrun.depths import chunks_of, composed, depths_for, shortened
from megatron_gspo.dryrun.result import Rank
from megatron_gspo.hf.catalog import FAMILIES
from megatron_gspo.hf.family import ModelShape
from megatron_gspo.kernels.choice import Machine

AT_ONCE = 4
"""Runs at the same time, at most: each has most of a GiB of imported code."""


@dataclass(frozen=True)
class Job:
    """One stage's rank of a model, as ``verify`` asks for it."""

    config: RunConfig
    shape: ModelShape
    stage: int
    world_size: int
    machine: Machine
    full_depth: bool = False

    @property
    def depths(self) -> tuple[int, int] | None:
        """Layers of the two runs from which the rest follows; None where all layers are run."""
        chunks = chunks_of(self.stage, self.config.parallel, self.shape)
        return None if self.full_depth else depths_for(self.config.model, chunks)


def run(jobs: list[Job]) -> list[Rank]:
    """Each job's rank."""
    runs = []
    for job in jobs:
        short = [shortened(job.config, job.shape, job.stage, depth) for depth in job.depths or ()]
        runs += [(job, *given) for given in short or [(job.config, job.shape)]]
    processes = min(AT_ONCE, len(runs), len(os.sched_getaffinity(0)))
    with multiprocessing.get_context("fork").Pool(processes, maxtasksperchild=1) as pool:
        ranks = iter(pool.starmap(_run_one, runs, chunksize=1))
    return [_rank(job, next(ranks), next(ranks) if job.depths else None) for job in jobs]


def _rank(job: Job, few: Rank, more: Rank | None) -> Rank:
    if more is None or job.depths is None:
        return few
    layers = len(chunks_of(job.stage, job.config.parallel, job.shape)[0])
    return composed(few, more, (layers - job.depths[0]) / (job.depths[1] - job.depths[0]))


def _run_one(job: Job, config: RunConfig, shape: ModelShape) -> Rank:
    from megatron_gspo.dryrun import standins, step
    from megatron_gspo.dryrun.meter import Meter

    meter = Meter()
    standins.install(meter, job.machine)
    return step.run_rank(config, (FAMILIES[shape.architecture], shape), meter, stage=job.stage, size=job.world_size)


def main(result: Path) -> None:
    """Runs what standard input holds."""
    jobs = pickle.load(sys.stdin.buffer)
    from megatron_gspo.dryrun import standins, step  # before the forks

    assert standins and step
    result.write_bytes(pickle.dumps(run(jobs)))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
