"""A line that is said once, although all ranks know it."""

from __future__ import annotations

import os
import sys
import time

from megatron_gspo.supervise import first_to_say

FIRST_RANKS_TURN_S = 1.0
"""Seconds by which the first rank goes before the others in saying what failed."""


def say_once(text: str) -> None:
    """Prints a failure unless another rank has: one that the ranks agree on strikes all of them, another only one,
    and the rest then fail because it is missing."""
    if os.environ["RANK"] != "0":
        time.sleep(FIRST_RANKS_TURN_S)
    if is_first("failure"):
        print(text, file=sys.stderr, flush=True)


def is_first(key: str) -> bool:
    """Whether no other rank has asked before."""
    if (first := first_to_say(key)) is not None:
        return first
    import torch.distributed as dist

    if not dist.is_initialized():
        return True
    try:
        return dist.distributed_c10d._get_default_store().add(f"megatron_gspo/{key}", 1) == 1
    except RuntimeError:  # the store went with the rank that held it
        return True
