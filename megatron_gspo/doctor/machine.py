"""The machine that this process runs on: processors, memory, accelerators. Pure reading."""

from __future__ import annotations

import ctypes
import os
from dataclasses import dataclass
from pathlib import Path

import psutil

CGROUP = Path("/sys/fs/cgroup")


@dataclass(frozen=True)
class Machine:
    """What this machine has."""

    cores: int
    """Processors that this process may run on."""
    free_memory: int
    """Bytes: what the system has available, or what is left of the control group's limit (a container, a Slurm job)."""
    gpus: tuple[tuple[int, int], ...]
    """(free, total) bytes of each CUDA device that this process sees."""
    driver: str = ""
    """The newest CUDA that NVIDIA's driver runs; empty without one. (A driver too old for torch shows no device.)"""

    @property
    def device(self) -> str:
        """``cuda`` or ``cpu``."""
        return "cuda" if self.gpus else "cpu"


def look_at_machine() -> Machine:
    """Asks torch and the system."""
    import torch

    from megatron_gspo.platforms import CUDA, here

    count = torch.cuda.device_count() if here() is CUDA else 0
    return Machine(
        cores=len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1,
        free_memory=min(psutil.virtual_memory().available, _left_in_control_group()),
        gpus=tuple(torch.cuda.mem_get_info(index) for index in range(count)),
        driver=_cuda_of_driver(),
    )


def _cuda_of_driver(library: str = "libcuda.so.1") -> str:
    """ "13.0", asked of the driver itself; not run on a GPU yet."""
    try:
        driver = ctypes.CDLL(library)
    except OSError:
        return ""
    version = ctypes.c_int()
    if driver.cuDriverGetVersion(ctypes.byref(version)):
        return ""
    return f"{version.value // 1000}.{version.value % 1000 // 10}"


def _left_in_control_group(root: Path = CGROUP) -> int:
    """Bytes under ``memory.max`` of control groups version 2; no limit when there is none to read.

    File cache counts as used there, and is given back when it is asked for.
    """
    try:
        limit, used = ((root / name).read_text().strip() for name in ("memory.max", "memory.current"))
        cache = dict(line.split() for line in (root / "memory.stat").read_text().splitlines()).get("inactive_file", "0")
        return int(limit) - int(used) + int(cache)
    except (OSError, ValueError):  # no such file, or "max"
        return 2**63


def gib(size: float) -> str:
    """Bytes as a short text: "1.53 GiB", "480 MiB", "16,700 GiB"."""
    for unit, factor in (("GiB", 2**30), ("MiB", 2**20)):
        if size >= factor:
            value = size / factor
            return f"{value:,.0f} {unit}" if value >= 999.5 else f"{value:.3g} {unit}"
    return f"{size / 2**10:.3g} KiB"
