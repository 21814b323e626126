"""Time and memory of a piece of work, and what it ran on."""

from __future__ import annotations

import ctypes
import os
import platform
import time
from dataclasses import dataclass
from datetime import date
from pathlib import Path
from statistics import median
from typing import Any, Literal

import torch

from megatron_gspo.errors import DependencyError


def machine(device: torch.device) -> dict[str, Any]:
    """What every result is printed with: hardware, threads, versions, date."""
    return {
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else _cpu_name(),
        "cores": os.cpu_count(),
        "torch": torch.__version__,
        "python": platform.python_version(),
        "date": date.today().isoformat(),
    }


def _cpu_name() -> str:
    """The model name of /proc/cpuinfo, with the family and model number that tell generations apart."""
    fields: dict[str, str] = {}
    for line in Path("/proc/cpuinfo").read_text(encoding="ascii", errors="replace").splitlines():
        name, _, value = line.partition(":")
        fields.setdefault(name.strip(), value.strip())
    name = fields.get("model name", platform.machine())
    return f"{name} (family {fields['cpu family']}, model {fields['model']})" if "cpu family" in fields else name


@dataclass(frozen=True)
class Spread:
    """Several measurements of one thing."""

    median: float
    smallest: float
    largest: float

    @classmethod
    def of(cls, values: list[float]) -> Spread:
        """Median, smallest and largest."""
        return cls(median(values), min(values), max(values))


class Clock:
    """Seconds since it was made: on the wall, and of this process's threads on its cores."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._wait()
        self._wall, self._cpu = time.perf_counter(), time.process_time()

    def read(self) -> tuple[float, float]:
        """Seconds since it was made: (on the wall, of this process's threads)."""
        self._wait()
        return time.perf_counter() - self._wall, time.process_time() - self._cpu

    def _wait(self) -> None:
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)


class PeakMemory:
    """Bytes, at most, beyond what was held when it was made.

    CUDA: ``torch.cuda.max_memory_allocated``. CPU: the resident set's high-water mark (``VmHWM``), set back to the
    present size through ``/proc/self/clear_refs``, after what the allocator keeps for later has been given back.
    """

    def __init__(self, device: torch.device, process: int | Literal["self"] = "self") -> None:
        """``process``: on a CPU, the id of another one of the same user, instead of this."""
        self._device, self._process = device, process
        if device.type == "cuda":
            torch.cuda.synchronize(device)
            torch.cuda.reset_peak_memory_stats(device)
            self._start = torch.cuda.memory_allocated(device)
        else:
            ctypes.CDLL(None).malloc_trim(0)
            _reset_high_water_mark(process)
            self._start = _status_bytes("VmRSS", process)

    def read(self) -> int:
        """Most bytes held since it was made, above what there was then."""
        if self._device.type == "cuda":
            return torch.cuda.max_memory_allocated(self._device) - self._start
        return _status_bytes("VmHWM", self._process) - self._start


def _reset_high_water_mark(process: int | str) -> None:
    try:
        Path(f"/proc/{process}/clear_refs").write_text("5", encoding="ascii")
    except OSError as error:
        raise DependencyError(
            f"peak memory cannot be measured here: {error}; it needs Linux with a writable /proc/self/clear_refs"
        ) from error


def _status_bytes(field: str, process: int | str) -> int:
    for line in Path(f"/proc/{process}/status").read_text(encoding="ascii").splitlines():
        if line.startswith(f"{field}:"):
            return int(line.split()[1]) * 1024
    raise DependencyError(f"/proc/{process}/status has no {field}: peak memory is measured on Linux")


def available_bytes(device: torch.device) -> int:
    """Memory that can still be taken."""
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    import psutil

    return int(psutil.virtual_memory().available)
