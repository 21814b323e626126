"""``status`` and the terminal: where a run stands, and what looks wrong."""

from __future__ import annotations

import io
import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from report_runs import make_config, make_fine_tuning, make_report, make_run

from megatron_gspo.errors import DataError, DependencyError
from megatron_gspo.report.console import COLUMNS, ConsoleSink, fitting
from megatron_gspo.report.headline import tiles
from megatron_gspo.report.metrics import Record
from megatron_gspo.report.payload import resumed_at
from megatron_gspo.report.rundir import RunDirectory, initial_evaluation
from megatron_gspo.report.sink import Fanout
from megatron_gspo.report.status import format_line, format_status, last_checkpoint, summarise, warnings
from megatron_gspo.report.tensorboard import TensorBoardSink
from megatron_gspo.report.text import duration
from megatron_gspo.report.wandb import WandbSink
from megatron_gspo.types import StepReport


def lines_with(outer_steps: int = 12, **changes: float) -> list[Record]:
    """Healthy optimizer steps with some metrics set: ``clip__frac_tokens`` stands for ``clip/frac_tokens``."""
    metrics = {name.replace("__", "/"): value for name, value in changes.items()}
    return [make_report(outer, mini).as_record() | metrics for outer in range(outer_steps) for mini in range(4)]


