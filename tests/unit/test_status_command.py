"""``status``: whether a run goes on, and watching it."""

from __future__ import annotations

import contextlib
import io
import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import psutil
import pytest
from report_runs import make_config, make_report, make_run

from megatron_gspo.cli import main
from megatron_gspo.report.liveness import SILENT_S, silence, state
from megatron_gspo.report.manifest import describe
from megatron_gspo.report.rundir import RunDirectory
from megatron_gspo.report.status import format_status, summarise

ROOT = Path(__file__).parents[2]


def going_run(path: Path, **process: Any) -> RunDirectory:
    """A run of two outer steps that has not ended; ``process`` replaces what its manifest says of its process."""
    config = make_config(path)
    run = RunDirectory.create(config)
    manifest = describe(config, world_size=2)
    run.write_manifest(manifest | {"process": manifest["process"] | process})
    write_steps(run, 0, 2)
    return run


def write_steps(run: RunDirectory, first: int, last: int) -> None:
    writer = run.metrics_writer()
    for outer_step in range(first, last):
        for minibatch in range(4):
            writer.write(make_report(outer_step, minibatch))
    writer.close()


def test_a_run_whose_process_lives_is_running_however_long_it_says_nothing(tmp_path: Path) -> None:
    run = going_run(tmp_path / "run")
    assert state(run, 1.0, now=time.time() + 1e6) == "running"


def test_a_run_whose_process_is_gone_was_killed(tmp_path: Path) -> None:
    child = subprocess.Popen([sys.executable, "-c", ""])
    child.wait()
    assert state(going_run(tmp_path / "run", pid=child.pid), 1.0) == "killed"


def test_a_process_that_got_the_number_of_a_dead_one_is_not_taken_for_it(tmp_path: Path) -> None:
    assert state(going_run(tmp_path / "run", started=time.time() - 86_400, ticks=None), 1.0) == "killed"
    assert state(going_run(tmp_path / "later", ticks=1), 1.0) == "killed"


@pytest.mark.parametrize("jump_s", [-86_400.0, 86_400.0])
def test_a_clock_that_is_set_changes_nothing_of_what_is_said_of_a_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, jump_s: float
) -> None:
    """The kernel's time of a process's start moves with the clock, and so does the age of a file."""
    run = going_run(tmp_path / "run")
    create, clock = psutil.Process.create_time, time.time
    monkeypatch.setattr(psutil.Process, "create_time", lambda process: create(process) + jump_s)
    monkeypatch.setattr(time, "time", lambda: clock() + jump_s)
    assert state(run, 1.0) == "running"
    summary = summarise(run)
    assert summary["status"] == "running" and summary["silent_s"] >= 0 and summary["eta_s"] > 0
    text = format_status(summary | {"run": "run"})  # a path of this test may hold any digits
    assert "running" in text and "-8" not in text


def test_on_another_machine_silence_far_beyond_an_outer_step_is_said(tmp_path: Path) -> None:
    run = going_run(tmp_path / "run", machine="another")
    now = time.time() - silence(run, time.time())
    assert state(run, 1.0, now=now + SILENT_S - 5) == "running"
    assert state(run, 1.0, now=now + SILENT_S + 5) == "silent"
    assert state(run, 300.0, now=now + 2_900) == "running", "its outer steps take five minutes"
    assert state(run, 300.0, now=now + 3_100) == "silent"


def test_a_run_that_said_how_it_ended_is_believed(tmp_path: Path) -> None:
    run = going_run(tmp_path / "run", pid=0)
    run.finish("failed")
    assert state(run, 1.0) == "failed"
    (run.manifest_file).unlink()
    assert state(run, 1.0) is None


def test_a_killed_run_says_so(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = going_run(tmp_path / "run", started=0.0, ticks=1)
    assert main(["status", str(run.path)]) == 0
    assert f"{run.path} (killed)" in capsys.readouterr().out


def test_a_failed_run_says_what_failed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = going_run(tmp_path / "run")
    run.finish("failed", "gradient norm = nan: no step was taken")
    assert main(["status", str(run.path)]) == 0
    assert "error          gradient norm = nan: no step was taken\n" in capsys.readouterr().out


def test_watching_a_pipe_prints_a_line_at_each_change_and_ends_with_the_run(tmp_path: Path) -> None:
    run = going_run(tmp_path / "run")
    out = io.StringIO()

    def wait_for(text: str) -> None:
        deadline = time.monotonic() + 60
        while text not in out.getvalue() and time.monotonic() < deadline:
            time.sleep(0.01)

    def go_on() -> None:
        wait_for("outer step 2/12")
        write_steps(run, 2, 3)
        wait_for("running: outer step 3/12")
        run.finish()

    worker = threading.Thread(target=go_on)
    worker.start()
    with contextlib.redirect_stdout(out):
        assert main(["status", str(run.path), "--watch", "--interval", "0.05"]) == 0
    worker.join()
    lines = out.getvalue().splitlines()
    assert [line.partition(", reward")[0] for line in (lines[0], lines[-1])] == [
        "running: outer step 2/12",
        "finished: outer step 3/12",
    ]
    assert 3 <= len(lines) <= 6, "a line a change, and at most one in the middle of each of four appended lines"


def test_watching_a_run_that_failed_is_a_failure(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = make_run(tmp_path / "run", outer_steps=1)
    run.finish("failed")
    assert main(["status", str(run.path), "--watch", "--json"]) == 1
    assert json.loads(capsys.readouterr().out)["status"] == "failed"


def test_ctrl_c_ends_watching_quietly(tmp_path: Path) -> None:
    run = going_run(tmp_path / "run")
    command = [sys.executable, "-m", "megatron_gspo.cli", "status", str(run.path), "--watch", "--interval", "0.1"]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=environment, text=True) as child:
        assert child.stdout is not None and child.stderr is not None
        assert child.stdout.readline().startswith("running: outer step 2/12")
        child.send_signal(signal.SIGINT)
        assert child.wait(timeout=120) == 130
        assert child.stdout.read() == child.stderr.read() == ""


def test_a_run_that_cannot_be_written_is_read_and_its_page_goes_elsewhere(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Somebody else's, or on a disk that is mounted for reading: here the system refuses every file in it."""
    run = going_run(tmp_path / "run")
    write_text = Path.write_text

    def refuse(path: Path, *content: Any, **settings: Any) -> int:
        if tmp_path / "run" in path.parents:
            raise PermissionError(13, "Permission denied", str(path))
        return write_text(path, *content, **settings)

    monkeypatch.setattr(Path, "write_text", refuse)
    assert main(["status", str(run.path)]) == 0
    assert main(["report", str(run.path)]) == 2
    said = capsys.readouterr().err
    assert f"error: {run.path}/report.html (--out names another place) cannot be written: " in said
    assert main(["report", str(run.path), "--out", str(tmp_path / "page.html")]) == 0
    assert (tmp_path / "page.html").stat().st_size > 1000
