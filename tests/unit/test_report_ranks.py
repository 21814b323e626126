"""Each rank's file and log: who lives, who is gone, and that training waits for none of it."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import time
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import pytest

from megatron_gspo import cli
from megatron_gspo.errors import RunStopped
from megatron_gspo.report.liveness import LOST_S, state
from megatron_gspo.report.manifest import machine
from megatron_gspo.report.ranks import (
    STALE_S,
    Sign,
    clear_signs,
    directory,
    event,
    grouped,
    log_file,
    ranks_of,
    read_signs,
    sign_of,
    write_sign,
)
from megatron_gspo.report.rundir import RunDirectory
from megatron_gspo.report.status import format_status, is_healthy, summarise
from megatron_gspo.runs.heartbeat import Heartbeat
from tests.unit.report_runs import make_run

NOW = 1_800_000_000.0


def here(rank: int, **changes: Any) -> Sign:
    return replace(sign_of(rank, "node0", "train", 7, NOW - 30), time=NOW, **changes)


def elsewhere(rank: int, heard_s: float = 1.0, **changes: Any) -> Sign:
    return replace(here(rank, host="node1", machine="0" * 12, pid=4, ticks=5, **changes), time=NOW - heard_s)


def write(run: Path, *signs: Sign) -> None:
    for sign in signs:
        write_sign(run, sign)
        os.utime(directory(run) / f"rank-{sign.rank}.json", (sign.time, sign.time))


def states(run: Path, world_size: int, now: float = NOW) -> dict[int, str]:
    return {entry["rank"]: entry["state"] for entry in ranks_of(run, world_size, now)}


def test_a_rank_is_alive_gone_silent_ended_or_missing(tmp_path: Path) -> None:
    child = subprocess.Popen([sys.executable, "-c", ""])
    child.wait()
    write(
        tmp_path,
        here(0),
        here(1, pid=child.pid),
        here(2, ticks=1),  # another process of that number
        elsewhere(3),
        elsewhere(4, heard_s=STALE_S + 1),
        elsewhere(5, phase="ended", heard_s=STALE_S + 1),
        elsewhere(6, phase="failed"),
    )
    expected = dict(enumerate(["alive", "gone", "gone", "alive", "silent", "ended", "failed", "missing"]))
    assert states(tmp_path, 8) == expected
    entry = ranks_of(tmp_path, 8, NOW)[3]
    assert entry == {
        "rank": 3,
        "state": "alive",
        "host": "node1",
        "pid": 4,
        "phase": "train",
        "step": 7,
        "in_phase_s": 30.0,
        "heard_s": 1.0,
    }


def test_a_clock_that_is_behind_makes_no_rank_silent(tmp_path: Path) -> None:
    """The file system's clock or the writer's: the newer of them counts."""
    write(tmp_path, elsewhere(0, heard_s=10 * STALE_S))
    os.utime(directory(tmp_path) / "rank-0.json", (NOW - 1, NOW - 1))
    assert states(tmp_path, 1) == {0: "alive"}
    assert states(tmp_path, 1, NOW - 3600) == {0: "alive"}


@pytest.mark.parametrize(
    "content",
    [b"", b"{", b"[]", b"null", b'{"rank": 0}', b"\xff", b"[" * 10_000, json.dumps({"rank": 0, "x": 1}).encode()],
)
def test_a_file_that_is_no_sign_is_no_rank(tmp_path: Path, content: bytes) -> None:
    write(tmp_path, elsewhere(1))
    (directory(tmp_path) / "rank-0.json").write_bytes(content)
    assert states(tmp_path, 2) == {0: "missing", 1: "alive"}


@pytest.mark.parametrize("field", [field.name for field in fields(Sign)])
def test_a_sign_with_a_value_of_another_kind_breaks_no_look(tmp_path: Path, field: str) -> None:
    write(tmp_path, elsewhere(0), elsewhere(1))
    path = directory(tmp_path) / "rank-0.json"
    sound = json.loads(path.read_text())
    for value in (None, "text", [1], 1e300, float("nan"), True, {"a": 1}):
        path.write_text(json.dumps(sound | {field: value}))
        entries = ranks_of(tmp_path, 2, NOW)
        assert [entry["rank"] for entry in entries] == [0, 1]
        json.dumps(entries, allow_nan=False)


def test_what_an_earlier_start_left_is_removed(tmp_path: Path) -> None:
    write(tmp_path, elsewhere(0), elsewhere(9))
    clear_signs(tmp_path)
    assert read_signs(tmp_path) == []
    clear_signs(tmp_path / "none")


def running(tmp_path: Path, *signs: Sign) -> Path:
    """A run that a living process writes, with these ranks; its times are now."""
    run = make_run(tmp_path / "run")
    manifest = run.manifest()
    del manifest["ended"]
    run.write_manifest({**manifest, "status": "running", "layout": {"world_size": len(signs)}})
    for sign in signs:
        write_sign(run.path, replace(sign, time=time.time() - (NOW - sign.time), since=time.time() - 30))
        age = time.time() - (NOW - sign.time)
        os.utime(directory(run.path) / f"rank-{sign.rank}.json", (age, age))
    return run.path


def test_status_has_a_row_for_each_host_and_one_for_each_rank_that_is_lost(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    now = time.time()
    monkeypatch.setattr(time, "time", lambda: now)  # else seconds that pass are said
    run = running(tmp_path, *map(here, range(3)), *map(elsewhere, range(3, 6)), elsewhere(6, STALE_S + 20))
    with RunDirectory(run).lock():
        summary = summarise(run)
    assert summary["status"] == "running" and not is_healthy(summary)
    text = format_status(summary)
    assert "ranks          node0: 0-2 (train for 30s)\n" in text
    assert "ranks          node1: 3-5 (train for 30s)\n" in text
    assert "rank           6 on node1 (process 4) has said nothing for 1m20s; it was in train\n" in text


def test_the_command_says_by_its_status_whether_all_is_well(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = running(tmp_path, here(0), elsewhere(1))
    with RunDirectory(run).lock():
        assert cli.main(["status", str(run), "--healthy"]) == 0
        write_sign(run, replace(here(0), pid=2**22 + 1))
        assert cli.main(["status", str(run), "--healthy"]) == 1
        assert cli.main(["status", str(run)]) == 0
    assert cli.main(["status", str(run), "--healthy"]) == 1  # nobody writes it: killed
    RunDirectory(run).finish()
    assert cli.main(["status", str(run), "--healthy"]) == 0
    assert "node1: 1" in capsys.readouterr().out


def test_a_run_elsewhere_is_silent_when_its_first_rank_is(tmp_path: Path) -> None:
    run = RunDirectory(running(tmp_path, elsewhere(0)))
    run.write_manifest({**run.manifest(), "process": {"machine": "0" * 12, "pid": 4}})
    assert state(run, 1.0) == "running"
    assert state(run, 1.0, time.time() + LOST_S + 2) == "silent"
    clear_signs(run.path)
    assert state(run, 1.0, time.time() + LOST_S + 2) == "running"


def read(path: Path) -> dict[str, Any]:
    return dict(json.loads(path.read_text()))


def wait_for(path: Path, **expected: Any) -> None:
    deadline = time.monotonic() + 60
    while not (path.exists() and expected.items() <= read(path).items()):
        assert time.monotonic() < deadline, path.read_text() if path.exists() else path
        time.sleep(0.01)


def test_a_rank_writes_its_phase_at_once_and_a_sign_again_and_again(tmp_path: Path) -> None:
    beat, path = Heartbeat(tmp_path, 3, every_s=0.05), directory(tmp_path) / "rank-3.json"
    beat.start()
    wait_for(path, phase="starting", step=None, pid=os.getpid(), machine=machine())
    beat.phase("outer step 2 of 9")
    beat.done(11)
    beat.enter("rollout")
    wait_for(path, phase="rollout", step=11)
    before = read(path)
    deadline = time.monotonic() + 60
    while read(path)["time"] <= before["time"]:
        assert time.monotonic() < deadline
        time.sleep(0.01)
    assert read(path)["since"] == before["since"]
    beat.note("a line\nof two lines")
    beat.end()
    assert read(path)["phase"] == "ended" and not path.with_suffix(".tmp").exists()
    lines = log_file(tmp_path, 3).read_text().splitlines()
    assert [re.sub(r"^\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}Z ", "", line) for line in lines] == [
        lines[0].partition("Z ")[2],
        "rank 3: outer step 2 of 9",
        "rank 3: a line of two lines",
        "rank 3: finished",
    ]
    assert "rank 3: started on " in lines[0]


@pytest.mark.parametrize(
    ("error", "phase", "last"),
    [
        (ValueError("a\nb"), "failed", "failed: ValueError: a b"),
        (RunStopped("stopped after outer step 3"), "ended", "RunStopped: stopped after outer step 3"),
        (KeyboardInterrupt(), "failed", "failed: KeyboardInterrupt:"),
    ],
)
def test_the_last_line_says_how_a_rank_ended(tmp_path: Path, error: BaseException, phase: str, last: str) -> None:
    beat = Heartbeat(tmp_path, 0)
    beat.start()
    beat.end(error)
    assert read(directory(tmp_path) / "rank-0.json")["phase"] == phase
    assert log_file(tmp_path, 0).read_text().splitlines()[-1].endswith(f"rank 0: {last}")


def test_a_disk_that_takes_nothing_fails_no_rank(tmp_path: Path) -> None:
    (tmp_path / "ranks").write_text("in the way")
    (tmp_path / "logs").mkdir()
    beat = Heartbeat(tmp_path, 0, every_s=0.02)
    beat.start()
    beat.phase("training")
    time.sleep(0.1)
    beat.end()
    assert "rank 0: training" in log_file(tmp_path, 0).read_text()  # one that it takes is there


def test_an_event_is_one_line_with_time_and_rank() -> None:
    assert event(12, "a  b\r\nc\u2028d", 0.5) == "1970-01-01T00:00:00.500Z rank 12: a b c d\n"
    assert grouped([5, 0, 1, 2, 9]) == "0-2, 5, 9"
