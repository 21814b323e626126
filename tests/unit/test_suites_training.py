"""Suites during training: when they are asked, and that their figures are those of ``eval``."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from report_runs import make_config

from megatron_gspo.cli import main
from megatron_gspo.config import RunConfig
from megatron_gspo.data.tokenizer import open_tokenizer
from megatron_gspo.errors import ConfigError
from megatron_gspo.report.charts import CHARTS
from megatron_gspo.report.drawing import for_families
from megatron_gspo.report.metrics import METRICS, row_of
from megatron_gspo.report.prometheus import series_name
from megatron_gspo.runs import loop
from megatron_gspo.train import suites
from megatron_gspo.train.suite_inputs import load_suites
from tests.unit import suite_files
from tests.unit.suite_engine import StandInEngine, standing_in, write_model
from tests.unit.test_suites import answers_half

Captured = pytest.CaptureFixture[str]
ASKED = ["gsm8k:k=4:temperature=1", "codeforces:k=2"]


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("training")
    write_model(root / "model")
    suite_files.gsm8k(root / "published")
    suite_files.codeforces(root / "published")
    return root


def config_of(place: Path, **settings: Any) -> RunConfig:
    evaluation = {"suites": ASKED, "suites_data": str(place / "published"), **settings}
    return make_config(place / "run", model={"path": str(place / "model")}, eval=evaluation)


def test_training_and_eval_give_the_same_figures(
    place: Path, tmp_path: Path, capsys: Captured, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = config_of(place)
    with standing_in(answers_half) as engine:
        tasks = tuple(load_suites(config, open_tokenizer(config)))
        run = alone(config, tasks, engine())
        for name, value in (("get_ready", None), ("agree", None)):
            monkeypatch.setattr(suites, name, lambda *_, value=value: value)
        monkeypatch.setattr(suites, "gather_objects", lambda mine, _: [mine])
        found = suites.evaluate_suites(run, 3)
        arguments = ["--suite", ",".join(ASKED), "--data", str(place / "published"), "--out", str(tmp_path / "out")]
        assert main(["eval", str(place / "model"), *arguments, "--json"]) == 0
    results = json.loads(capsys.readouterr().out)
    estimates = {name: result["result"]["estimates"] for name, result in results.items()}
    assert found == {
        "eval/gsm8k/accuracy": estimates["gsm8k"]["accuracy"]["value"],
        "eval/gsm8k/pass_at_k": estimates["gsm8k"]["pass@4"]["value"],
        "eval/gsm8k/maj_at_k": estimates["gsm8k"]["maj@4"]["value"],
        "eval/gsm8k/truncated": 0.0,
        "eval/codeforces/accuracy": estimates["codeforces"]["accuracy"]["value"],
        "eval/codeforces/pass_at_k": estimates["codeforces"]["pass@2"]["value"],
        "eval/codeforces/elo": results["codeforces"]["result"]["measured"]["elo"]["value"],
        "eval/codeforces/truncated": 0.0,
    }
    assert 0 < found["eval/gsm8k/accuracy"] < 1


def alone(config: RunConfig, tasks: tuple[Any, ...], engine: StandInEngine) -> Any:
    """As much of a run of one rank as an evaluation looks at."""
    groups = SimpleNamespace(data_size=1, data_rank=0, is_leader=True, world=None)
    fleet = SimpleNamespace(hear=lambda engine: None)
    return SimpleNamespace(config=config, suites=tasks, engine=engine, groups=groups, fleet=fleet, eval_prompts=None)


def test_every_recorded_metric_of_a_suite_has_its_row_a_curve_and_a_label(place: Path) -> None:
    recorded = [f"eval/gpqa-diamond/{name}" for name in ("accuracy", "pass_at_k", "maj_at_k", "elo", "truncated")]
    assert all(row_of(name) in METRICS and METRICS[row_of(name)].combine == "last" for name in recorded)
    assert row_of("eval/accuracy") == "eval/accuracy" and "eval/accuracy" in METRICS
    drawn = {curve.metric: curve.label for chart in CHARTS for curve in for_families(chart, recorded).curves}
    assert set(recorded) <= set(drawn)
    assert drawn["eval/gpqa-diamond/accuracy"] == "gpqa-diamond"
    assert drawn["eval/gpqa-diamond/maj_at_k"] == "gpqa-diamond maj@k"
    assert series_name("eval/gpqa-diamond/elo") == ("eval_suite_elo", {"suite": "gpqa-diamond"})


def test_suites_are_asked_before_the_first_step_every_so_many_and_after_the_last(place: Path) -> None:
    run = alone(config_of(place, suites_every=3, every=2), ("a task",), StandInEngine())
    run.config = run.config.model_copy(update={"train": run.config.train.model_copy(update={"outer_steps": 7})})
    asked = [step for step in range(8) if suites.evaluate_suites in loop.evaluations(run, step)]
    assert asked == [0, 3, 6, 7]
    assert not any(loop.evaluate in loop.evaluations(run, step) for step in range(8)), "nothing is held out"
    run.eval_prompts = ["a prompt"]
    assert [step for step in range(8) if loop.evaluate in loop.evaluations(run, step)] == [0, 2, 4, 6, 7]
    run.suites = ()
    assert loop.evaluations(run, 3) == []


def test_suites_without_their_data_are_refused_at_the_start(place: Path) -> None:
    with pytest.raises(ConfigError, match="suites_data must say where their published files are"):
        config_of(place, suites_data="")
    config = config_of(place, suites=["lcb"])
    with pytest.raises(ConfigError, match="suite lcb: its problems are not in"):
        load_suites(config, open_tokenizer(config))
