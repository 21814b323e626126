"""The terminal at the beginning and at the end of a run: what is waited for, and what came of it."""

from __future__ import annotations

import io
import shlex
from pathlib import Path

import pytest
from report_runs import make_config, make_fine_tuning, make_report, make_run

from megatron_gspo.commands import COMMANDS
from megatron_gspo.errors import DataError
from megatron_gspo.report.console import ConsoleSink
from megatron_gspo.report.ending import ending
from megatron_gspo.report.recorder import RunRecorder
from megatron_gspo.report.rundir import RunDirectory
from megatron_gspo.runs.waiting import starting_servers
from megatron_gspo.types import StepReport


def test_the_end_of_a_run_says_what_came_of_it_where_it_lies_and_what_to_do_next(tmp_path: Path) -> None:
    run = make_run(tmp_path / "a run", outer_steps=10)
    run.report_file.touch()
    (run.path / "hf").mkdir()
    (run.path / "hf" / "config.json").touch()
    last, greedy = run.metrics()[-1]["eval/accuracy"], run.metrics()[-1]["eval/greedy_accuracy"]
    accuracy = f"0.600 before, {last:.3f} after, greedy 0.650 before, {greedy:.3f} after"
    assert ending(run) == [
        "",
        f"finished       held-out accuracy {accuracy}",
        f"report         {run.report_file.as_uri()} (open it in a browser)",
        f"model          {run.path}/hf",
        f"next           megatron-gspo eval '{run.path}' --samples 8",
        f"               megatron-gspo status '{run.path}'",
    ]
    assert "a%20run" in ending(run)[2], "a link is one word"
    for line in ending(run)[-2:]:
        _, command, *arguments = shlex.split(line[15:])
        assert command in COMMANDS and arguments[0] == str(run.path)


def test_the_end_of_a_run_without_evaluations_or_page_says_what_there_is(tmp_path: Path) -> None:
    config = make_config(tmp_path / "run", data={"eval_path": ""}, eval={"every": 0})
    run = RunDirectory.create(config)
    writer = run.metrics_writer()
    for reward in (0.25, 0.5):
        writer.write(StepReport(int(4 * reward) - 1, int(4 * reward) - 1, 0, {"reward/mean": reward}))
    writer.close()
    assert ending(run) == [
        "",
        "finished       reward 0.250 -> 0.500; nothing was held out (data.eval_path)",
        f"next           megatron-gspo eval {run.path} --prompts HELD_OUT_FILE --samples 8",
        f"               megatron-gspo status {run.path}",
    ]
    assert ending(make_fine_tuning(tmp_path / "sft"))[1] == "finished       loss 3.0000 -> 1.2750"


def test_a_run_that_finishes_ends_with_these_lines_and_one_that_fails_does_not(tmp_path: Path, capsys) -> None:
    with RunRecorder(make_config(tmp_path / "run", train={"tensorboard": False}), 2) as recorder:
        recorder.initial({"eval/accuracy": 0.5})
        recorder.steps([make_report(4, minibatch) for minibatch in range(4)])
    said = capsys.readouterr().err
    assert "\nfinished       held-out accuracy 0.500 before, 0.7" in said
    assert f"\nreport         {(tmp_path / 'run' / 'report.html').as_uri()} (open" in said
    assert (tmp_path / "run" / "report.html").is_file(), "the page is there when it is named"
    with pytest.raises(DataError), RunRecorder(make_config(tmp_path / "other"), 2):
        raise DataError("no")
    assert "finished" not in capsys.readouterr().err


def test_the_time_before_the_first_step_is_no_part_of_the_eta(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A server takes 50 seconds to start, weights 10 to load, and each of twelve outer steps 2."""
    now = [1000.0]
    monkeypatch.setattr("megatron_gspo.report.console.time.monotonic", lambda: now[0])
    stream = io.StringIO()
    sink = ConsoleSink(make_config(tmp_path / "run"), world_size=2, stream=stream)
    now[0] += 60.0
    for outer_step in range(2):
        sink.phase(f"outer step {outer_step + 1} of 12")
        now[0] += 2.0
        for minibatch in range(4):
            sink.write(make_report(outer_step, minibatch))
        now[0] += 1.0  # a checkpoint: it comes again
    first, second = (line.split()[-1] for line in stream.getvalue().splitlines() if "/12 " in line)
    assert (first, second) == ("22s", "25s")  # 11 of 2 s; 10 of (2 + 3) / 2 s


def test_starting_servers_is_said_before_it_takes_its_time_and_how_long_it_took_after(monkeypatch) -> None:
    now = [0.0]
    monkeypatch.setattr("megatron_gspo.runs.waiting.time.monotonic", lambda: now[0])
    said: list[str] = []
    config = make_config(Path("run"), rollout={"local_servers": 2}).rollout
    with starting_servers(config, "cpu", said.append):
        assert said == ["starting 2 SGLang servers (about a minute on a CPU) ..."]
        now[0] += 34.2
    assert said[1:] == ["ready after 34 s"]
    with pytest.raises(RuntimeError), starting_servers(config, "cuda", said.append):
        raise RuntimeError
    assert said[2:] == ["starting 2 SGLang servers (a minute, and longer for a large model) ..."]
