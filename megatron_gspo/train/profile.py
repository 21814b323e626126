"""Traces of chosen outer steps, for https://ui.perfetto.dev or chrome://tracing."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch.distributed as dist
from torch.profiler import ProfilerActivity, profile

from megatron_gspo.config import RunConfig
from megatron_gspo.megatron.groups import Groups
from megatron_gspo.parallel.exchange import together
from megatron_gspo.platforms import CUDA, here
from megatron_gspo.storage import writing

DIRECTORY = "profile"
"""Of the traces, in the run directory."""


class Profiles:
    """Writes ``profile/outer_00003-rank0.json.gz``, one a rank, for each outer step of ``train.profile_steps``.

    A trace has the operators of the step's threads and, on a GPU, its kernels (not run on a GPU yet); ranges named
    "phase: train", "model: forward" and so on say what they are of. A profiled step is slower, and its clocks say so.
    """

    def __init__(self, config: RunConfig, groups: Groups) -> None:
        self._steps, self._world = config.train.profile_steps, groups.world
        self._root = Path(config.train.run_dir).absolute() / DIRECTORY  # a reward may chdir

    @contextmanager
    def step(self, number: int) -> Iterator[None]:
        """Around an outer step; ``number``: of those before it. Collective. Raises WriteError on every rank."""
        if number + 1 not in self._steps:
            yield
            return
        activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if here() is CUDA else [])]
        with profile(activities=activities) as trace:
            yield
        together(lambda: self._write(trace, f"outer_{number + 1:05d}-rank{dist.get_rank()}.json.gz"), self._world)

    def _write(self, trace: profile, name: str) -> None:
        with writing(self._root, "the profile", "train.profile_steps = [] writes none"):
            self._root.mkdir(parents=True, exist_ok=True)
            trace.export_chrome_trace(str(self._root / name))
