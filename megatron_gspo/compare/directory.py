"""A comparison's directory: who writes it, and what it holds.

compare.json                   the plan
cells/ARM/seed_003/            an ordinary run
cells/ARM/seed_003.json        its digest: the cell is finished
cells/ARM/seed_003.log         what a cell that did not finish printed
servers/                       logs of the rollout servers
report.html, comparison.json   made from compare.json and the digests alone
.lock                          locked by the one process that writes

``cells.jsonl`` in place of ``cells`` holds the digests of a comparison that is kept: it is drawn again, and not run.
"""

from __future__ import annotations

import contextlib
import json
import os
import platform
import sys
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import psutil

from megatron_gspo.compare.plan import Plan, agree
from megatron_gspo.errors import ConfigError
from megatron_gspo.report.comparison.cells import LINES
from megatron_gspo.report.rundir import lock
from megatron_gspo.storage import claiming, writing


@contextlib.contextmanager
def open_directory(plan: Plan) -> Iterator[None]:
    """Makes this process the one that writes ``plan.out``, and its plan the directory's.

    Raises ConfigError when another process writes there, or when it holds something else.
    """
    with claiming(f"--out {plan.out}", plan.out):
        plan.out.mkdir(parents=True, exist_ok=True)
    path = plan.out / "compare.json"
    if not path.is_file() and any(entry.name != ".lock" for entry in plan.out.iterdir()):
        raise ConfigError(f"--out {plan.out} holds something else than a comparison: name another directory")
    if (plan.out / LINES).is_file():
        raise ConfigError(
            f"--out {plan.out} holds a comparison that is kept in {LINES}, and runs would not be found there again: "
            f"name another directory (--redraw {plan.out} draws its page)"
        )
    with lock(plan.out / ".lock", f"--out {plan.out}"):
        existing = read_plan(path)
        if existing:
            agree(plan, existing)
        _replace(path, describe(plan, existing))
        yield


def read_plan(path: Path) -> dict[str, Any]:
    """``compare.json``; empty when there is none. Raises ConfigError for one that cannot be read."""
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}
    except (OSError, ValueError) as error:
        raise ConfigError(f"{path}: {error}") from None
    if not isinstance(record, dict) or not isinstance(record.get("seeds"), list):
        raise ConfigError(f"{path}: not a comparison's plan")
    return record


def describe(plan: Plan, existing: dict[str, Any]) -> dict[str, Any]:
    """``compare.json``: the plan with all seeds that were ever asked for, and when and where it was first started."""
    about = {
        "command": ["megatron-gspo", *sys.argv[1:]],
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
        "hardware": hardware(),
    }
    first = {name: existing[name] for name in ("created", "hardware") if name in existing}
    seeds = sorted({*existing.get("seeds", ()), *plan.record["seeds"]})
    return plan.record | about | first | {"seeds": seeds}


def hardware() -> dict[str, Any]:
    """This machine in a few words."""
    import torch

    gpus = [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())]
    return {
        "cpu": _cpu_name(),
        "cores": len(os.sched_getaffinity(0)),
        "memory_gib": round(psutil.virtual_memory().total / 2**30, 1),
        "gpu": ", ".join(gpus) or None,
    }


def _cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()


def _replace(path: Path, record: dict[str, Any]) -> None:
    unfinished = path.with_suffix(".unfinished")
    with writing(path, then="the same command continues"):
        unfinished.write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
        unfinished.replace(path)