def test_a_summary_says_where_the_run_stands(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", outer_steps=10, train={"outer_steps": 20})
    summary = summarise(run)
    assert (summary["outer_steps"], summary["outer_steps_total"], summary["optimizer_steps"]) == (10, 20, 40)
    assert summary["eval_first"] == 0.6
    assert summary["eval_last"] == run.metrics()[-1]["eval/accuracy"]
    assert summary["last_checkpoint"] == "outer_00010"
    split = summary["time_split"]
    assert split["logprobs"] == pytest.approx(0.6)
    assert 1.5 < split["rollout"] < 2.5
    assert summary["eta_s"] == pytest.approx(10 * summary["seconds_per_outer_step"])
    assert summary["warnings"] == []
    again = summarise(str(run.path))
    assert again | {"silent_s": summary["silent_s"]} == summary


def test_the_text_holds_the_numbers(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", outer_steps=10, train={"outer_steps": 20})
    text = format_status(summarise(run))
    assert "10/20 (40 optimizer steps)" in text
    assert "outer_00010" in text
    assert "logprobs 0.6" in text
    assert "left" not in text, "a finished run has no time left"
    assert "(mean of the last 5 outer steps)" in text, "never more than half of them"


def test_the_page_and_status_say_the_same_of_what_both_say(tmp_path: Path) -> None:
    """Over the same outer steps: of a run whose values change, another window shows."""
    run = make_run(tmp_path / "run", outer_steps=9, train={"outer_steps": 9})
    lines = run.metrics()
    for line in lines[1:]:
        line["kl/engine_k3"] = 1e-12 * (1 + line["outer_step"]) * (1 + line["minibatch"])
    run.metrics_file.write_text("".join(json.dumps(line) + "\n" for line in lines))
    summary, shown = summarise(run), {tile.name: tile for tile in tiles(run, summarise(run))}
    text = format_status(summary)
    assert summary["engine_k3_median"] == pytest.approx(1e-12 * 7.5 * 2.5), "of outer steps 6 to 9, over mini-batches"
    assert "engine gap k3  1.9e-11 (median of the last 4 outer steps)" in text
    assert (shown["engine gap k3"].value, shown["engine gap k3"].note) == (
        "1.9e-11",
        "median of the last 4 outer steps, healthy below 1e-3; tail 0",
    )
    assert f"reward         {shown['reward'].value} (mean of the last 4 outer steps)" in text
    assert shown["reward"].note.endswith("; means of 4")
    clipped = shown["clipped tokens"].value.removesuffix("%")
    assert f"{100 * summary['clip_frac_tokens']:.1f}" == clipped
    assert shown["eval accuracy"].value == f"{summary['eval_last']:.3f}"


def test_steps_are_counted_from_1_in_every_sentence(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", outer_steps=12)
    lines = [line | ({"grad_norm": 50.0} if line["outer_step"] == 4 else {}) for line in run.metrics()]
    lines = [line | ({"eval/accuracy": 0.99} if line["step"] == 19 else {}) for line in lines]
    run.metrics_file.write_text("".join(json.dumps(line) + "\n" for line in lines))
    shown = {tile.name: tile.note for tile in tiles(run, summarise(run))}
    assert shown["gradient norm"] == "largest 50 at step 5"
    assert shown["eval accuracy"].endswith("best 0.990 at step 5")


def test_the_status_of_a_fine_tuning_run_is_its_loss(tmp_path: Path) -> None:
    run = make_fine_tuning(tmp_path / "run")
    summary = summarise(run)
    assert (summary["loss_first"], summary["loss"]) == (3.0, pytest.approx(3.0 - 0.05 * 34.5))
    assert format_status(summary).splitlines() == [
        f"run            {run.path} (finished)",
        "step           40/40",
        "loss           3.0000 -> 1.2750 (mean of the last 10 steps)",
        "|grad|         0.5 (median of the last 10 steps)",
        "learning rate  0.001",
        "speed          900 tokens/s, 0.2 s a step",
        "checkpoint     none yet",
    ]
    assert format_line(summary) == "finished: step 40/40, loss 1.2750, 900 tokens/s, checkpoint none yet"
    shown = {tile.name: (tile.value, tile.note) for tile in tiles(run, summary) if tile.value != "-"}
    assert shown["loss"] == ("1.2750", "−1.7250 from 3.0000; mean of the last 10 steps")
    assert shown["run time"][1] == "40 of 40 steps" and shown["tokens/s"] == ("900", "0.25 s a step")


def test_a_run_without_a_line_has_a_status(tmp_path: Path) -> None:
    run = RunDirectory.create(make_config(tmp_path / "run"))
    summary = summarise(run)
    assert (summary["outer_steps"], summary["tokens_per_s"], summary["warnings"]) == (0, None, [])
    assert "none yet" in format_status(summary)
    with pytest.raises(DataError, match="no such run directory"):
        summarise(tmp_path / "other")


def test_the_initial_evaluation_is_no_training_step(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", outer_steps=0)
    summary = summarise(run)
    assert (summary["optimizer_steps"], summary["outer_steps"], summary["eval_last"]) == (0, 0, 0.6)


def test_the_last_checkpoint_is_the_one_that_resuming_continues_from(tmp_path: Path) -> None:
    run = RunDirectory.create(make_config(tmp_path / "run"))
    assert last_checkpoint(run) is None
    for name in ("outer_00009", "outer_00100", "outer_00200.unfinished"):
        (run.checkpoints / name).mkdir()
        (run.checkpoints / name / "checkpoint.json").touch()
    (run.checkpoints / "outer_00300").mkdir()
    assert last_checkpoint(run) == "outer_00100", "half a checkpoint is none"
    (run.checkpoints / "latest").write_text("outer_00009\n")
    assert last_checkpoint(run) == "outer_00009"
    (run.checkpoints / "latest").write_text("\n")
    assert last_checkpoint(run) is None


def test_a_healthy_run_warns_of_nothing() -> None:
    assert warnings(lines_with(), None) == []


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"clip__frac_tokens": 0.0}, "nothing was clipped for 12 outer steps"),
        ({"kl__engine_k3": 2e-3}, "kl/engine_k3 is 0.002, above 0.001"),
        ({"kl__engine_tail": 1e-2}, "kl/engine_tail is 0.01, above 0.0001"),
        ({"reward__zero_std_groups": 0.75}, "75% of the groups have equal rewards"),
        ({"reward__grader_timeouts": 3.0}, "3 responses per outer step took too long to grade"),
        ({"length__truncated": 0.6}, "60% of the responses were truncated"),
        ({"step__skipped": 1.0}, "10 of the last 10 outer steps were skipped: every response was dropped"),
    ],
)
def test_what_is_unhealthy_is_named_with_its_number(changes: dict[str, float], words: str) -> None:
    (warning,) = warnings(lines_with(**changes), None)
    assert words in warning


