"""Ranks on this machine for the length of a measurement."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable
from typing import Any

from torch.distributed.elastic.multiprocessing.api import SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
from torch.distributed.launcher.api import elastic_launch

from megatron_gspo.errors import MegatronGspoError
from megatron_gspo.quiet import ENVIRONMENT
from megatron_gspo.runs.launch import ranks_here


def on_ranks(ranks: int, threads: int, function: Callable[..., Any], *arguments: Any) -> dict[int, Any]:
    """What ``function`` returns on each rank, by rank; a process each, with so many threads on a CPU.

    Raises MegatronGspoError when a rank fails, or when this is interrupted.
    """
    os.environ["OMP_NUM_THREADS"] = str(threads)
    for name, value in ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    logging.getLogger("torch.distributed.elastic").setLevel(logging.CRITICAL)
    try:
        with ranks_here(ranks) as config:
            results: dict[int, Any] = elastic_launch(config, function)(*arguments)
        return results
    except ChildFailedError as error:
        rank, failure = error.get_first_failure()
        raise MegatronGspoError(
            f"rank {rank} of {ranks} failed with exit status {failure.exitcode} (-9: out of memory?)"
        ) from error
    except SignalException as error:  # Ctrl-C, or a scheduler's end of the job; the ranks have been ended with it
        raise MegatronGspoError(f"ended by {error.sigval.name}") from error
