"""A dry run of a step at full size: the real policy, DDP and optimizer of a layout, on fake tensors, without a GPU.

``verify`` runs one rank of each kind in a process of its own and says what it would hold, send and compute
(docs/dryrun.md).
"""

from __future__ import annotations

import os
import pickle
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from megatron_gspo.config import RunConfig
from megatron_gspo.doctor.estimate import estimate
from megatron_gspo.doctor.passing import Passing, peak
from megatron_gspo.doctor.tensors import adapters_of, tensors_of
from megatron_gspo.dryrun.child import Job
from megatron_gspo.dryrun.depths import kinds_of
from megatron_gspo.dryrun.result import Collectives, DryRun, Moment, Peak, Rank
from megatron_gspo.errors import ConfigError
from megatron_gspo.hf.catalog import read_model
from megatron_gspo.hf.family import Family, ModelShape
from megatron_gspo.hf.layout import check_layout, check_recompute
from megatron_gspo.kernels.choice import Machine

__all__ = ["Collectives", "DryRun", "Moment", "Peak", "Rank", "verify", "verify_shape"]

GPU = Machine(capability=9, triton=True, apex=False)
"""An H100 with the kernels of ``make install DEVICE=cuda``, without those that ``make kernels`` compiles."""
LONGEST_S = 1800.0


def verify(
    config: RunConfig,
    model: str | Path,
    world_size: int,
    *,
    machine: Machine = GPU,
    full_depth: bool = False,
) -> DryRun:
    """What each kind of rank of a layout would hold, send and compute in a step.

    Args:
        config: the run; ``model.path`` is not read.
        model: the model's directory or its config.json; weights are not needed.
        world_size: ranks of the layout.
        machine: whose kernels are taken.
        full_depth: runs every layer, where else two depths are run and the rest follows from them.

    Raises ConfigError for what has no dry run (another dtype than bfloat16, reference kernels, latent attention),
    ConfigError or LayoutError for a layout that does not fit the model, and ConfigError with the last line of what went
    wrong in the dry run.
    """
    path = Path(model)
    family, shape = read_model(path.parent if path.name == "config.json" else path)
    return verify_shape(config, family, shape, world_size, machine=machine, full_depth=full_depth)


def verify_shape(
    config: RunConfig,
    family: Family,
    shape: ModelShape,
    world_size: int,
    *,
    machine: Machine = GPU,
    full_depth: bool = False,
) -> DryRun:
    """As ``verify``, of a model whose config.json has been read."""
    start = time.monotonic()
    _check(config, shape)
    data_size = config.parallel.data_size(world_size)
    check_layout(config.parallel, shape)
    check_recompute(config.model, config.parallel, shape)
    kinds = kinds_of(config.parallel, shape)
    jobs = [Job(config, shape, kind.stage, world_size, machine, full_depth) for kind in kinds]
    ranks = run_jobs(jobs)
    tensors = tuple(tensors_of(family, shape))
    adapters = tuple(adapters_of(family, shape, config.lora))
    sums: dict[str, float] = {}
    for kind in kinds:
        needed = estimate(
            config, shape, tensors, data_size=data_size, stage=kind.stage, adapters=adapters, machine=machine
        )
        sums[kind.name] = peak(needed.on_card(config), Passing.of(config, shape, kind.stage, data_size, machine))
    return DryRun(
        {kind.name: rank for kind, rank in zip(kinds, ranks, strict=True)},
        sums,
        time.monotonic() - start,
        full_depth=all(job.depths is None for job in jobs),
    )


def _check(config: RunConfig, shape: ModelShape) -> None:
    """Raises ConfigError for what cannot be run on fake tensors as a GPU would run it."""
    if config.model.dtype != "bfloat16" or config.model.kernels == "reference":
        raise ConfigError(
            f'model.dtype = "{config.model.dtype}", model.kernels = "{config.model.kernels}": a dry run is of bfloat16 '
            f"with the kernels of a GPU; operations of others read sizes from data, and there is none"
        )
    if shape.megatron.get("multi_latent_attention"):
        raise ConfigError(
            f"{shape.architecture} has latent attention, of which a dry run would count the scores that a GPU's kernel "
            f"does not write: there is doctor's sum alone"
        )


def run_jobs(jobs: list[Job]) -> list[Rank]:
    """Each job's rank, from a process that leaves nothing behind in this one. Raises ConfigError where it failed."""
    command = [sys.executable, "-m", "megatron_gspo.dryrun.child"]
    package = str(Path(__file__).parents[2])
    path = os.pathsep.join(filter(None, [package, os.environ.get("PYTHONPATH")]))
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1", "PYTHONPATH": path}
    with tempfile.TemporaryDirectory() as directory:
        result = Path(directory) / "result"
        done = subprocess.run(
            [*command, str(result)],
            input=pickle.dumps(jobs),
            capture_output=True,
            env=environment,
            timeout=LONGEST_S,
            check=False,
        )
        if done.returncode or not result.exists():
            lines = done.stderr.decode(errors="replace").strip().splitlines()
            raise ConfigError(f"the dry run failed: {lines[-1] if lines else f'exit status {done.returncode}'}")
        found: list[Rank] = pickle.loads(result.read_bytes())
        return found
