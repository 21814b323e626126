"""A second device for tests, so that a CPU shows what a GPU refuses: tensors of host and device that meet.

``install`` compiles ``card.cpp``, once for a release of torch, and has Megatron-Core and this package take the device
"card" for the one that they compute on. Its tensors lie in the host's memory and are computed by the CPU's kernels, but
an operation that is given some of both raises, ``numpy`` of one raises, and a tensor that was made without a device is
on the host. What CUDA refuses under deterministic algorithms is refused too: products, unless cuBLAS was told of it
before the first, and operations that have no such form. ``RANKS_ON=card pytest ...`` runs any test's ranks on it.

What it cannot show: kernels, streams, nccl, and what CUDA alone has.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import subprocess
import sys
import tempfile
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from tests.pool import RankPool

TRIED = ("2.13",)
"""Releases of torch against which the device compiles: its interface to C++ is not kept from one to the next."""
SOURCE = Path(__file__).with_name("card.cpp")
CARD = torch.device("privateuseone", 0)
BUILD = Path(__file__).parents[2] / "build"


class CardPool(RankPool):
    """Ranks that compute on the card."""

    def run(self, world: int, function: Callable[..., Any], *args: Any, timeout: float = 240.0) -> list[Any]:
        """As ``RankPool.run``."""
        return super().run(world, on_card, function, *args, timeout=timeout)


def on_card(function: Callable[..., Any], *args: Any) -> Any:
    """What a function returns in a process that computes on the card, and does for good."""
    install()
    return function(*args)


def install() -> None:
    """Makes the device and has this process compute on it, before its first model."""
    load()
    _stand_for_cuda()


def load() -> None:
    """Makes the device ``torch.device("card")``; nobody takes it by himself."""
    if hasattr(torch, "card"):
        return
    torch.ops.load_library(str(library()))
    module = types.ModuleType("torch.card")
    answers = {
        "is_available": lambda: True,
        "is_initialized": lambda: True,
        "current_device": lambda: 0,
        "device_count": lambda: 1,
        "_is_in_bad_fork": lambda: False,
        "manual_seed_all": lambda seed: None,
        "_lazy_init": lambda: None,
        "get_rng_state": lambda device=None: torch.get_rng_state(),
        "set_rng_state": lambda state, device=None: torch.set_rng_state(state),
        "synchronize": lambda device=None: None,
    }
    module.__dict__.update(answers)
    torch._register_device_module("card", module)


def library() -> Path:
    """The compiled device, under a name that changes with its source and with torch; made where it is missing."""
    root = Path(torch.__file__).parent
    key = hashlib.sha256(SOURCE.read_bytes() + torch.__version__.encode() + sys.version.encode()).hexdigest()[:16]
    BUILD.mkdir(exist_ok=True)
    made = BUILD / f"card-{key}.so"
    with contextlib.ExitStack() as stack:
        lock = stack.enter_context((BUILD / "card.lock").open("w"))
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not made.exists():
            target = Path(stack.enter_context(tempfile.TemporaryDirectory(dir=BUILD))) / "card.so"
            include = [f"-I{root / 'include'}", f"-I{root / 'include/torch/csrc/api/include'}"]
            link = [f"-L{root / 'lib'}", "-ltorch_cpu", "-lc10", f"-Wl,-rpath,{root / 'lib'}"]
            command = ["g++", "-std=c++20", "-O0", "-w", "-fPIC", "-shared", *include, str(SOURCE), "-o", str(target)]
            subprocess.run([*command, *link], check=True, timeout=600)
            target.rename(made)
    return made


def _stand_for_cuda() -> None:
    """What asks for "cuda" gets the card, as it gets the CPU in a run without a GPU."""
    from megatron_gspo.megatron import cpu

    cpu.CPU = CARD
    cpu.install()
    torch.Tensor.cuda = lambda self, *args, **kwargs: self.to(CARD)  # type: ignore[method-assign]
