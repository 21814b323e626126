"""A run one of whose ranks is stopped: the others say who, the run ends with status 1, and nothing is left of it."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from megatron_gspo.report.status import summarise
from tests.chaos.harness import CONFIG, ROOT, _rank, settings
from tests.chaos.servers import StandIns

TIMEOUT_S = 6.0


@pytest.mark.timeout(400)
def test_a_stopped_rank_ends_the_run_and_is_named_with_its_phase(quickstart: Path, tmp_path: Path) -> None:
    servers = StandIns(quickstart / "model", 1)
    uploads = tmp_path / "uploads"
    uploads.mkdir()
    more = [
        f"train.collective_timeout_s={TIMEOUT_S}",
        "train.outer_steps=200",
        "train.max_restarts=0",
        f'train.on_checkpoint="cp -r -t {uploads}"',
        f"train.on_end=\"sh -c 'echo $0 > {tmp_path}/ended'\"",
    ]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    with servers.running():
        overrides = settings(tmp_path, quickstart, servers.urls, "disk", *more)
        command = [sys.executable, "-m", "megatron_gspo.cli", "train", str(CONFIG), *overrides]
        process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=environment, cwd=ROOT)
        while not (tmp_path / "run" / "checkpoints" / "latest").exists():
            assert process.poll() is None, process.communicate()[1]
            time.sleep(0.05)
        family = psutil.Process(process.pid).children(recursive=True)
        stopped = _rank(process.pid, 1, watcher=False)
        assert stopped is not None
        os.kill(stopped, signal.SIGSTOP)
        began = time.monotonic()
        _, said = process.communicate(timeout=240)
        took = time.monotonic() - began
    assert process.returncode == 1, said
    (line,) = [line for line in said.splitlines() if "missing: " in line]
    assert line.startswith("error: rank 0 has waited for ") and "missing: rank 1 (host " in line
    assert f"process {stopped}; phase: outer step " in line
    assert took < 200, "it does not wait for ever; a busy machine takes longer than the timeout"
    assert not any(member.is_running() and member.status() != "zombie" for member in family)
    found = summarise(tmp_path / "run")
    assert found["status"] == "failed"
    assert (tmp_path / "ended").read_text() == "failed\n"
    names = sorted(path.name for path in uploads.iterdir())
    assert names[0] == "outer_00001" and (uploads / "outer_00001" / "checkpoint.json").exists()
