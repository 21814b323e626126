"""Watches what the processes of a long run hold: `python tools/growth.py DIRECTORY [--steps 500] [--figure FILE.svg]`.

Trains the quickstart's random model (examples/quickstart/prepare.py writes it into DIRECTORY) with two ranks and a
server of its own, and samples memory, file descriptors, threads and shared memory of every process by outer step.
Exits with 1 where something still grows after the first hundred.
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import sys
import time
from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import median
from typing import Any

import psutil

ROOT = Path(__file__).parents[1]
WARM_UP = 100
"""Outer steps before growth counts."""
MOST_GROWTH = {"memory_mib": 16.0, "descriptors": 0, "threads": 0, "shared": 0}
"""By which the median of the last fifth of the steps may exceed that of the fifth after the warm-up. Memory that an
allocator keeps moves by some MiB; a leak of 100 kB a step is 32 MiB."""
MAPPED = re.compile(r"(/dev/shm/.*)$", re.MULTILINE)
ROLES = {"launcher", "rank 0", "rank 1", "server", "server's scheduler", "server's detokenizer"}
Sample = dict[str, float]


def settings(directory: Path, steps: int) -> list[str]:
    """A tiny run: 8 responses a step, weights through files in shared memory, no evaluation."""
    return [
        f'model.path="{directory}/model"',
        f'data.path="{directory}/train.jsonl"',
        'data.eval_path=""',
        f'train.run_dir="{directory}/run"',
        f"train.outer_steps={steps}",
        "train.prompts_per_step=4",
        "train.minibatches=2",
        "train.checkpoint_every=50",
        "rollout.group_size=4",
        'sync.method="disk"',
        f'sync.directory="{directory}/sync"',
        "eval.every=0",
        f'reward.function="{ROOT}/tests/training/rewards.py:share_of_even_tokens"',
    ]


def role(process: psutil.Process) -> str:
    """What a process of the run is called in the figure; "" for one that is not watched."""
    words = process.cmdline()
    if any(word.endswith("rollout/sglang/server.py") for word in words):
        return "server"
    if words and words[0].startswith("sglang::"):
        return f"server's {words[0].removeprefix('sglang::').split('_')[0]}"
    rank = process.environ().get("RANK")
    return f"rank {rank}" if rank is not None else "launcher" if "megatron_gspo.cli" in words else ""


def sample(root: psutil.Process) -> dict[str, Sample]:
    """role -> what its process holds now: of those that have its environment, the largest."""
    found: dict[str, Sample] = {}
    for process in [root, *root.children(recursive=True)]:
        try:
            name = role(process)
            memory = process.memory_full_info().uss / 2**20 if name else 0.0
            if name and memory > found.get(name, {"memory_mib": 0.0})["memory_mib"]:
                found[name] = {
                    "memory_mib": memory,
                    "descriptors": process.num_fds(),
                    "threads": process.num_threads(),
                    "shared": len(set(MAPPED.findall(Path(f"/proc/{process.pid}/maps").read_text()))),
                }
        except (psutil.Error, OSError):  # it has ended
            continue
    return found


def watch(directory: Path, steps: int) -> dict[str, list[tuple[int, Sample]]]:
    """role -> (outer steps done, what it held) of one run. Raises RuntimeError if the run fails."""
    prepare = [sys.executable, str(ROOT / "examples/quickstart/prepare.py"), str(directory)]
    subprocess.run([*prepare, "--sft-examples", "64", "--train-prompts", "256", "--eval-prompts", "16"], check=True)
    command = [sys.executable, "-m", "megatron_gspo.cli", "train", str(ROOT / "examples/quickstart/gspo.toml")]
    (directory / "sync").mkdir(exist_ok=True)
    metrics, series = directory / "run" / "metrics.jsonl", defaultdict[str, list[tuple[int, Sample]]](list)
    with (directory / "log").open("w") as log:
        run = subprocess.Popen([*command, *settings(directory, steps)], stdout=log, stderr=subprocess.STDOUT)
        root, seen, left = psutil.Process(run.pid), -1, 0
        while run.poll() is None:
            time.sleep(0.5)
            done = metrics.read_bytes().count(b"\n") // 2 if metrics.exists() else 0
            if done > seen and done < steps:
                seen = done
                for name, held in sample(root).items():
                    series[name].append((done, held))
                left = max(left, sum(1 for _ in (directory / "sync").iterdir()))
    if run.returncode:
        raise RuntimeError(f"the run ended with {run.returncode}: {directory / 'log'}")
    if missed := ROLES - series.keys():
        raise RuntimeError(f"never seen, so not watched: {', '.join(sorted(missed))}")
    if left > 1:
        raise RuntimeError(f"weights of {left} versions lay in {directory}/sync at a time")
    return series


def growth(series: Mapping[str, Sequence[tuple[int, Sample]]], steps: int) -> dict[str, dict[str, float]]:
    """role -> quantity -> by how much it grew after the warm-up: medians of the last fifth and of the first."""
    part = (steps - WARM_UP) // 5
    grown: dict[str, dict[str, float]] = {}
    for name, samples in series.items():
        early = [held for done, held in samples if WARM_UP <= done < WARM_UP + part]
        late = [held for done, held in samples if done >= steps - part]
        if early and late:
            quantities = early[0]
            grown[name] = {q: median(s[q] for s in late) - median(s[q] for s in early) for q in quantities}
    return grown


def too_much(grown: Mapping[str, Mapping[str, float]]) -> list[str]:
    """What still grows, one line each."""
    return [
        f"{name}: {quantity} grew by {by:.1f} after outer step {WARM_UP}"
        for name, of_role in grown.items()
        for quantity, by in of_role.items()
        if by > MOST_GROWTH[quantity]
    ]


COLOURS = ("#2563eb", "#dc2626", "#059669", "#d97706", "#7c3aed", "#0891b2", "#4b5563")
WIDTH, HEIGHT, LEFT = 720, 150, 52


def figure(series: Mapping[str, Sequence[tuple[int, Sample]]], steps: int) -> str:
    """An SVG: a panel for each quantity, a line for each process."""
    roles = sorted(series)
    panels = [
        panel("memory of its own, MiB", "memory_mib", series, roles, steps, 0),
        panel("file descriptors", "descriptors", series, roles, steps, 1),
        panel("threads", "threads", series, roles, steps, 2),
        panel("segments of shared memory", "shared", series, roles, steps, 3),
    ]
    legend = "".join(
        f'<text x="{LEFT + 115 * i}" y="{4 * HEIGHT + 24}" fill="{COLOURS[i % len(COLOURS)]}">{name}</text>'
        for i, name in enumerate(roles)
    )
    size = f'viewBox="0 0 {WIDTH + 20} {4 * HEIGHT + 36}"'
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" {size} font-family="sans-serif" font-size="11">'
        f'<rect width="100%" height="100%" fill="white"/>{"".join(panels)}{legend}</svg>\n'
    )


def panel(
    title: str,
    quantity: str,
    series: Mapping[str, Sequence[tuple[int, Sample]]],
    roles: Sequence[str],
    steps: int,
    row: int,
) -> str:
    top, bottom = row * HEIGHT + 28, (row + 1) * HEIGHT - 8
    most = max((held[quantity] for name in roles for _, held in series[name]), default=1) * 1.05 or 1
    x, y = (WIDTH - LEFT) / steps, (bottom - top) / most
    lines = "".join(
        f'<polyline fill="none" stroke="{COLOURS[i % len(COLOURS)]}" points="'
        + " ".join(f"{LEFT + done * x:.1f},{bottom - held[quantity] * y:.1f}" for done, held in series[name])
        + '"/>'
        for i, name in enumerate(roles)
    )
    marks = "".join(
        f'<text x="{LEFT + at * x:.0f}" y="{bottom + 12}" text-anchor="middle" fill="#666">{at}</text>'
        for at in range(0, steps + 1, max(1, steps // 5))
    )
    return (
        f'<text x="{LEFT}" y="{top - 10}" font-weight="bold">{title}</text>'
        f'<text x="{LEFT - 6}" y="{top + 4}" text-anchor="end" fill="#666">{most:.0f}</text>'
        f'<text x="{LEFT - 6}" y="{bottom}" text-anchor="end" fill="#666">0</text>'
        f'<line x1="{LEFT}" y1="{bottom}" x2="{WIDTH}" y2="{bottom}" stroke="#999"/>{lines}{marks}'
    )


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("directory", type=Path, help="for the model, the prompts and the run")
    parser.add_argument("--steps", type=int, default=500, help="outer steps (default 500)")
    parser.add_argument("--figure", type=Path, help="an SVG of it all")
    options = parser.parse_args(arguments)
    if options.steps < WARM_UP + 5:
        parser.error(
            f"--steps {options.steps}: growth is measured after the first {WARM_UP}, over fifths of the others"
        )
    started = time.monotonic()
    series = watch(options.directory.resolve(), options.steps)
    grown: dict[str, Any] = growth(series, options.steps)
    print(json.dumps({"seconds": round(time.monotonic() - started), "growth": grown}, indent=1))
    (options.directory / "series.json").write_text(json.dumps(series))
    if options.figure:
        options.figure.write_text(figure(series, options.steps), encoding="utf-8")
    problems = too_much(grown)
    print("\n".join(problems) or "nothing grows", file=sys.stderr)
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main())
