"""The run directory: what is written is read back, and what is broken is survived."""

from __future__ import annotations

import json
import math
import os
import subprocess
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from report_runs import make_config, make_report, make_rollout, make_run

from megatron_gspo.config import RunConfig, load
from megatron_gspo.errors import BatchError, ConfigError, DataError
from megatron_gspo.report import samples
from megatron_gspo.report.manifest import describe, git_state, with_start
from megatron_gspo.report.metrics import METRICS, by_outer_step
from megatron_gspo.report.payload import settings
from megatron_gspo.report.rundir import RunDirectory, initial_evaluation, read_lines
from megatron_gspo.types import RolloutRecord, StepReport

REPOSITORY = Path(__file__).resolve().parents[2]


def test_a_run_is_read_back_as_it_was_written(tmp_path: Path) -> None:
    config = make_config(tmp_path / "run")
    run = RunDirectory.create(config)
    writer = run.metrics_writer()
    reports = [make_report(0, minibatch) for minibatch in range(4)]
    for report in reports:
        writer.write(report)
    writer.close()
    again = RunDirectory.open(run.path)
    assert again.metrics() == [report.as_record() for report in reports]
    assert again.config() == config
    assert load(run.config_file) == config
    assert run.checkpoints.is_dir()


def test_a_line_is_on_disk_when_write_returns(tmp_path: Path) -> None:
    run = RunDirectory.create(make_config(tmp_path / "run"))
    writer = run.metrics_writer()
    writer.write(make_report(0, 0))
    assert [line["step"] for line in run.metrics()] == [0]
    writer.close()


def test_every_line_is_strict_json_and_nan_is_left_out(tmp_path: Path) -> None:
    run = RunDirectory.create(make_config(tmp_path / "run"))
    writer = run.metrics_writer()
    metrics = {"length/mean_negative": math.nan, "kl/engine_k3": math.inf, "loss": np.float32(0.5)}
    writer.write(StepReport(step=3, outer_step=0, minibatch=3, metrics=metrics))
    writer.close()

    def refuse(constant: str) -> None:
        raise AssertionError(f"{constant} is not JSON")

    line = json.loads(run.metrics_file.read_text(), parse_constant=refuse)
    assert line == {"step": 3, "outer_step": 0, "minibatch": 3, "loss": 0.5}


