"""Starting the ranks of a run on this machine, as torchrun would, and passing on how they ended."""

from __future__ import annotations

import logging
import os
import sys
import uuid
from collections.abc import Sequence
from pathlib import Path

from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
from torch.distributed.launcher.api import LaunchConfig, elastic_launch

from megatron_gspo.config import RunConfig
from megatron_gspo.hf.catalog import read_model
from megatron_gspo.hf.layout import check_layout


def check_before_start(config: RunConfig) -> None:
    """What can be said without a process group: raises ConfigError or LayoutError."""
    _, shape = read_model(config.model.path)
    check_layout(config.parallel, shape)


def launch(config_path: Path, overrides: Sequence[str], *, ranks: int) -> int:
    """Runs ``train`` on ``ranks`` processes; returns 0, or the exit status of the rank that failed first."""
    # Several ranks on few cores fight over them when each starts a thread a core.
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    logging.getLogger("torch.distributed.elastic").setLevel(logging.CRITICAL)  # a rank says itself what failed
    config = LaunchConfig(
        run_id=uuid.uuid4().hex,
        min_nodes=1,
        max_nodes=1,
        nproc_per_node=ranks,
        rdzv_backend="c10d",
        rdzv_endpoint="127.0.0.1:0",
        max_restarts=0,
        monitor_interval=0.1,
    )
    try:
        elastic_launch(config, sys.executable)("-m", "megatron_gspo.cli", "train", str(config_path), *overrides)
    except ChildFailedError as error:
        _, failure = error.get_first_failure()
        return failure.exitcode if failure.exitcode in (1, 2) else 1
    return 0
