"""The first mistakes of somebody new: each is one line that says what to do, and an exit status."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from megatron_gspo.cli import main
from megatron_gspo.errors import ConfigError, WeightError
from megatron_gspo.hf.catalog import read_model
from megatron_gspo.hf.checkpoint import HfReader
from tests.unit.doctor_cases import Case, prepare

TOML = '[model]\npath = "model"\n[data]\npath = "data.jsonl"\n[train]\nrun_dir = "run"\n'


def refusal(capsys: pytest.CaptureFixture[str], *words: str) -> str:
    """The one line that a command with a mistake ends with."""
    assert main(words) == 2
    captured = capsys.readouterr()
    last = captured.err.splitlines()[-1]
    assert last.startswith("error: ") and "Traceback" not in captured.err
    return last


def run_toml(directory: Path, text: str = TOML, encoding: str = "utf-8") -> str:
    path = directory / "run.toml"
    path.write_text(text, encoding=encoding)
    return str(path)


def command_line(*words: str, out: int, **environment: str) -> tuple[int, str]:
    """(exit status, stderr) of a command that prints to the descriptor ``out``."""
    done = subprocess.run(
        [sys.executable, "-m", "megatron_gspo.cli", *words],
        stdout=out,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, **environment},
        timeout=300,
        check=False,
    )
    return done.returncode, done.stderr


@pytest.mark.parametrize("unbuffered", ["", "1"])
def test_a_reader_who_has_seen_enough_is_no_error(unbuffered):
    read, write = os.pipe()
    os.close(read)
    try:
        assert command_line("explain", "train", out=write, PYTHONUNBUFFERED=unbuffered) == (141, "")
    finally:
        os.close(write)


@pytest.mark.parametrize("unbuffered", ["", "1"])
def test_a_full_disk_behind_the_output_is_a_line_that_names_no_other_disk(unbuffered):
    full = os.open("/dev/full", os.O_WRONLY)
    try:
        status, said = command_line("explain", "train", out=full, PYTHONUNBUFFERED=unbuffered)
    finally:
        os.close(full)
    assert status == 1 and said.count("\n") == 1 and "No space left on device" in said and " free at " not in said


@pytest.mark.parametrize(
    ("setting", "meant"),
    [("optimizer.learning_rate", "optimizer.lr"), ("optimizer.weight_decy", "optimizer.weight_decay")],
)
def test_an_unknown_setting_suggests_what_explain_finds(setting, meant, tmp_path, capsys):
    section, _, key = setting.partition(".")
    line = refusal(capsys, "doctor", run_toml(tmp_path, f"{TOML}[{section}]\n{key} = 1\n"))
    assert line.endswith(f"unknown setting {setting} (did you mean {meant}?)")
    assert refusal(capsys, "explain", setting).endswith(f"(did you mean {meant}?)")


def test_a_value_in_a_sections_place_is_told_to_be_a_table(tmp_path, capsys):
    text = TOML.replace("[model]", "[more]") + "[train.wandb_]\n"
    line = refusal(capsys, "doctor", run_toml(tmp_path, f'model = "model"\n{text}'))
    assert "model = 'model': it must be a table of settings, [model]" in line


def test_the_mark_that_windows_editors_put_first_is_no_syntax_error(tmp_path, capsys):
    line = refusal(capsys, "train", run_toml(tmp_path, encoding="utf-8-sig"))
    assert "Invalid statement" not in line and "model" in line


def test_parity_says_how_to_come_by_a_missing_model_as_train_does(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    config = run_toml(tmp_path, "# model is made by: python make.py\n" + TOML)
    line = refusal(capsys, "parity", config)
    assert line == "error: model.path = model: no such model directory -> make it: python make.py"


@pytest.mark.parametrize(
    ("names", "words"),
    [
        (("adapter_config.json", "adapter_model.safetensors"), "merge it into its base"),
        (("model.Q4.gguf",), "llama.cpp's format"),
        ((), "there are no weights in it"),
    ],
)
@pytest.mark.parametrize("command", ["doctor", "train"])
def test_a_directory_without_config_json_is_told_by_what_lies_in_it(
    command, names, words, tmp_path, monkeypatch, capsys
):
    monkeypatch.chdir(tmp_path)
    Path("model").mkdir()
    Path("data.jsonl").write_text('{"prompt": "1", "answer": "1"}\n')
    for name in names:
        (Path("model") / name).write_text("{}")
    assert words in refusal(capsys, command, run_toml(tmp_path))


@pytest.mark.parametrize("name", ["rope_theta", "routed_scaling_factor", "num_experts_per_tok"])
def test_a_null_where_a_number_is_needed_is_named(name, tmp_path):
    config = {
        "architectures": ["Glm4MoeForCausalLM"],
        "hidden_size": 32,
        "intermediate_size": 48,
        "vocab_size": 320,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "moe_intermediate_size": 24,
        "n_routed_experts": 8,
        "num_experts_per_tok": 2,
        "first_k_dense_replace": 1,
    }
    (tmp_path / "config.json").write_text(json.dumps(config))
    read_model(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps(config | {name: None}))
    with pytest.raises(ConfigError, match=name):
        read_model(tmp_path)


@pytest.mark.parametrize("command", ["doctor", "train"])
def test_a_file_in_the_place_of_a_models_directory_is_called_one(command, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    Path("model").write_text("weights")
    assert "a file, " in refusal(capsys, command, run_toml(tmp_path))


@pytest.mark.parametrize("make", [os.mkfifo, os.mkdir])
def test_a_pipe_or_a_directory_in_the_place_of_weights_is_refused_at_once(make, tmp_path):
    make(tmp_path / "model.safetensors")
    with pytest.raises(WeightError, match=r"model\.safetensors: it is not a regular file"):
        HfReader(tmp_path)


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.int8])
def test_doctor_names_a_matrix_of_a_dtype_that_training_would_refuse(dtype, tmp_path):
    prepare().write_model(tmp_path / "model", seed=0)
    case = Case(tmp_path).write()
    weights = load_file(case.model / "model.safetensors")
    name = "model.layers.0.self_attn.q_proj.weight"
    save_file({**weights, name: weights[name].to(dtype)}, case.model / "model.safetensors", {"format": "pt"})
    found = case.check("weights")
    assert found.status == "error" and f"model.safetensors: {name} is stored as " in found.detail
    assert "weights must be torch.float32" in found.detail
