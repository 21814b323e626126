"""``eval`` and training's own evaluation are one measurement: equal weights and seeds give equal figures."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file

from megatron_gspo.cli import main
from megatron_gspo.commands.status import look
from megatron_gspo.config import RunConfig, SyncConfig
from megatron_gspo.report.manifest import describe
from megatron_gspo.report.rundir import RunDirectory
from megatron_gspo.report.status import format_status
from megatron_gspo.sync.base import make_weight_sync
from megatron_gspo.sync.peers import Peers
from tests.pool import RankPool
from tests.training.conftest import MakeConfig
from tests.training.test_runs import metrics_of, train

Captured = pytest.CaptureFixture[str]
SAMPLES = 3


@pytest.fixture
def fresh_server(server: str, quickstart: Path) -> str:
    """The server with the weights it was started with, as version 0."""
    weights = load_file(quickstart / "model" / "model.safetensors")
    sync = make_weight_sync(SyncConfig(method="tensor"), [server], Peers(), model_path=quickstart / "model")
    sync.push(iter(weights.items()), 0)
    return server


@pytest.fixture
def run_config(make_config: MakeConfig) -> RunConfig:
    """A run whose evaluations have something to say: right answers, wrong ones, and weights that move."""
    reward = f"{Path(__file__).with_name('rewards.py')}:first_token_is_even"
    settings = [f'reward.function="{reward}"', f"eval.samples={SAMPLES}", "eval.every=1", "train.outer_steps=1"]
    return make_config(*settings, "optimizer.lr=1e-2")


def evaluated(capsys: Captured, *arguments: str) -> dict[str, Any]:
    assert main(["eval", *arguments, "--json"]) == 0
    result: dict[str, Any] = json.loads(capsys.readouterr().out)
    return result


def figures(result: dict[str, Any]) -> dict[str, float]:
    """A result in the names of training's metrics."""
    values = {name: estimate["value"] for name, estimate in result["result"]["estimates"].items()}
    if result["settings"]["greedy"]:
        return {"eval/greedy_accuracy": values["accuracy"]}
    return {
        "eval/accuracy": values["accuracy"],
        "eval/pass_at_k": values[f"pass@{SAMPLES}"],
        "eval/reward": values["reward"],
        "eval/rewarded": values["rewarded"],
    }


def of_training(line: dict[str, float], *, greedy: bool = False) -> dict[str, float]:
    evals = {name: value for name, value in line.items() if name.startswith("eval/")}
    return {name: value for name, value in evals.items() if ("greedy" in name) == greedy}


@pytest.mark.slow
def test_eval_repeats_what_training_measured_of_the_start_the_finished_run_and_a_checkpoint(
    ranks: RankPool, run_config: RunConfig, fresh_server: str, quickstart: Path, tmp_path: Path, capsys: Captured
) -> None:
    ranks.run(2, train, run_config)
    before, *_, after = metrics_of(run_config)
    assert 0 < before["eval/accuracy"] < before["eval/pass_at_k"] <= 1
    assert of_training(before) != of_training(after), "the weights have not moved enough to be told apart"

    run, here = run_config.train.run_dir, "rollout.servers=[]"
    finished = evaluated(capsys, run, here, "--out", f"{tmp_path}/finished")
    assert figures(finished) == of_training(after)
    latest = evaluated(capsys, run, here, "--checkpoint", "latest")
    assert figures(latest) == of_training(after)
    assert latest["model"]["step"] == 2
    assert not list(Path(run, "evals").glob("*/exported-*")), "the exported weights are removed"

    assert finished["model"]["kind"] == "run" and finished["versions"]["sglang"] == "0.5.23"
    lines = [json.loads(line) for line in (tmp_path / "finished" / "samples.jsonl").read_text().splitlines()]
    assert [(line["prompt_id"], line["sample"]) for line in lines[:4]] == [
        *((lines[0]["prompt_id"], sample) for sample in range(SAMPLES)),
        (lines[3]["prompt_id"], 0),
    ]
    assert sum(line["reward"] for line in lines) / len(lines) == pytest.approx(after["eval/reward"], rel=1e-12)
    assert json.loads((tmp_path / "finished" / "result.json").read_text()) == finished


def test_eval_of_a_hugging_face_directory_is_training_s_evaluation_of_its_start(
    ranks: RankPool, run_config: RunConfig, fresh_server: str, quickstart: Path, tmp_path: Path, capsys: Captured
) -> None:
    arguments = [
        *(f"{quickstart}/model", f'rollout.servers=["{fresh_server}"]'),
        *("--prompts", run_config.data.eval_path, "--reward", run_config.reward.function),
        *("--max-tokens", f"{run_config.rollout.max_response_tokens}"),
    ]
    sampled = evaluated(capsys, *arguments, "--samples", f"{SAMPLES}", "--out", f"{tmp_path}/sampled")
    greedy = evaluated(capsys, *arguments, "--greedy", "--out", f"{tmp_path}/greedy")
    assert sampled["settings"]["dtype"] == "float32"
    ranks.run(2, train, run_config)
    start = metrics_of(run_config)[0]
    assert figures(sampled) == of_training(start)
    assert figures(greedy) == of_training(start, greedy=True)