def test_clipping_in_the_first_minibatch_is_an_error_of_pi_old() -> None:
    lines = lines_with()
    lines[4]["clip/frac_tokens"] = 0.01
    (warning,) = warnings(lines, None)
    assert "minibatch 0 (step 5)" in warning


def test_one_minibatch_never_clips_and_that_is_no_news(tmp_path: Path) -> None:
    config = make_config(tmp_path / "run", train={"minibatches": 1})
    assert warnings([make_report(outer, 0).as_record() for outer in range(12)], config) == []


def test_the_terminal_gets_one_line_an_outer_step(tmp_path: Path) -> None:
    stream = io.StringIO()
    sink = ConsoleSink(make_config(tmp_path / "run"), world_size=2, stream=stream)
    sink.phase("rolling out")
    sink.write(initial_evaluation({"eval/accuracy": 0.6}))
    for outer_step in range(2):
        for minibatch in range(4):
            sink.write(make_report(outer_step, minibatch))
    sink.close()
    head, plan, titles, start, first, second = stream.getvalue().splitlines()
    assert head == "tiny-qwen3-moe (float32) · TP2 EP2 DP1 on 2 ranks · gspo, clip 1 - 0.001 ... 1 + 0.00133"
    assert plan.startswith("12 outer steps of 4 mini-batches · 16 prompts x 8 responses · writes ")
    assert start.split()[:3] == ["start", "-", "0.600"]
    reports = [make_report(0, minibatch).metrics for minibatch in range(4)]
    cells = first.split()
    assert cells[0] == "1/12"
    assert cells[3] == f"{100 * sum(report['clip/frac_tokens'] for report in reports) / 4:.3g}%"
    assert cells[7] == f"{reports[3]['ratio/p95'] - 1:+.1e}"
    assert second.split()[0] == "2/12"
    assert "\x1b" not in stream.getvalue(), "no colours where nobody sees them"
    assert len(titles) == len(first) == len(second)


def test_an_unfinished_outer_step_is_printed_at_the_end(tmp_path: Path) -> None:
    stream = io.StringIO()
    sink = ConsoleSink(make_config(tmp_path / "run"), world_size=2, stream=stream)
    sink.write(make_report(0, 0))
    assert "1/12" not in stream.getvalue()
    sink.close()
    assert "1/12" in stream.getvalue()


def skipped(outer_step: int, step: int) -> StepReport:
    metrics = {"dropped/responses": 128.0, "dropped/aborted": 128.0, "step/skipped": 1.0, "tokens_per_s": 0.0}
    return StepReport(step, outer_step, 0, metrics | {"time/rollout": 1.0})


def test_a_skipped_outer_step_has_a_line_of_its_own_everywhere(tmp_path: Path) -> None:
    """Its ``step`` is that of the next optimizer step, which is no resumption."""
    run, stream = RunDirectory.create(make_config(tmp_path / "run")), io.StringIO()
    console = ConsoleSink(make_config(tmp_path / "run"), world_size=2, stream=stream)
    later = [replace(make_report(2, minibatch), step=4 + minibatch) for minibatch in range(4)]
    sink = Fanout([run.metrics_writer(), console])
    for report in (*(make_report(0, minibatch) for minibatch in range(4)), skipped(1, 4), *later):
        sink.write(report)
    summary = summarise(run)
    assert (summary["outer_steps"], summary["optimizer_steps"]) == (3, 8)
    assert [text for text in summary["warnings"] if "skipped" in text] == [
        "1 of the last 3 outer steps were skipped: every response was dropped"
    ]
    assert [(line["step"], line["outer_step"]) for line in run.metrics()][3:6] == [(3, 0), (4, 1), (4, 2)]
    assert resumed_at(run, run.metrics()) == []
    first, second, third = stream.getvalue().splitlines()[-3:]
    assert [line.split()[0] for line in (first, second, third)] == ["1/12", "2/12", "3/12"]
    assert set(second.split()[1:10]) == {"-"}
    sink.write(skipped(3, 8))
    sink.close()
    assert summarise(run)["optimizer_steps"] == 8