def test_a_torn_last_line_is_ignored_by_readers_and_cut_off_by_the_next_writer(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", outer_steps=1)
    with run.metrics_file.open("a") as file:
        file.write('{"step": 4, "outer_step": 1, "minib')
    assert [line["step"] for line in run.metrics()] == [-1, 0, 1, 2, 3]
    writer = run.metrics_writer()
    writer.write(make_report(1, 0))
    writer.close()
    assert [line["step"] for line in run.metrics()] == [-1, 0, 1, 2, 3, 4]
    assert len(run.metrics_file.read_text().splitlines()) == 6


def test_of_a_step_written_twice_the_later_line_counts(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", outer_steps=2)
    writer = run.metrics_writer()
    writer.write(StepReport(step=4, outer_step=1, minibatch=0, metrics={"loss": 42.0}))
    writer.close()
    lines = run.metrics()
    assert [line["step"] for line in lines] == [-1, *range(8)]
    assert lines[5]["loss"] == 42.0


def test_an_existing_run_is_refused_and_stays_whole(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", outer_steps=1)
    with pytest.raises(ConfigError, match=r"run exists: .*train\.resume = true .*train\.overwrite = true"):
        RunDirectory.create(make_config(run.path))
    assert len(run.metrics()) == 5


def test_overwrite_replaces_the_whole_run(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", outer_steps=1)
    again = RunDirectory.create(make_config(run.path, train={"overwrite": True}))
    assert again.metrics() == []
    assert again.manifest() == {}
    assert list(again.checkpoints.iterdir()) == []


def test_overwrite_does_not_remove_what_is_not_a_run(tmp_path: Path) -> None:
    thesis = tmp_path / "home" / "thesis.tex"
    thesis.parent.mkdir()
    thesis.write_text("years of work")
    with pytest.raises(ConfigError, match="is not a run directory"):
        RunDirectory.create(make_config(thesis.parent, train={"overwrite": True}))
    assert thesis.read_text() == "years of work"


def test_one_process_writes_a_run_and_a_living_one_is_not_replaced(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", outer_steps=1)
    held = run.lock()
    with pytest.raises(ConfigError, match="is being written by another process"):
        run.lock()
    with pytest.raises(ConfigError, match="is being written by another process"):
        RunDirectory.create(make_config(run.path, train={"overwrite": True}))
    assert len(run.metrics()) == 5
    held.close()
    run.lock().close()


def test_who_holds_the_lock_writes_the_run(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", outer_steps=1)
    assert run.is_locked() is None  # without a lock file nothing is known
    with run.lock():
        assert run.is_locked()
    assert run.is_locked() is False


def test_cutting_back_leaves_what_was_there_at_the_checkpoint(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", outer_steps=4)
    before = run.metrics_file.read_text().splitlines()
    with run.metrics_file.open("a") as file:
        file.write('{"step": 16, "outer')
    run.cut_back(make_config(run.path, train={"outer_steps": 99}), 2)
    assert run.metrics_file.read_text().splitlines() == before[:9]  # the first evaluation, and two of 4 mini-batches
    assert list(run.rollout_files()) == [0, 1]
    assert load(run.config_file).train.outer_steps == 99


def test_the_manifest_says_which_form_each_operation_took(tmp_path: Path) -> None:
    known = {"model": {"path": "m", "kernels": "reference"}, "data": {"path": "d"}, "train": {"run_dir": str(tmp_path)}}
    kernels = describe(RunConfig.model_validate(known), 1)["kernels"]
    assert kernels["head"] == {"implementation": "tiles", "reason": 'model.kernels = "reference"'}


def test_the_manifest_lists_every_start_and_one_that_did_not_end_was_killed(tmp_path: Path) -> None:
    config = make_config(tmp_path / "run")
    first = with_start(describe(config, 2) | {"started": "then"}, {}, None)
    assert first["starts"] == [{"started": "then", "outer_step": 0, "layout": first["layout"]}]
    run = RunDirectory.create(config)
    continued = {"outer_step": 4, "checkpoint": "outer_00004", "changes": {"parallel.tensor": [2, 1]}}
    run.write_manifest(with_start(describe(config, 4), first, continued))
    run.finish("stopped")
    manifest = run.manifest()
    assert manifest["started"] == "then"
    assert manifest["starts"][0]["status"] == "killed"
    second = manifest["starts"][1]
    assert (second["status"], second["outer_step"], second["layout"]["world_size"]) == ("stopped", 4, 4)
    assert second["changes"] == {"parallel.tensor": [2, 1]}


@pytest.mark.parametrize("name", ["missing", "empty"])
def test_opening_what_is_no_run_says_so(tmp_path: Path, name: str) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match=name):
        RunDirectory.open(tmp_path / name)


def test_a_directory_with_nothing_but_metrics_is_a_run(tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").write_text(json.dumps(make_report(0, 0).as_record()) + "\n")
    run = RunDirectory.open(tmp_path)
    assert (run.config(), run.manifest(), run.rollout_files()) == (None, {}, {})
    assert len(run.metrics()) == 1


def test_rollouts_are_read_back_with_the_separators_that_json_does_not_escape(tmp_path: Path) -> None:
    run = RunDirectory.create(make_config(tmp_path / "run"))
    record = RolloutRecord("p", 0, "prompt", "a\u2028b\nc", ["a\u2028b", "\nc"], np.float64(1), np.float32(0.5), "stop")
    path = run.write_rollouts(12, [record, make_rollout(1)])
    assert path.name == "outer_00012.jsonl"
    first, second = read_lines(path)
    assert first["tokens"] == ["a\u2028b", "\nc"]
    assert (first["reward"], first["advantage"]) == (1.0, 0.5)
    assert "new_logprobs" not in first
    assert second["new_logprobs"] == pytest.approx(make_rollout(1).new_logprobs, abs=1e-7)
    assert run.rollout_files() == {12: path}


def test_logprobs_that_do_not_match_the_tokens_are_refused() -> None:
    with pytest.raises(BatchError, match="response p7/3: 2 tokens but 1 old_logprobs"):
        RolloutRecord("p7", 3, "", "ab", ["a", "b"], 0.0, 0.0, "stop", old_logprobs=[-1.0])


def test_the_manifest_says_what_ran(tmp_path: Path) -> None:
    config = make_config(tmp_path / "run", train={"seed": 7})
    manifest = describe(config, world_size=4, engine={"version": "0.5.23"})
    assert manifest["layout"]["data"] == 2
    assert manifest["layout"]["world_size"] == 4
    assert manifest["versions"]["sglang"] == "0.5.23"
    assert manifest["versions"]["torch"].startswith("2.")
    assert manifest["seeds"] == {"train": 7}
    assert manifest["clip_range"] == (1e-3, 1.33e-3)


def test_finishing_keeps_the_manifest_and_adds_the_end(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", outer_steps=1)
    before = run.manifest()
    run.finish("failed")
    assert run.manifest() == before | {"status": "failed", "ended": run.manifest()["ended"]}


def test_the_commit_is_that_of_the_package_and_not_of_a_repository_around_it(tmp_path: Path) -> None:
    package = tmp_path / "checkout" / "megatron_gspo"
    package.mkdir(parents=True)
    (package / "code.py").write_text("x = 1\n")
    installed = package.parent / ".venv" / "megatron_gspo"
    installed.mkdir(parents=True)
    git = ["git", "-C", str(package.parent), "-c", "user.name=t", "-c", "user.email=t@example.org"]
    subprocess.run([*git, "init", "-q"], check=True)
    assert git_state(package) is None  # no commit yet
    subprocess.run([*git, "add", "megatron_gspo"], check=True)
    subprocess.run([*git, "commit", "-q", "--no-verify", "-m", "first"], check=True)
    state = git_state(package)
    assert state is not None and len(state["commit"]) == 40 and not state["dirty"]
    (package / "code.py").write_text("x = 2\n")
    state = git_state(package)
    assert state is not None and state["dirty"]
    assert git_state(installed) is None


def test_an_outer_step_means_over_minibatches_but_takes_ratios_and_times_from_the_last() -> None:
    lines = [make_report(0, minibatch).as_record() for minibatch in range(4)]
    (outer,) = by_outer_step(lines)
    assert outer["clip/frac_tokens"] == pytest.approx(sum(line["clip/frac_tokens"] for line in lines) / 4)
    assert outer["ratio/p95"] == lines[3]["ratio/p95"]
    assert outer["time/train"] == lines[3]["time/train"]
    assert (outer["step"], outer["outer_step"]) == (3, 0)


def test_the_initial_evaluation_stands_before_step_0() -> None:
    report = initial_evaluation({"eval/accuracy": 0.6})
    assert report.as_record() == {"step": -1, "outer_step": -1, "minibatch": -1, "eval/accuracy": 0.6}


def test_the_documentation_is_the_table_of_metrics_word_for_word() -> None:
    lines = (REPOSITORY / "docs/metrics.md").read_text().splitlines()
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines if line.startswith("| `")]
    documented = {name.strip("`"): (unit, meaning, look_for) for name, unit, meaning, look_for in rows}
    assert documented == {name: (metric.unit, metric.meaning, metric.look_for) for name, metric in METRICS.items()}


# ------------------------------------------------------------------------------------------------------- strict JSON


def no_constant(word: str) -> None:
    raise AssertionError(f"{word} is no JSON")


def test_numbers_that_json_has_no_word_for_are_left_out_of_metrics_and_null_in_rollouts(tmp_path: Path) -> None:
    run = RunDirectory.create(make_config(tmp_path / "run"))
    writer = run.metrics_writer()
    writer.write(StepReport(0, 0, 0, {"loss": 1.0, "ratio/ess": math.nan, "grad_norm": math.inf}))
    writer.close()
    record = make_rollout(0)
    values = [math.nan, -math.inf, *(record.new_logprobs or ())[2:]]
    path = run.write_rollouts(0, [replace(record, ratio=math.inf, new_logprobs=values, response="\ud800")])
    (line,) = run.metrics_file.read_text().splitlines()
    assert json.loads(line, parse_constant=no_constant) == {"step": 0, "outer_step": 0, "minibatch": 0, "loss": 1.0}
    read = json.loads(path.read_text(), parse_constant=no_constant)
    assert (read["ratio"], read["new_logprobs"][:2], read["response"]) == (None, [None, None], "\ud800")
    assert samples.sample(read)["shades"]["new − old"][:2] == [None, None]


def test_a_line_of_somebody_elses_with_what_is_no_number_still_reads(tmp_path: Path) -> None:
    run = RunDirectory.create(make_config(tmp_path / "run"))
    other = '{"step": 0, "outer_step": 0, "minibatch": 0, "loss": NaN, "grad_norm": "much", "lr": 1e-3, "x": 1e999}'
    deep = "[" * 100_000
    run.metrics_file.write_text(f"{other}\n{deep}\n{{}}\n")
    assert run.metrics() == [{"step": 0, "outer_step": 0, "minibatch": 0, "lr": 1e-3}]
    run.cut_back(make_config(run.path), 1)
    (line,) = run.metrics_file.read_text().splitlines()
    assert json.loads(line, parse_constant=no_constant)["loss"] is None


@pytest.mark.timeout(60)
@pytest.mark.parametrize("name", ["manifest.json", "metrics.jsonl", "config.toml"])
def test_a_pipe_in_the_place_of_a_file_is_named_and_not_waited_for(tmp_path: Path, name: str) -> None:
    run = make_run(tmp_path / "run", outer_steps=1)
    (run.path / name).unlink()
    os.mkfifo(run.path / name)
    with pytest.raises(DataError, match=f"{name} is a named pipe, where files are expected"):
        RunDirectory.open(run.path)
    assert list(read_lines(run.path / name)) == []


def test_files_that_are_nested_without_end_are_as_if_they_were_torn(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", outer_steps=1)
    run.manifest_file.write_text("[" * 100_000)
    run.config_file.write_text("a = " + "[" * 100_000)
    assert run.manifest() == {} and settings(run) == {} and run.config() is None
