"""Commands of the user's: what they are told, and that a run does not depend on them."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from megatron_gspo.config import TrainConfig
from megatron_gspo.hooks import run_at_end, run_hook
from megatron_gspo.megatron.checkpoint_files import HEADER, retire
from megatron_gspo.runs.uploads import DONE, CheckpointHook

SHOWS = """sh -c 'echo "$0 $MEGATRON_GSPO_OUTCOME $MEGATRON_GSPO_STATUS $1 $MEGATRON_GSPO_RUN_DIR"'"""


def train(run: Path, command: str, **more: object) -> TrainConfig:
    return TrainConfig.model_validate({"run_dir": str(run), "on_checkpoint": command, **more})


def checkpoint(run: Path, number: int) -> Path:
    directory = run / "checkpoints" / f"outer_{number:05d}"
    directory.mkdir(parents=True)
    (directory / HEADER).write_text("{}")
    return directory


@pytest.mark.parametrize(("status", "outcome"), [(0, "finished"), (75, "stopped"), (1, "failed"), (137, "failed")])
def test_the_end_of_a_run_is_told_in_words_and_in_the_environment(tmp_path: Path, status: int, outcome: str) -> None:
    run_at_end(SHOWS, status, 60, str(tmp_path))
    assert (tmp_path / "hooks.log").read_text() == f"{outcome} {outcome} {status} {tmp_path} {tmp_path}\n"


@pytest.mark.parametrize(
    ("command", "said"),
    [
        ("sh -c 'exit 3'", "warning: what ended with exit status 3"),
        ("no-such-program", "warning: what was not run: "),
        ("sleep 60", "warning: what was ended after train.hook_timeout_s = 0.2 s"),
    ],
)
def test_a_command_that_fails_is_a_warning(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], command: str, said: str
) -> None:
    began = time.monotonic()
    assert not run_hook("what", command, [], {}, 0.2 if "60" in command else 30, str(tmp_path))
    assert capfd.readouterr().err.startswith(said)
    assert time.monotonic() - began < 40


def test_what_is_no_command_is_refused_when_the_configuration_is_read(tmp_path: Path) -> None:
    for command in ("no-such-program --flag", "echo 'open", "  "):
        with pytest.raises(ValueError, match=r"is no command|is no program"):
            train(tmp_path, command)


def test_every_finished_checkpoint_gets_its_command_in_order(tmp_path: Path) -> None:
    hook = CheckpointHook(train(tmp_path, "sh -c 'sleep 0.1; ls $0 >> $MEGATRON_GSPO_RUN_DIR/seen; basename $0'"))
    for number in (1, 2, 3):
        hook.add(checkpoint(tmp_path, number))
    hook.finish()
    assert (tmp_path / "hooks.log").read_text().split() == ["outer_00001", "outer_00002", "outer_00003"]
    assert (tmp_path / "seen").read_text().split() == [HEADER] * 3
    assert (tmp_path / "checkpoints" / DONE).read_text() == "outer_00003\n"


def test_the_one_being_uploaded_stays_and_one_that_was_removed_is_left_out(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """The rule keeps one, and the command is slow: the first is busy while the third is published."""
    go = tmp_path / "go"
    command = f"sh -c 'while [ ! -e {go} ]; do sleep 0.02; done; ls $0 && echo $0 >> {tmp_path}/seen'"
    hook = CheckpointHook(train(tmp_path, command))
    made = []
    for number in (1, 2, 3):
        made.append(checkpoint(tmp_path, number))
        hook.add(made[-1])
        while hook._running is None:
            time.sleep(0.01)
        with hook.pruning() as busy:
            retire(made[-1], keep_last=1, keep_every=0, busy=busy)
    assert [path.is_dir() for path in made] == [True, False, True]
    go.touch()
    hook.finish()
    assert (tmp_path / "seen").read_text().split() == [str(made[0]), str(made[2])]
    assert "was not run for outer_00002: train.keep_last has removed it" in capfd.readouterr().err
    with hook.pruning() as busy:
        retire(made[-1], keep_last=1, keep_every=0, busy=busy)
    assert [path.is_dir() for path in made] == [False, False, True]


def test_a_run_that_goes_on_repeats_the_command_unless_it_had_succeeded(tmp_path: Path) -> None:
    first = checkpoint(tmp_path, 1)
    for _ in range(2):
        hook = CheckpointHook(train(tmp_path, "basename"))
        hook.add_unless_done(first)
        hook.finish()
    assert (tmp_path / "hooks.log").read_text().split() == ["outer_00001"]


def test_a_run_does_not_wait_for_ever(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """Of three commands that take too long the last has not had its turn when the run ends."""
    hook = CheckpointHook(train(tmp_path, "sh -c 'sleep 30'", hook_timeout_s=1.0))
    for number in (1, 2, 3):
        hook.add(checkpoint(tmp_path, number))
    began = time.monotonic()
    hook.finish()
    assert time.monotonic() - began < 25
    assert "outer_00003: the run has ended and does not wait" in capfd.readouterr().err


def test_a_command_that_still_runs_at_the_end_is_named(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    hook = CheckpointHook(train(tmp_path, "sh -c 'sleep 15'", hook_timeout_s=60.0))
    hook.add(checkpoint(tmp_path, 1))
    while hook._running is None:
        time.sleep(0.01)
    hook._train = hook._train.model_copy(update={"hook_timeout_s": 0.1})
    hook.finish()
    assert "on_checkpoint still runs for outer_00001: the run has ended and does not wait" in capfd.readouterr().err


KILLED = """
import os, signal, sys
from megatron_gspo.supervise import run_afterwards, supervised
def work():
    run_afterwards("sh -c 'echo $0 $MEGATRON_GSPO_STATUS'", 60.0, sys.argv[1])
    os.kill(os.getpid(), signal.SIGKILL)
    return 0
sys.exit(supervised(work, "rank 0"))
"""


def test_a_rank_that_was_killed_has_its_end_told_where_no_launcher_of_ours_is(tmp_path: Path) -> None:
    """Under torchrun: the process that watched over it knows."""
    environment = {name: value for name, value in os.environ.items() if name != "MEGATRON_GSPO_STORE"}
    done = subprocess.run([sys.executable, "-c", KILLED, str(tmp_path)], env=environment, check=False)
    assert done.returncode == 1
    assert (tmp_path / "hooks.log").read_text() == "failed 1\n"
