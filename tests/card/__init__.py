"""A second device for tests, so that a CPU shows what a GPU refuses: tensors of host and device that meet.

``install`` compiles ``card.cpp``, once for a release of torch, and has Megatron-Core and this package take the device
"card" for the one that they compute on. Its tensors lie in the host's memory and are computed by the CPU's kernels, but
an operation that is given some of both raises, ``numpy`` of one raises, and a tensor that was made without a device is
on the host. Numbers are those of a CPU, bit for bit.

What it cannot show: kernels, streams, and what CUDA alone has.
"""

from __future__ import annotations

import fcntl
import hashlib
import os
import subprocess
import sys
import tempfile
import types
from pathlib import Path

import torch

SOURCE = Path(__file__).with_name("card.cpp")
CARD = torch.device("privateuseone", 0)


def install() -> None:
    """Makes the device and has this process compute on it. Before anything of Megatron is imported."""
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
    directory = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "megatron_gspo"
    directory.mkdir(parents=True, exist_ok=True)
    made = directory / f"card-{key}.so"
    with open(directory / "card.lock", "w", encoding="utf-8") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not made.exists():
            with tempfile.TemporaryDirectory(dir=directory) as scratch:
                target = Path(scratch) / "card.so"
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
