"""Suites on a real server, which is killed with the command and started again, and during a training run."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from tests.rollout.conftest import require_sglang
from tests.unit import suite_files
from tests.unit.suite_engine import write_model

pytestmark = [pytest.mark.slow_suite, pytest.mark.timeout(1800)]
FILES = ("settings.json", "samples.jsonl", "result.json")
SUITES = ",".join(
    (
        "gsm8k:k=2:temperature=1:top_p=0.9:max_tokens=160",
        "humaneval:k=2:temperature=1:top_k=50:max_tokens=40",
        "mbpp:max_tokens=24",
    )
)


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A byte-level model with random weights, and published files: 24 problems of GSM8K, a few of the others."""
    require_sglang()
    root = tmp_path_factory.mktemp("served")
    write_model(root / "model", positions=1024, weights=True)
    suite_files.humaneval(root / "published")
    suite_files.mbpp(root / "published")
    rows = [{"question": f"Ann has {n} apples and buys 2. How many?", "answer": f"#### {n + 2}"} for n in range(24)]
    suite_files.jsonl(root / "published/gsm8k/test.jsonl", rows)
    return root


def command(*words: object) -> list[str]:
    return [sys.executable, "-m", "megatron_gspo.cli", *map(str, words)]


def evaluate(place: Path, out: Path, *settings: str) -> list[str]:
    arguments = ["--suite", SUITES, "--data", place / "published", "--out", out]
    return command("eval", place / "model", *arguments, "rollout.concurrency=1", "rollout.local_servers=1", *settings)


def test_a_killed_evaluation_of_suites_gives_the_files_of_one_that_was_not(place: Path, tmp_path: Path) -> None:
    subprocess.run(evaluate(place, tmp_path / "whole"), check=True, timeout=900)
    killed = tmp_path / "killed"
    for lines in (3, 9):
        with subprocess.Popen(evaluate(place, killed)) as process:
            arrived, end = killed / "gsm8k/responses.jsonl", time.monotonic() + 600
            while not arrived.is_file() or arrived.read_bytes().count(b"\n") < lines:
                assert process.poll() is None and time.monotonic() < end
                time.sleep(0.02)
            process.send_signal(signal.SIGKILL)
        assert not (killed / "gsm8k/result.json").exists(), "it was killed in the middle"
    subprocess.run(evaluate(place, killed), check=True, timeout=900)
    for suite in ("gsm8k", "humaneval", "mbpp"):
        for file in FILES:
            assert (killed / suite / file).read_bytes() == (tmp_path / "whole" / suite / file).read_bytes(), (
                suite,
                file,
            )
    assert (killed / "summary.json").read_bytes() == (tmp_path / "whole/summary.json").read_bytes()
    assert json.loads((killed / "gsm8k/clock.json").read_text())["starts"] == 3
    results = {suite: json.loads((killed / suite / "result.json").read_text()) for suite in ("gsm8k", "humaneval")}
    assert 0 < results["gsm8k"]["result"]["truncated"] < 1
    assert results["humaneval"]["result"]["components"]["program"] < 1, "babble is no program"
    lines = [json.loads(line) for line in (killed / "gsm8k/samples.jsonl").read_text().splitlines()]
    assert len({line["response"] for line in lines}) == 48, "every response has a seed of its own"


def test_training_measures_what_eval_does_at_the_same_weights(place: Path, tmp_path: Path) -> None:
    suite_files.jsonl(tmp_path / "train.jsonl", [{"prompt": f"{n}+1=", "answer": f"{n + 1}"} for n in range(8)])
    reward = f"{Path(__file__).with_name('rewards.py')}:share_of_even_tokens"
    tree: dict[str, Any] = {
        "model": {"path": str(place / "model"), "dtype": "float32"},
        "data": {"path": str(tmp_path / "train.jsonl")},
        "train": {"run_dir": str(tmp_path / "run"), "outer_steps": 1, "prompts_per_step": 2, "minibatches": 1},
        "rollout": {"group_size": 2, "max_prompt_tokens": 16, "max_response_tokens": 12},
        "reward": {"function": reward},
        "optimizer": {"lr": 1e-2},
        "eval": {"suites": [SUITES.split(",")[0]], "suites_data": str(place / "published"), "suites_every": 1},
    }
    import tomli_w

    (tmp_path / "run.toml").write_text(tomli_w.dumps(tree))
    subprocess.run(command("train", tmp_path / "run.toml"), check=True, timeout=900)
    lines = [json.loads(line) for line in (tmp_path / "run/metrics.jsonl").read_text().splitlines()]
    first, last = lines[0], lines[-1]
    assert set(first) == {"step", "outer_step", "minibatch"} | {
        f"eval/gsm8k/{name}" for name in ("accuracy", "pass_at_k", "maj_at_k", "truncated")
    }
    assert first["eval/gsm8k/truncated"] != last["eval/gsm8k/truncated"], "the weights have moved"
    for subject, line in ((place / "model", first), (tmp_path / "run", last)):
        words = ["--suite", SUITES.split(",")[0], "--data", place / "published", "--json"]
        out = ["--out", tmp_path / f"of-{subject.name}"]
        done = subprocess.run(
            command("eval", subject, *words, *out), check=True, timeout=900, capture_output=True, text=True
        )
        found = json.loads(done.stdout)["gsm8k"]["result"]
        assert found["truncated"] == line["eval/gsm8k/truncated"]
        assert found["estimates"]["accuracy"]["value"] == line["eval/gsm8k/accuracy"]
