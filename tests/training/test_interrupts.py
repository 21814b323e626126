"""Ctrl-C in the first seconds of a run: no traceback, nothing left, and the truth about what goes on."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from megatron_gspo.runs.launch import what_is_left
from tests.training.conftest import QUICKSTART, ROOT

LATER_S = (0.0, 0.05, 0.3, 1.0, 2.5, 5.0)
"""After the interpreter has started: in this package's imports, in torch's, in Megatron's, in the ranks'."""


def is_ours(pid: int) -> bool:
    """Python ignores SIGPIPE and catches interrupts from its start on. This package's first line lets them end it until
    it can say so; just after that it has a child, which a look sees that came too late."""
    lines = dict(line.split(":", 1) for line in Path(f"/proc/{pid}/status").read_text().splitlines())
    ignores_pipes = bool(int(lines["SigIgn"], 16) & 1 << signal.SIGPIPE - 1)
    catches_interrupts = bool(int(lines["SigCgt"], 16) & 1 << signal.SIGINT - 1)
    return (ignores_pipes and not catches_interrupts) or bool(Path(f"/proc/{pid}/task/{pid}/children").read_text())


def wait_until_it_is_ours(pid: int) -> None:
    deadline = time.monotonic() + 60
    while not is_ours(pid):
        assert time.monotonic() < deadline
        time.sleep(0.0005)


def test_an_interrupt_in_the_first_seconds_is_no_traceback(quickstart: Path, tmp_path: Path) -> None:
    """All processes of the terminal get it, as from Ctrl-C. The runs start side by side."""
    temporary = Path(tempfile.mkdtemp(prefix="int-", dir="/tmp"))
    environment = os.environ | {"TMPDIR": str(temporary), "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    begun = []
    for number, _ in enumerate(LATER_S):
        settings = [f'model.path="{quickstart}/model"', f'data.path="{quickstart}/train.jsonl"', 'data.eval_path=""']
        settings += ["eval.every=0", f'train.run_dir="{tmp_path}/run-{number}"']
        command = [sys.executable, "-m", "megatron_gspo.cli", "train", str(QUICKSTART / "gspo.toml"), *settings]
        process = subprocess.Popen(
            command, stderr=subprocess.PIPE, text=True, cwd=ROOT, env=environment, start_new_session=True
        )
        wait_until_it_is_ours(process.pid)
        begun.append((process, time.monotonic()))
    for (process, start), later in zip(begun, LATER_S, strict=True):
        time.sleep(max(0.0, start + later - time.monotonic()))
        os.killpg(process.pid, signal.SIGINT)
    for number, (process, _) in enumerate(begun):
        _, said = process.communicate(timeout=300)
        assert process.returncode in (130, -signal.SIGINT), said
        assert said in ("", "error: ended by SIGINT: nothing was written yet\n")
        assert not (tmp_path / f"run-{number}").exists()
    assert list(temporary.iterdir()) == []
    temporary.rmdir()


def test_what_goes_on_after_an_interrupt_is_said_only_where_there_is_a_checkpoint(tmp_path: Path) -> None:
    run = tmp_path / "run"
    assert what_is_left(run) == ": nothing was written yet"
    (run / "checkpoints").mkdir(parents=True)
    assert what_is_left(run) == f": {run} has no checkpoint to go on from"
    (run / "checkpoints" / "outer_00004.unfinished").mkdir()
    assert what_is_left(run) == f": {run} has no checkpoint to go on from"
    (run / "checkpoints" / "outer_00004").mkdir()
    (run / "checkpoints" / "latest").write_text("outer_00004\n")
    said = f": the same command with train.resume=true train.overwrite=false goes on from {run}/checkpoints/outer_00004"
    assert what_is_left(run) == said
    (run / "checkpoints" / "latest").write_text("nonsense")
    assert what_is_left(run) == ""
    assert what_is_left(None) == ""
