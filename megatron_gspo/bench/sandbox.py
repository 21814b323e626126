"""Programs a second through the sandbox of this machine, and whether each verdict is right."""

from __future__ import annotations

import asyncio
import os
import random
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch

from megatron_gspo.bench.measure import machine
from megatron_gspo.config import SandboxConfig
from megatron_gspo.sandbox import Limits, Program, Sandbox, Verdict, open_sandbox

LIMITS = Limits(wall_s=60.0, cpu_s=10.0)
HEADERS = {"iostream": "iostream", "precompiled": "bits/stdc++.h"}
"""What a C++ program includes, by the name of its row."""


@dataclass(frozen=True)
class Settings:
    """What is run."""

    programs: int
    """Right programs, and as many wrong ones, in Python."""
    compiles: int
    """C++ programs of each kind of header, half of them wrong."""
    concurrency: int | None
    seed: int = 1


@dataclass(frozen=True)
class Trial:
    """A program of a task whose answer is known."""

    program: Program
    given: bytes
    expected: bytes
    right: bool
    """Whether the program does the task."""


def run(settings: Settings) -> dict[str, Any]:
    """Programs a second and verdicts, with the machine that they were measured on."""
    return asyncio.run(_run(settings))


async def _run(settings: Settings) -> dict[str, Any]:
    draw = random.Random(settings.seed)
    python = [_python(draw, right=index % 2 == 0) for index in range(2 * settings.programs)]
    rows = [{"programs": "python", **await _measured(settings, [], python)}]
    for name, header in HEADERS.items():
        first = [_cpp(draw, header, right=True)]  # makes the precompiled header
        trials = [_cpp(draw, header, right=index % 2 == 0) for index in range(settings.compiles)]
        rows.append({"programs": f"c++, {name}", **await _measured(settings, first, trials)})
    concurrency = settings.concurrency or len(os.sched_getaffinity(0))
    return {"machine": machine(torch.device("cpu")), "concurrency": concurrency, "rows": rows}


async def _measured(settings: Settings, first: list[Trial], trials: list[Trial]) -> dict[str, Any]:
    """One row, in a sandbox of its own: what that has taken is known when it has ended. ``first`` are not counted.
    Programs are handed over a few thousand at a time."""
    seen: Counter[str] = Counter()
    start = _cpu_s()
    async with open_sandbox(SandboxConfig(concurrency=settings.concurrency)) as sandbox:
        for trial in first:
            await sandbox.run(trial.program, [trial.given], LIMITS)
        own, began = time.process_time(), time.perf_counter()
        for some in _pieces(trials, 2000):
            seen.update(await asyncio.gather(*(_verdict(sandbox, trial) for trial in some)))
        seconds, own = time.perf_counter() - began, time.process_time() - own
    return {
        "count": len(trials),
        "seconds": seconds,
        "per_second": len(trials) / seconds,
        "trainer_cpu_ms": 1000 * own / len(trials),
        "cpu_ms": 1000 * (_cpu_s() - start) / len(trials) if not first else None,
        "load": os.getloadavg()[0],
        "wrong_verdicts": sum(number for words, number in seen.items() if words.startswith("not ")),
        "verdicts": dict(sorted(seen.items())),
    }


async def _verdict(sandbox: Sandbox, trial: Trial) -> str:
    """What was said of a program, with "not " before it where that is false."""
    (outcome,) = await sandbox.run(trial.program, [trial.given], LIMITS)
    passed = outcome.verdict is Verdict.OK and outcome.stdout.split() == trial.expected.split()
    words = "passed" if passed else "other output" if outcome.verdict is Verdict.OK else str(outcome.verdict)
    false = passed != trial.right or outcome.verdict is Verdict.FAILED
    return f"not {words}" if false else words


def _pieces(trials: list[Trial], size: int) -> Iterator[list[Trial]]:
    for start in range(0, len(trials), size):
        yield trials[start : start + size]


def _python(draw: random.Random, *, right: bool) -> Trial:
    """A task of two numbers. A wrong program is off by one, raises, does not parse, or prints nothing."""
    a, b = draw.randrange(10**6), draw.randrange(10**6)
    sign = draw.choice("+-*^")
    answer = {"+": a + b, "-": a - b, "*": a * b, "^": a ^ b}[sign]
    source = f"a, b = map(int, input().split())\nprint(a {sign} b)\n"
    if not right:
        spoiled = (
            f"a, b = map(int, input().split())\nprint((a {sign} b) + 1)\n",
            f"a, b = map(int, input().split())\nprint(a {sign} c)\n",
            f"a, b = map(int, input().split()\nprint(a {sign} b)\n",
            f"a, b = map(int, input().split())\na {sign} b\n",
            "import sys\nsys.exit(3)\n",
        )
        source = draw.choice(spoiled)
    return Trial(Program("python", source), f"{a} {b}\n".encode(), str(answer).encode(), right)


def _cpp(draw: random.Random, header: str, *, right: bool) -> Trial:
    """As ``_python``; a wrong one of these is off by one, crashes, or does not compile."""
    a, b = draw.randrange(10**4), draw.randrange(10**4)
    says = "a * b" if right else draw.choice(("a * b + 1", "*(volatile int *)0", "a * c"))
    source = f"#include <{header}>\nint main() {{ int a, b; std::cin >> a >> b; std::cout << {says} << std::endl; }}\n"
    return Trial(Program("cpp", source), f"{a} {b}\n".encode(), str(a * b).encode(), right)


def _cpu_s() -> float:
    """Processor seconds of this process and of all its children that have ended, with theirs."""
    return sum(os.times()[:4])
