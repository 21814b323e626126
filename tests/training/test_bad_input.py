"""What a user gets wrong ends at once: exit status 2 and one line that says what to mend, and no rank is started."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

QUICKSTART = Path(__file__).parents[2] / "examples" / "quickstart"
Refusal = Callable[..., str]


@pytest.fixture
def refusal(quickstart: Path, tmp_path: Path) -> Refusal:
    """Runs ``megatron-gspo train`` on the quickstart with further settings; returns its one line."""

    def run(*overrides: str, config: Path = QUICKSTART / "gspo.toml") -> str:
        settings = [
            f'model.path="{quickstart}/model"',
            f'data.path="{quickstart}/train.jsonl"',
            f'data.eval_path="{quickstart}/eval.jsonl"',
            f'train.run_dir="{tmp_path}/run"',
            'rollout.servers=["http://127.0.0.1:1"]',
            *overrides,
        ]
        command = [sys.executable, "-m", "megatron_gspo.cli", "train", str(config), *settings]
        done = subprocess.run(command, capture_output=True, text=True, timeout=60, cwd=QUICKSTART.parents[1])
        assert done.returncode == 2, done.stderr
        assert not done.stdout
        assert not (tmp_path / "run").exists(), "it has begun to write"
        (line,) = done.stderr.splitlines()
        assert line.startswith("error: ")
        return line

    return run


@pytest.fixture
def broken_model(quickstart: Path, tmp_path: Path) -> Path:
    """A copy of the model, to be broken."""
    return Path(shutil.copytree(quickstart / "model", tmp_path / "model"))


def test_a_directory_is_no_configuration(refusal: Refusal) -> None:
    assert refusal(config=QUICKSTART) == f"error: {QUICKSTART}: [Errno 21] Is a directory: '{QUICKSTART}'"


def test_a_mistyped_setting_is_named_with_what_was_meant(refusal: Refusal) -> None:
    assert "unknown setting train.sed (did you mean train.seed?)" in refusal("train.sed=1")


def test_a_file_is_no_model(refusal: Refusal, quickstart: Path) -> None:
    assert f"{quickstart}/train.jsonl" in refusal(f'model.path="{quickstart}/train.jsonl"')


def test_safetensors_that_were_cut_off_are_named(refusal: Refusal, broken_model: Path) -> None:
    weights = broken_model / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1000])
    line = refusal(f'model.path="{broken_model}"')
    assert line.startswith(f"error: {weights}: ") and "not fully covered" in line


def test_another_architecture_is_refused_with_those_that_are_known(refusal: Refusal, broken_model: Path) -> None:
    config = broken_model / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"architectures": ["LlamaForCausalLM"]}))
    assert "LlamaForCausalLM is not supported (known: Qwen3ForCausalLM, " in refusal(f'model.path="{broken_model}"')


@pytest.mark.parametrize("setting", ["data.path", "data.eval_path"])
def test_a_prompt_file_that_does_not_exist_is_named(refusal: Refusal, tmp_path: Path, setting: str) -> None:
    assert refusal(f'{setting}="{tmp_path}/none.jsonl"') == f"error: {tmp_path}/none.jsonl: no such data file"


@pytest.mark.parametrize(
    ("source", "said"),
    [
        ("def f(:", "SyntaxError: invalid syntax (reward.py, line 1)"),
        ("raise RuntimeError('out of\\npaper')", "RuntimeError: out of paper"),
        ("import sys; sys.exit(0)", "SystemExit: 0"),
        ("def f(prompt): return 1.0", "cannot be called with (prompt, response) and the options none"),
    ],
)
def test_a_reward_that_cannot_be_had_says_why(refusal: Refusal, tmp_path: Path, source: str, said: str) -> None:
    reward = tmp_path / "reward.py"
    reward.write_text(source)
    line = refusal(f'reward.function="{reward}:f"')
    assert line.startswith(f"error: reward.function = '{reward}:f'") and said in line


def test_a_layout_shows_the_division_that_fails(refusal: Refusal) -> None:
    assert refusal("parallel.tensor=3", "parallel.expert=1") == (
        "error: 4 attention heads / parallel.tensor 3 = 1.33333: it must divide"
    )
