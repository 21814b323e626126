"""Weights & Biases, the real package, offline: what it wrote to its own file is read back."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import wandb
from report_runs import make_config, make_report
from wandb.proto import wandb_internal_pb2
from wandb.sdk.internal.datastore import DataStore

from megatron_gspo.errors import ConfigError
from megatron_gspo.report.rundir import RunDirectory, initial_evaluation
from megatron_gspo.report.wandb import WandbSink
from megatron_gspo.types import StepReport


@pytest.fixture(autouse=True)
def offline(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Nothing leaves this machine, nothing of this account is read, and wandb's service ends with the test."""
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    for name in ("WANDB_CONFIG_DIR", "WANDB_CACHE_DIR", "WANDB_DATA_DIR"):
        monkeypatch.setenv(name, str(tmp_path / name.lower()))
    yield
    wandb.teardown()


def logged(run: RunDirectory, reports: list[StepReport]) -> None:
    sink = WandbSink(run, run.config())  # type: ignore[arg-type]
    for report in reports:
        sink.write(report)
    sink.close()


def records(run: RunDirectory) -> list[list[Any]]:
    """Of each start of the sink, in order, everything in wandb's file."""
    wandb.teardown()  # its service writes behind our back; a process that exits waits for it as well
    files = sorted(run.path.glob("wandb/offline-run-*/*.wandb"))
    return [list(_read(file)) for file in files]


def _read(file: Path) -> Iterator[Any]:
    store = DataStore()
    store.open_for_scan(str(file))
    while (data := store.scan_data()) is not None:
        record = wandb_internal_pb2.Record()
        record.ParseFromString(data)
        yield record


def history(found: list[Any]) -> list[dict[str, float]]:
    """The logged lines, without wandb's own entries."""
    lines = [record.history.item for record in found if record.HasField("history")]
    entries = [{item.key or "/".join(item.nested_key): json.loads(item.value_json) for item in line} for line in lines]
    return [{name: value for name, value in line.items() if not name.startswith("_")} for line in entries]


def test_every_metric_of_every_step_is_in_wandbs_file_with_the_configuration(tmp_path: Path) -> None:
    run = RunDirectory.create(make_config(tmp_path / "run"))
    reports = [initial_evaluation({"eval/accuracy": 0.6}), make_report(0, 0), make_report(0, 3)]
    logged(run, reports)
    (found,) = records(run)
    assert history(found) == [{"step": r.step, "outer_step": r.outer_step, **r.metrics} for r in reports]
    (start,) = [record.run for record in found if record.HasField("run")]
    assert start.display_name == "run"
    config = {item.key: json.loads(item.value_json) for item in start.config.update}
    assert config["algorithm"]["clip_low"] == 1e-3
    metrics = [record.metric for record in found if record.HasField("metric")]
    assert "step" in {metric.name for metric in metrics}
    assert {metric.step_metric for metric in metrics if metric.glob_name == "*"} == {"step"}


def test_a_resumed_run_is_the_same_wandb_run_and_another_directory_another(tmp_path: Path) -> None:
    run, other = (RunDirectory.create(make_config(tmp_path / name)) for name in ("run", "other"))
    logged(run, [make_report(0, 0)])
    logged(RunDirectory.open(run.path), [make_report(0, 1)])
    logged(other, [make_report(0, 0)])
    first, second = records(run)
    starts = [record.run for found in (first, second, *records(other)) for record in found if record.HasField("run")]
    ids = [start.run_id for start in starts]
    assert ids[0] == ids[1] != ids[2]
    assert [line["step"] for line in (*history(first), *history(second))] == [0, 1]


def test_wandb_that_cannot_start_is_one_line_that_says_what_to_set(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(**settings: Any) -> None:
        assert settings["resume"] == "allow"
        raise wandb.errors.UsageError("No API key configured.")

    monkeypatch.setattr(wandb, "init", refuse)
    run = RunDirectory.create(make_config(tmp_path / "run"))
    with pytest.raises(ConfigError, match=r"No API key configured.*WANDB_MODE=offline"):
        WandbSink(run, make_config(tmp_path / "run"))