def test_a_bare_model_is_evaluated_to_the_end_of_its_positions_without_a_limit_being_named(
    fresh_server: str, quickstart: Path, tmp_path: Path, capsys: Captured
) -> None:
    """64 positions, prompts of 13 tokens, and a random model that goes on: a response longer by one would be cut by the
    server, which is an error."""
    reward = f"{Path(__file__).with_name('rewards.py')}:first_token_is_even"
    arguments = [f"{quickstart}/model", "--prompts", f"{quickstart}/eval.jsonl", "--reward", reward, "--samples", "8"]
    result = evaluated(capsys, *arguments, f'rollout.servers=["{fresh_server}"]', "--out", f"{tmp_path}/out")
    assert (result["settings"]["max_prompt_tokens"], result["settings"]["max_response_tokens"]) == (13, 49)
    assert result["result"]["truncated"] > 0 and result["result"]["tokens"]["max"] == 49


def test_servers_that_hold_other_weights_are_refused_and_the_remedy_is_said(
    ranks: RankPool, run_config: RunConfig, fresh_server: str, quickstart: Path, tmp_path: Path, capsys: Captured
) -> None:
    config = tmp_path / "config.toml"
    config.write_text(f"""
        model.path = "{quickstart}/model"
        data = {{path = "{quickstart}/train.jsonl", eval_path = "{quickstart}/eval.jsonl"}}
        train.run_dir = "{tmp_path}/run"
        rollout = {{servers = ["{fresh_server}"], max_response_tokens = 8}}
    """)
    assert main(["eval", str(config), "--greedy", "--out", f"{tmp_path}/right"]) == 0
    capsys.readouterr()
    weights = load_file(quickstart / "model" / "model.safetensors")
    sync = make_weight_sync(SyncConfig(method="tensor"), [fresh_server], Peers(), model_path=quickstart / "model")
    sync.push(iter(weights.items()), 7)
    assert main(["eval", str(config), "--greedy", "--out", f"{tmp_path}/wrong"]) == 2
    assert "weights of version 7" in last_line(capsys) and not (tmp_path / "wrong").exists()


def last_line(capsys: Captured) -> str:
    captured = capsys.readouterr()
    errors = [line for line in captured.err.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1 and not captured.out
    return errors[0]


def test_a_reward_that_raises_leaves_the_responses_and_no_result(
    fresh_server: str, quickstart: Path, tmp_path: Path, capsys: Captured
) -> None:
    reward = f"{Path(__file__).with_name('rewards.py')}:jams_at_the_second_sample"
    arguments = ["--prompts", f"{quickstart}/eval.jsonl", "--reward", reward, "--samples", "2", "--limit", "3"]
    servers = f'rollout.servers=["{fresh_server}"]'
    out = tmp_path / "out"
    command = ["eval", f"{quickstart}/model", *arguments, "--max-tokens", "8", "--out", str(out), servers]
    assert main(command) == 1
    line = last_line(capsys)
    assert "RuntimeError: paper jam" in line and "responses that had arrived" in line
    assert not (out / "result.json").exists() and not (out / "verdicts.jsonl").read_text()
    assert (out / "responses.jsonl").read_text().count("prompt_id") in (1, 2, 3)


def test_a_model_that_the_engine_takes_for_another_one_is_not_examined(
    quickstart: Path, tmp_path: Path, capsys: Captured
) -> None:
    model = Path(shutil.copytree(quickstart / "model", tmp_path / "model"))
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps(config | {"mlp_only_layers": [1]}))
    command = ["eval", str(model), "--prompts", str(quickstart / "eval.jsonl"), "--reward", "exact"]
    assert main([*command, "--out", str(tmp_path / "out")]) == 2
    assert f"error: {model} has dense layers (1; mlp_only_layers" in capsys.readouterr().err


def test_a_server_that_is_down_is_one_line_and_leaves_nothing(
    quickstart: Path, tmp_path: Path, capsys: Captured
) -> None:
    arguments = ["--prompts", f"{quickstart}/eval.jsonl", "--reward", "exact", "--out", f"{tmp_path}/out"]
    assert main(["eval", f"{quickstart}/model", *arguments, 'rollout.servers=["http://127.0.0.1:1"]']) == 1
    assert "http://127.0.0.1:1 cannot be asked what it serves: [Errno 111] Connection refused" in last_line(capsys)
    assert not (tmp_path / "out").exists()


def test_status_asks_the_servers_of_a_run_that_goes_on(fresh_server: str, run_config: RunConfig) -> None:
    run = RunDirectory.create(run_config)
    both = [fresh_server, "http://127.0.0.1:1"]
    run.write_manifest(describe(run_config, 2, {"version": "0.5.23", "urls": both, "reward_servers": both}))
    assert run.manifest()["process"]["pid"] == os.getpid()
    alive, down = look(run.path)["servers"]
    assert alive == {"url": fresh_server, "error": None, "weight_version": "0"}
    assert "refused" in down["error"] and down["weight_version"] is None
    assert look(run.path)["reward_servers"] == [{"url": url["url"], "error": url["error"]} for url in (alive, down)]
    assert f"reward server  {fresh_server} (healthy)" in format_status(look(run.path))
    run.finish()
    assert look(run.path)["servers"] == look(run.path)["reward_servers"] == [{"url": url} for url in both], (
        "nobody asked"
    )
