"""Runs Triton kernels on a CPU: in a process of its own, since ``TRITON_INTERPRET`` counts when a kernel is defined."""

from __future__ import annotations

import importlib.util
import multiprocessing as mp
import os
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from typing import Any

import pytest

needs_triton = pytest.mark.skipif(
    importlib.util.find_spec("triton") is None, reason="triton is not installed: requirements/trainer.txt has it"
)
Interpreter = Callable[..., Any]
"""Calls a function of a test module with arguments, there."""


def interpreter() -> Iterator[Interpreter]:
    """The body of a module's fixture."""
    with ProcessPoolExecutor(1, mp.get_context("spawn"), initializer=_interpret) as pool:
        yield lambda function, *arguments: pool.submit(function, *arguments).result(timeout=300)


def _interpret() -> None:
    os.environ["TRITON_INTERPRET"] = "1"
