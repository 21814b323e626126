"""Whole runs that end in each way there is: what they say, and that nothing of them is left on the machine."""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest

from megatron_gspo.report.status import summarise
from megatron_gspo.rollout.sglang.server import shared_memory
from tests.rollout.conftest import require_sglang
from tests.training.conftest import QUICKSTART, ROOT

pytestmark = [pytest.mark.slow_suite, pytest.mark.timeout(900)]
REWARDS = ROOT / "tests" / "training" / "rewards.py"


@pytest.fixture
def temporary() -> Iterator[Path]:
    directory = Path(tempfile.mkdtemp(prefix="endings-", dir="/tmp"))
    yield directory
    shutil.rmtree(directory)


def run_of(quickstart: Path, tmp_path: Path, *more: str) -> list[str]:
    settings = [
        f'model.path="{quickstart}/model"',
        f'data.path="{quickstart}/train.jsonl"',
        f'train.run_dir="{tmp_path}/run"',
        f'reward.function="{REWARDS}:share_of_even_tokens"',
        "train.outer_steps=2",
        "train.prompts_per_step=4",
        "train.minibatches=2",
        "train.checkpoint_every=1",
        'sync.method="disk"',
        "eval.every=0",
        'data.eval_path=""',
        *more,
    ]
    return [sys.executable, "-m", "megatron_gspo.cli", "train", str(QUICKSTART / "gspo.toml"), *settings]


def members(pid: int) -> list[psutil.Process]:
    try:
        process = psutil.Process(pid)
        return [process, *process.children(recursive=True)]
    except psutil.NoSuchProcess:
        return []


def servers(pid: int) -> list[psutil.Process]:
    """Local servers under a process: the leaders of their process groups."""
    found = []
    for process in members(pid):
        with contextlib.suppress(psutil.Error):
            if "rollout/sglang/server.py" in " ".join(process.cmdline()) and os.getpgid(process.pid) == process.pid:
                found.append(process)
    return found


def nothing(process: subprocess.Popen[str]) -> None: ...


def interrupt_all(process: subprocess.Popen[str]) -> None:
    os.killpg(process.pid, signal.SIGINT)  # as a terminal does


def kill_a_server(process: subprocess.Popen[str]) -> None:
    os.killpg(servers(process.pid)[0].pid, signal.SIGKILL)


LONG = "train.outer_steps=500"
RAISES = f'reward.function="{REWARDS}:jams_at_the_second_sample"'
ENDINGS: dict[str, tuple[tuple[str, ...], Callable[[subprocess.Popen[str]], None], int, str, str]] = {
    "finished": ((), nothing, 0, "finished", ""),
    "failed": (
        (RAISES, "reward.check_references=0"),
        nothing,
        1,
        "failed",
        "error: reward .* raised RuntimeError: paper jam",
    ),
    "Ctrl-C": (
        (LONG,),
        interrupt_all,
        130,
        "failed",
        "error: ended by SIGINT: .* train.resume=true train.overwrite=false goes on from .*outer_",
    ),
    "SIGTERM": (
        (LONG,),
        lambda process: process.terminate(),
        75,
        "stopped",
        "stopped by SIGTERM after outer step .* saved",
    ),
    "SIGKILL": ((LONG,), lambda process: process.kill(), -9, "killed", ""),
    "a server that dies": (
        (LONG, 'rollout.on_server_loss="error"'),
        kill_a_server,
        1,
        "failed",
        "error: .*the rollout server of .* exited with -9|error: .*generate",
    ),
}
"""Kind -> (settings, what is done after the first checkpoint, exit status, what ``status`` says, what is said)."""


@pytest.mark.parametrize("kind", ENDINGS)
def test_nothing_is_left_of_a_run_however_it_ends(quickstart: Path, tmp_path: Path, temporary: Path, kind: str) -> None:
    require_sglang()
    settings, act, status, state, said = ENDINGS[kind]
    environment = os.environ | {"TMPDIR": str(temporary), "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    with (tmp_path / "said").open("w") as out:
        process = subprocess.Popen(
            run_of(quickstart, tmp_path, *settings),
            stdin=subprocess.DEVNULL,
            stdout=out,
            stderr=subprocess.STDOUT,
            env=environment,
            cwd=ROOT,
            start_new_session=True,
        )
        seen: dict[int, psutil.Process] = {}
        shared: set[str] = set()
        acted = act is nothing
        while process.poll() is None:
            seen |= {member.pid: member for member in members(process.pid)}
            for server in servers(process.pid):
                shared |= shared_memory(server.pid)
            if not acted and (tmp_path / "run" / "checkpoints" / "latest").exists():
                acted = True
                act(process)
            time.sleep(0.1)
    text = (tmp_path / "said").read_text()
    assert process.returncode == status, text
    deadline = time.monotonic() + 10
    while left := [member for member in seen.values() if member.is_running() and member.status() != "zombie"]:
        assert time.monotonic() < deadline, left
        time.sleep(0.1)
    assert list(temporary.iterdir()) == []
    assert shared, "a server has shared memory while it runs"
    assert [path for path in shared if os.path.exists(path)] == []
    assert list((tmp_path / "run").rglob("*.tmp")) == []
    assert re.search(said, text), text
    assert "Traceback" not in text
    assert summarise(tmp_path / "run")["status"] == state
