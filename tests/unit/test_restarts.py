"""How often ranks are started again, and what a further start may continue."""

from __future__ import annotations

from pathlib import Path

import pytest

from megatron_gspo.runs.restarts import CONTINUE, Restarts


@pytest.fixture
def run(tmp_path: Path) -> Path:
    return tmp_path / "run"


def write(run: Path, *checkpoints: int) -> None:
    """What a run leaves: its configuration, and checkpoints."""
    (run / "checkpoints").mkdir(parents=True, exist_ok=True)
    (run / "config.toml").unlink(missing_ok=True)
    (run / "config.toml").write_text("")
    for number in checkpoints:
        (run / "checkpoints" / "latest").write_text(f"outer_{number:05d}\n")


def test_a_run_is_started_again_from_its_latest_checkpoint_and_says_why(run: Path) -> None:
    restarts = Restarts(run, 2, resumes=False)
    write(run, 4)
    line = f"restart 1 of 2: rank 1 was ended by SIGKILL; goes on from {run}/checkpoints/outer_00004"
    assert restarts.after("rank 1 was ended by SIGKILL") == (line, CONTINUE)


def test_starts_without_a_new_checkpoint_are_counted_and_a_new_one_begins_the_count_anew(run: Path) -> None:
    restarts = Restarts(run, 2, resumes=False)
    write(run, 4)
    assert restarts.after("rank 0 failed") and restarts.after("rank 0 failed")
    write(run, 6)
    line, _ = restarts.after("rank 0 failed") or ("", ())
    assert line.startswith("restart 1 of 2: ")
    assert restarts.after("rank 0 failed")
    assert restarts.after("rank 0 failed") is None
    assert restarts.given_up().startswith("train.max_restarts = 2: ")


def test_the_checkpoint_that_a_run_resumes_from_is_not_a_new_one(run: Path) -> None:
    write(run, 4)
    restarts = Restarts(run, 1, resumes=True)
    write(run)
    assert restarts.after("rank 0 failed")
    assert restarts.after("rank 0 failed") is None


def test_without_the_setting_nothing_is_started_again_and_nothing_more_is_said(run: Path) -> None:
    restarts = Restarts(run, 0, resumes=True)
    assert restarts.after("rank 0 failed") is None
    assert restarts.given_up() == ""


def test_a_run_without_a_checkpoint_starts_afresh(run: Path) -> None:
    restarts = Restarts(run, 1, resumes=False)
    write(run)
    line, settings = restarts.after("rank 0 failed") or ("", ())
    assert line.endswith("; starts afresh, since there is no checkpoint yet") and settings == CONTINUE


def test_what_another_run_has_left_is_not_continued(run: Path) -> None:
    """The ranks died before they had replaced it, as ``train.overwrite`` asks, or refused it."""
    write(run, 8)
    restarts = Restarts(run, 2, resumes=False)
    line, settings = restarts.after("rank 0 failed") or ("", ())
    assert settings == () and "outer_00008" not in line
    write(run)
    assert (restarts.after("rank 0 failed") or ("", ()))[1] == CONTINUE
