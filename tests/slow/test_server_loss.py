"""Real servers that are killed: a run goes on, and its weights are those of the run that nothing happened to."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from tests.rollout.conftest import require_sglang
from tests.slow.test_endings import run_of, servers
from tests.training.conftest import ROOT

pytestmark = [pytest.mark.slow_suite, pytest.mark.timeout(900)]
MORE = ("train.outer_steps=5", "train.prompts_per_step=16", "train.noise_floor_every=0", "rollout.local_servers=2")


def start(quickstart: Path, directory: Path, *more: str) -> subprocess.Popen[str]:
    command = run_of(quickstart, directory, *MORE, *more)
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    return subprocess.Popen(
        command, cwd=ROOT, env=environment, stderr=subprocess.STDOUT, stdout=subprocess.PIPE, text=True
    )


def lines(directory: Path) -> list[dict[str, Any]]:
    path = directory / "run" / "metrics.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def wait_for(process: subprocess.Popen[str], condition: Callable[[], bool], most_s: float = 400.0) -> None:
    deadline = time.monotonic() + most_s
    while not condition():
        assert process.poll() is None, process.communicate()[0]
        assert time.monotonic() < deadline
        time.sleep(0.02)


def answers(directory: Path, log: str = "sglang-0.log") -> int:
    """Requests for responses that a server has answered."""
    return (directory / "run" / "servers" / log).read_text(errors="replace").count("POST /generate")


def weights(directory: Path) -> dict[str, torch.Tensor]:
    return {
        name: tensor
        for file in sorted((directory / "run" / "hf").glob("*.safetensors"))
        for name, tensor in load_file(file).items()
    }


def test_servers_that_are_killed_change_no_bit(quickstart: Path, tmp_path: Path) -> None:
    """One in the second outer step, which goes on with the other; then both at once: the run must wait for one."""
    require_sglang()
    plain, hurt = tmp_path / "plain", tmp_path / "hurt"
    process = start(quickstart, plain)
    said, _ = process.communicate(timeout=400)
    assert process.returncode == 0, said
    process = start(quickstart, hurt)
    try:
        wait_for(process, lambda: any(line["outer_step"] == 0 for line in lines(hurt)))
        done = answers(hurt)
        wait_for(process, lambda: answers(hurt) > done)
        os.killpg(servers(process.pid)[0].pid, signal.SIGKILL)
        wait_for(process, lambda: any(line["outer_step"] == 2 for line in lines(hurt)))
        for server in servers(process.pid):
            os.killpg(server.pid, signal.SIGKILL)
        said, _ = process.communicate(timeout=600)
    finally:
        process.kill()
    assert process.returncode == 0, said
    print(said)
    for line in (
        r"a rollout server is lost, and 1 are left: http://",
        r"exited with -9; .*; it is started again \(1 of 10 times\)",
        r"no rollout server is left .*; outer step [34] is saved; waiting 1800 s for one to return",
        r"http://\S+ is back, with the current weights",
        r"goes on with http://",
    ):
        assert re.search(line, " ".join(said.split())), line
    first, second = weights(plain), weights(hurt)
    assert first.keys() == second.keys() and first
    assert [name for name, tensor in first.items() if not torch.equal(tensor, second[name])] == []