def test_an_outer_step_with_fewer_mini_batches_ends_its_line(tmp_path: Path) -> None:
    """A mini-batch that lost all its groups is left out."""
    stream = io.StringIO()
    sink = ConsoleSink(make_config(tmp_path / "run"), world_size=2, stream=stream)
    sink.write(make_report(0, 0))
    sink.write(StepReport(1, 0, 1, make_report(0, 3).metrics))
    assert "1/12" in stream.getvalue()


def test_fine_tuning_prints_losses_and_few_lines(tmp_path: Path) -> None:
    config = make_config(tmp_path / "run", algorithm={"name": "sft"}, train={"outer_steps": 1500, "minibatches": 1})
    stream = io.StringIO()
    sink = ConsoleSink(config, world_size=2, stream=stream)
    for step in range(1500):
        sink.write(StepReport(step, step, 0, {"loss": 2.0 if step < 1470 else 1.0, "lr": 1e-3}))
    sink.close()
    lines = stream.getvalue().splitlines()
    assert lines[1].startswith("1500 steps of 16 examples · writes ")
    steps = [line.split() for line in lines if "/1500" in line]
    assert len(steps) == 50
    assert steps[0][:2] == ["30/1500", "2.0000"]
    assert steps[-1][:2] == ["1500/1500", "1.0000"]


def test_a_narrow_terminal_keeps_the_columns_that_matter() -> None:
    titles = [column.title for column in fitting(COLUMNS, 60)]
    assert titles == ["reward", "eval", "clip tok", "entropy", "k3 gap", "tok/s"]
    assert fitting(COLUMNS, 10_000) == COLUMNS


@pytest.mark.parametrize(
    ("seconds", "text"), [(0.2, "0s"), (59.7, "1m00s"), (725, "12m05s"), (11_220, "3h07m"), (187_200, "2d04h")]
)
def test_durations_read_like_a_clock(seconds: float, text: str) -> None:
    assert duration(seconds) == text


def test_tensorboard_gets_every_metric_under_its_own_name(tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    sink = TensorBoardSink(tmp_path)
    reports = [initial_evaluation({"eval/accuracy": 0.6}), make_report(0, 0), make_report(0, 1)]
    for report in reports:
        sink.write(report)
    sink.close()
    events = EventAccumulator(str(tmp_path))
    events.Reload()
    assert set(events.Tags()["tensors"]) == {name for report in reports for name in report.metrics}
    steps = [(event.step, event.tensor_proto.float_val[0]) for event in events.Tensors("grad_norm")]
    assert [step for step, _ in steps] == [0, 1]
    assert steps[1][1] == pytest.approx(reports[2].metrics["grad_norm"], rel=1e-6)
    assert [event.step for event in events.Tensors("eval/accuracy")] == [-1]


def test_wandb_that_is_missing_names_its_extra(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "wandb", None)
    run = RunDirectory.create(make_config(tmp_path / "run"))
    with pytest.raises(DependencyError, match=r"megatron-gspo\[wandb\]"):
        WandbSink(run, make_config(tmp_path / "run"))


def test_a_fanout_writes_to_each_sink_in_order() -> None:
    calls: list[Any] = []

    class Recorder:
        def __init__(self, name: str) -> None:
            self.name = name

        def write(self, report: Any) -> None:
            calls.append((self.name, report.step))

        def close(self) -> None:
            calls.append((self.name, "closed"))

    sink = Fanout([Recorder("a"), Recorder("b")])
    sink.write(make_report(0, 2))
    sink.close()
    assert calls == [("a", 2), ("b", 2), ("a", "closed"), ("b", "closed")]


def test_reading_a_run_imports_no_torch() -> None:
    code = "import sys, megatron_gspo.report.html, megatron_gspo.report.status; print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"
