"""A checkpoint as a Hugging Face directory, made by one process of its own: its memory is free before servers start."""

from __future__ import annotations

import multiprocessing
import os
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path

from megatron_gspo.config import ParallelConfig, RunConfig
from megatron_gspo.errors import MegatronGspoError
from megatron_gspo.quiet import mute


def export_checkpoint(config: RunConfig, checkpoint: Path, directory: Path) -> int:
    """Writes ``checkpoint``, of whatever layout, to ``directory``; returns the optimizer steps it has taken.

    The process holds the whole model once, in ``model.dtype``, without optimizer state. Raises UserError for what is
    wrong with the checkpoint or the model, MegatronGspoError when the process is killed.
    """
    single = config.model_copy(update={"parallel": ParallelConfig()})
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        try:
            return pool.submit(_export, single, checkpoint, directory).result()
        except BrokenProcessPool:
            raise MegatronGspoError(
                f"{checkpoint}: the process that loaded it was killed: is the machine out of memory?"
            ) from None


def _export(config: RunConfig, checkpoint: Path, directory: Path) -> int:
    """Runs in the child, which is a world of one rank."""
    mute()
    from megatron_gspo.megatron.checkpoint import load_checkpoint
    from megatron_gspo.megatron.groups import make_groups, start_distributed
    from megatron_gspo.megatron.policy import Policy
    from megatron_gspo.runs.save import save_hugging_face

    os.environ |= {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0"}
    start_distributed()
    groups = make_groups(config.parallel)
    policy = Policy(config, groups, trainable=False)
    extra = load_checkpoint({"policy": policy}, checkpoint)
    save_hugging_face(policy, config, groups, directory)
    return int(extra["optimizer_step"])
