"""A world of one rank in a process of its own, with the GPU or without it."""

from __future__ import annotations

import multiprocessing
import os
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from typing import Any, TypeVar
from unittest import mock

import pytest
import torch

T = TypeVar("T")

needs_cuda = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]
"""Marks of every test file of this directory."""

WORLD = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0"}


def on_gpu(function: Callable[..., T], *args: Any) -> T:
    """What a module-level function returns as the one rank of an nccl world."""
    return _in_a_process({}, function, args)


def on_cpu(function: Callable[..., T], *args: Any) -> T:
    """The same as the one rank of a gloo world that sees no GPU."""
    return _in_a_process({"CUDA_VISIBLE_DEVICES": ""}, function, args)


def _in_a_process(environment: dict[str, str], function: Callable[..., T], args: tuple[Any, ...]) -> T:
    spawn = multiprocessing.get_context("spawn")  # a forked process cannot use a CUDA that its parent has touched
    with mock.patch.dict(os.environ, WORLD | environment), ProcessPoolExecutor(1, mp_context=spawn) as pool:
        return pool.submit(_as_the_only_rank, function, args).result(timeout=300)


def _as_the_only_rank(function: Callable[..., T], args: tuple[Any, ...]) -> T:
    from megatron_gspo.megatron.groups import start_distributed

    start_distributed(timeout_s=120)
    try:
        return function(*args)
    finally:
        torch.distributed.destroy_process_group()
