"""A rank that is done has ended its process groups, with their threads, before its process ends."""

from __future__ import annotations

import os
import time

import torch
import torch.distributed as dist

from megatron_gspo.runs.rank import leave_world
from tests.pool import RankPool


def threads_before_and_after() -> tuple[int, int, bool]:
    for _ in range(3):
        dist.all_gather_object([None, None], {"a": 1}, group=dist.new_group())
    dist.all_reduce(torch.ones(10))
    before = len(os.listdir("/proc/self/task"))
    leave_world()
    deadline = time.monotonic() + 30
    while (after := len(os.listdir("/proc/self/task"))) > 2 and time.monotonic() < deadline:
        time.sleep(0.01)  # the kernel lists one that has been waited for a moment longer
    return before, after, dist.is_initialized()


def test_a_rank_that_is_done_leaves_no_thread_of_gloo(ranks: RankPool) -> None:
    for before, after, initialized in ranks.run(2, threads_before_and_after):
        assert before > 4, "each group has threads of its own"
        assert after <= 2
        assert not initialized
