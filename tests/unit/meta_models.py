"""What the ranks of a layout would save: real Megatron modules on the meta device, one rank after another in a process.

``python -m tests.unit.meta_models`` reads pickled ``Job``s from standard input and writes, pickled, each one's names
and shapes. It replaces functions of torch for good, so it has a process of its own (``saved``).
"""

from __future__ import annotations

import os
import pickle
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_gspo.config import ParallelConfig, RunConfig

ROOT = Path(__file__).parents[2]
Saved = list[tuple[str, tuple[int, ...]]]
"""(name, shape) of every tensor that some rank would write, as often as it would be written."""


@dataclass(frozen=True)
class Job:
    """A run, its model's config.json, and how many ranks train."""

    config: RunConfig
    model: dict[str, Any]
    world: int


def saved(jobs: list[Job]) -> list[Saved]:
    """Of each job, from a process that leaves nothing behind in this one."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, "-m", "tests.unit.meta_models"],
        input=pickle.dumps(jobs),
        capture_output=True,
        env=environment,
        check=False,
    )
    assert done.returncode == 0, done.stderr.decode()[-2000:]
    found: list[Saved] = pickle.loads(done.stdout)
    return found


def places(parallel: ParallelConfig, world: int) -> dict[tuple[int, int, int, int], int]:
    """Each distinct (tensor, pipeline, expert, expert-tensor) rank -> the first global rank that is it. Within a stage
    tensor ranks are neighbours, and so are an expert's tensor ranks and then expert ranks."""
    found: dict[tuple[int, int, int, int], int] = {}
    stage = world // parallel.pipeline
    for rank in range(world):
        within = rank % stage
        expert = within // parallel.expert_tensor % parallel.expert
        place = (within % parallel.tensor, rank // stage, expert, within % parallel.expert_tensor)
        found.setdefault(place, rank)
    return found


def run(job: Job) -> Saved:
    """All tensors, from every distinct rank. ``install`` has been called."""
    import torch
    import torch.distributed as dist
    from torch.testing._internal.distributed.fake_pg import FakeStore

    from megatron_gspo.hf.catalog import model_of
    from megatron_gspo.megatron.export import stream_weights
    from megatron_gspo.megatron.groups import make_groups
    from megatron_gspo.megatron.model import build_chunks

    family, shape = model_of(job.model, "config.json")
    found: Saved = []
    for (tensor, stage, expert, _), rank in places(job.config.parallel, job.world).items():
        dist.init_process_group("fake", store=FakeStore(), rank=rank, world_size=job.world)
        groups = make_groups(job.config.parallel)
        assert (tensor, stage, expert) == (groups.tensor.rank(), groups.pipeline.rank(), groups.expert.rank())
        with torch.device("meta"), OnMeta():
            chunks = build_chunks(job.config.model, job.config.parallel, family, shape, groups)
        for name, weight in stream_weights(chunks, family, copies=False, host=False):
            assert weight.is_meta
            found.append((name, tuple(weight.shape)))
        dist.destroy_process_group()
    return found


def install() -> Any:
    """Groups of other ranks are not made, pieces of other ranks are shaped like one's own, weights are nowhere."""
    import torch
    import torch.distributed as dist
    from megatron.core import parallel_state
    from torch.overrides import TorchFunctionMode

    from megatron_gspo.megatron import export, model

    new_group, create_group = dist.new_group, parallel_state.create_group

    def own_group(ranks: Any = None, *args: Any, backend: Any = None, **settings: Any) -> Any:
        if ranks is not None and dist.get_rank() not in ranks:
            return dist.GroupMember.NON_GROUP_MEMBER
        return new_group(ranks, *args, backend="fake", **settings)

    def own_of_megatrons(ranks: Any = None, *args: Any, **settings: Any) -> Any:
        other = ranks is not None and dist.get_rank() not in ranks
        return dist.GroupMember.NON_GROUP_MEMBER if other else create_group(ranks, *args, **settings)

    class Meta(TorchFunctionMode):
        """Whatever device is named, it is meta."""

        def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            kwargs = kwargs or {}
            return function(*args, **({**kwargs, "device": "meta"} if "device" in kwargs else kwargs))

    dist.new_group, parallel_state.create_group = own_group, own_of_megatrons
    parallel_state.generate_masked_orthogonal_rank_groups = once(parallel_state.generate_masked_orthogonal_rank_groups)
    export.gather_pieces = lambda piece, group: [piece] * group.size()  # type: ignore[assignment]
    model.device = lambda: torch.device("meta")
    return Meta


def once(function: Any) -> Any:
    """Of lists: the same groups are asked for by every rank, and working them out takes longest."""
    known: dict[str, Any] = {}

    def call(*args: Any) -> Any:
        key = repr(args)
        if key not in known:
            known[key] = function(*args)
        return [list(group) for group in known[key]]

    return call


def main() -> None:
    global OnMeta
    jobs = pickle.load(sys.stdin.buffer)
    out = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # what libraries print is not the answer
    OnMeta = install()
    with out:
        pickle.dump([run(job) for job in jobs], out)


OnMeta: Any = None

if __name__ == "__main__":
    main()
