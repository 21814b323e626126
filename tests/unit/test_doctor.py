"""``megatron-gspo doctor``: each check says what it saw, and fails by name when what it looks at is wrong."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from unittest import mock

import pytest
import torch
from safetensors.torch import load_file, save_file

from megatron_gspo.cli import main
from megatron_gspo.config import load
from megatron_gspo.doctor import disk, estimate, facts, machine, memory
from megatron_gspo.doctor.catalog import CHECKS
from megatron_gspo.doctor.check import Entry, as_json, examine, ok, one_line
from megatron_gspo.doctor.estimate import LayerBytes
from megatron_gspo.doctor.machine import Machine
from megatron_gspo.doctor.tensors import stage_of, tensors_of
from megatron_gspo.errors import DependencyError
from megatron_gspo.hf.catalog import read_model
from megatron_gspo.runs.rank import run_rank
from megatron_gspo.versions import TESTED, untested, untested_here
from tests.unit.doctor_cases import ROOT, Case

GIB = 2**30


@pytest.fixture
def gpus(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """``gpus(n)``: a machine with n idle GPUs of 80 GiB, as far as the checks can see."""

    def have(count: int) -> None:
        found = Machine(cores=16, free_memory=200 * GIB, gpus=((80 * GIB, 80 * GIB),) * count)
        monkeypatch.setattr("megatron_gspo.doctor.facts.look_at_machine", lambda: found)

    return have


def run(capsys: pytest.CaptureFixture[str], *arguments: object) -> tuple[int, str, str]:
    status = main(["doctor", *map(str, arguments)])
    captured = capsys.readouterr()
    return status, captured.out, captured.err


# ------------------------------------------------------------------------------------------------ the whole of it


def test_each_check_is_one_aligned_line_and_the_last_counts_them(case: Case, capsys) -> None:
    status, out, err = run(capsys, case.config, 'algorithm.name="sft"')
    assert err.startswith("error: prompts: ") and "completion" in err  # sft reads completions, and there are none
    assert status == 2
    lines = out.splitlines()
    assert {line.split()[0] for line in lines[:-1]} <= {"ok", "warning", "error"}
    assert len({line.index(line[9:].split("  ")[0]) for line in lines[:-1]}) == 1
    assert lines[-1] == f"{len(lines) - 1} checks: {len(lines) - 4} ok, 2 warnings, 1 error"


def test_the_quickstarts_own_configuration_passes_whole(case: Case) -> None:
    """But for its paths: the model that it starts from comes out of a training run."""
    inputs = [
        f'model.path="{case.model}"',
        f'data.path="{case.root}/train.jsonl"',
        f'data.eval_path="{case.root}/eval.jsonl"',
    ]
    case.config.write_text((ROOT / "examples/quickstart/gspo.toml").read_text())
    reward = f'reward.function="{ROOT}/examples/quickstart/reward.py:running_sum"'
    checks = case.checks(*inputs, reward, f'train.run_dir="{case.root}/run"')
    assert [check for check in checks if check.status != "ok" and "engine" not in (check.name, check.lacks)] == []
    assert {check.name for check in checks} == {entry.name for entry in CHECKS}


def test_json_holds_every_check_and_the_first_error_goes_to_stderr(case: Case, capsys) -> None:
    status, out, err = run(capsys, case.config, "parallel.tensor=3", "rollout.max_response_tokens=60", "--json")
    told = json.loads(out)
    assert status == 2 and told["ok"] is False
    assert {tuple(check) for check in told["checks"]} == {("name", "status", "detail", "fix")}
    assert {check["name"] for check in told["checks"]} == {entry.name for entry in CHECKS}
    wrong = [check["name"] for check in told["checks"] if check["status"] == "error" and check["name"] != "engine"]
    assert wrong == ["layout", "settings"]
    assert err.count("\n") == 1 and err.startswith("error: ")
    if "engine" not in err:
        divide = "4 attention heads / parallel.tensor 3 = 1.33333: it must divide"
        assert err == f"error: layout: {divide} -> parallel.tensor = 1 or 2\n"


def test_what_needs_a_thing_that_failed_is_not_checked_and_says_what_it_needs(case: Case) -> None:
    (case.model / "config.json").write_text("{")
    checks = {check.name: check for check in case.checks()}
    assert checks["model"].status == "error" and "config.json" in checks["model"].detail
    for name in ("weights", "layout", "memory", "disk", "tokenizer"):
        assert checks[name].detail == "not checked: it needs the model's config.json"
    assert checks["run directory"].status == checks["configuration"].status == checks["devices"].status == "ok"


def test_a_check_that_raises_is_an_error_and_the_next_one_runs() -> None:
    def broken(facts: object) -> None:
        raise RuntimeError("a\nb\x1b[31m")

    entries = [Entry("broken", broken, needs=()), Entry("whole", lambda facts: ok("seen"), needs=())]  # type: ignore[arg-type]
    first, second = examine(None, entries)  # type: ignore[arg-type]
    assert (first.status, first.detail) == ("error", r"RuntimeError: a b\x1b[31m")
    assert (second.status, second.detail) == ("ok", "seen")
    assert as_json([first, second])["ok"] is False and as_json([second])["ok"] is True
    assert len(one_line("x" * 5000)) == 700


def test_what_a_reward_prints_stays_out_of_the_json(case: Case, capsys) -> None:
    reward = case.root / "loud.py"
    reward.write_text("print('imported')\ndef f(prompt, response):\n    print('called')\n    return 0.5\n")
    _, out, err = run(capsys, case.config, f'reward.function="{reward}:f"', "--json")
    assert json.loads(out)["checks"]
    assert "imported" in err and err.count("called") == 600 + 2  # each reference, and one prompt twice


def test_the_checks_import_neither_megatron_nor_sglang(case: Case) -> None:
    code = f"""
import sys
from tests.unit.doctor_cases import Case, Path
Case(Path({str(case.root)!r})).checks()
assert not {{"megatron.core", "sglang"}} & set(sys.modules)
"""
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT, timeout=300)


def test_ranks_below_one_are_refused(case: Case, capsys) -> None:
    assert run(capsys, case.config, "--ranks", 0) == (2, "", "error: --ranks = 0: the number of ranks is at least 1\n")


# ----------------------------------------------------------------------------------------- versions, engine, devices


def test_a_version_outside_the_tested_range_is_an_error_that_names_the_range(case: Case, monkeypatch) -> None:
    have = {
        "megatron-core": "0.17.0",
        "torch": "2.13.1+cu130",
        "python": "3.12.4",
        "transformers": "5.20",
        "pydantic": "2.14",
    }
    monkeypatch.setattr("megatron_gspo.versions.installed", have.get)
    (line,) = untested_here()
    assert line.startswith("megatron-core 0.17.0 was not tested (tested on 20") and line.endswith("0.16.1 or 0.19.2)")
    check = case.check("versions")
    assert check.status == "error" and line == check.detail and "requirements/trainer.txt" in check.fix
    have["megatron-core"] = "0.19.2"
    assert untested_here() == [] and case.check("versions").status == "ok"


def test_versions_that_are_missing_or_no_versions_are_untested() -> None:
    assert "sglang is missing" in str(untested("sglang", None))
    assert "torch two was not tested" in str(untested("torch", "two"))
    assert "0.16.10" in str(untested("megatron-core", "0.16.10"))
    assert untested("sglang", "0.5.23") is None
    assert set(TESTED) == {"python", "torch", "megatron-core", "transformers", "pydantic", "sglang"}


def test_a_run_starts_with_a_warning_of_untested_versions_from_its_first_rank(monkeypatch, capsys) -> None:
    monkeypatch.setattr("megatron_gspo.runs.rank.untested_here", lambda: ["torch 3.0 was not tested"])
    monkeypatch.setitem(sys.modules, "megatron_gspo.runs.loop", mock.Mock())
    for rank, said in (("0", "warning: torch 3.0 was not tested\n"), ("1", "")):
        monkeypatch.setenv("RANK", rank)
        config = mock.Mock(train=mock.Mock(on_end=""))
        assert run_rank(config, mock.Mock()) == 0
        assert capsys.readouterr().err == said


def test_sglang_is_asked_of_the_servers_python_and_not_imported(case: Case, tmp_path: Path) -> None:
    python = tmp_path / "python"

    def say(text: str) -> None:
        python.write_text(f"#!/bin/sh\n{text}\n")
        python.chmod(0o755)

    setting = f'rollout.server_python="{python}"'

    def have(**versions: str) -> None:
        found = {"versions": versions, "nccl": "", "cuda": "", "wants": []}
        say(f"cat <<'END'\n{json.dumps(found)}\nEND")

    have(sglang="0.5.23")
    assert case.check("engine", setting).detail == f"sglang 0.5.23 in {python}"
    have(sglang="0.4.1")
    assert "sglang 0.4.1 was not tested" in case.check("engine", setting).detail
    have(torch="2.14.1")
    assert "sglang is missing" in case.check("engine", setting).detail
    say("echo 'No module named json' >&2; exit 1")
    check = case.check("engine", setting)
    assert check.status == "error" and "does not say what it has (No module named json)" in check.detail
    say("echo 0.5.23")
    assert "but '0.5.23\\n': is it a Python?" in case.check("engine", setting).detail
    python.chmod(0o644)
    assert "cannot be run" in case.check("engine", setting).detail
    check = case.check("engine", 'rollout.server_python="/nowhere/python"')
    assert check.status == "error" and "/nowhere/python: no such file" in check.detail
    with mock.patch.object(facts, "find_server_python", side_effect=DependencyError("no environment")):
        assert case.check("engine").fix == "rollout.server_python"


def test_the_registrys_apex_is_told_from_nvidias(tmp_path: Path, case: Case, monkeypatch) -> None:
    (tmp_path / "apex").mkdir()
    (tmp_path / "apex" / "__init__.py").write_text("raise RuntimeError('imported')")
    monkeypatch.syspath_prepend(str(tmp_path))
    check = case.check("kernels")
    assert check.status == "warning" and "not NVIDIA's" in check.detail and "pip uninstall apex" in check.fix
    (tmp_path / "apex" / "optimizers").mkdir()
    (tmp_path / "apex" / "optimizers" / "fused_adam.py").write_text("")
    check = case.check("kernels")
    assert check.status == "ok" and "not NVIDIA's" not in check.detail


def test_more_ranks_than_gpus_is_an_error_here_and_several_machines_under_torchrun(case: Case, gpus) -> None:
    gpus(8)
    settings = ("parallel.data=16", "parallel.expert=16", 'algorithm.name="sft"')
    assert case.check("devices", "parallel.data=8").status == "ok"
    check = case.check("devices", *settings)
    assert check.status == "error" and "16 ranks, 8 GPUs" in check.detail and "--ranks" in check.fix
    assert case.check("devices", *settings, ranks=16).detail.endswith("2 machines like this one")
    assert case.check("devices", "parallel.data=12", ranks=12).status == "warning"


def test_threads_that_outnumber_cores_are_warned_of(case: Case, monkeypatch) -> None:
    found = Machine(cores=2, free_memory=8 * GIB, gpus=())
    monkeypatch.setattr("megatron_gspo.doctor.facts.look_at_machine", lambda: found)
    monkeypatch.setenv("OMP_NUM_THREADS", "4")
    check = case.check("devices", "parallel.tensor=2")
    assert (check.status, check.fix) == ("warning", "OMP_NUM_THREADS=1") and "8 threads spin on 2 cores" in check.detail
    monkeypatch.setenv("OMP_NUM_THREADS", "many")
    assert "'many' is no number" in case.check("devices").detail
    monkeypatch.delenv("OMP_NUM_THREADS")
    assert case.check("devices").status == "ok"


def test_a_control_groups_limit_is_the_free_memory(tmp_path: Path) -> None:
    for name, text in (("memory.max", "1000"), ("memory.current", "600"), ("memory.stat", "anon 1\ninactive_file 250")):
        (tmp_path / name).write_text(text + "\n")
    assert machine._left_in_control_group(tmp_path) == 650
    (tmp_path / "memory.max").write_text("max\n")
    assert machine._left_in_control_group(tmp_path) == 2**63


# ------------------------------------------------------------------------------------------------- layout and model


def test_ranks_that_the_layout_does_not_fill_show_the_product(case: Case) -> None:
    check = case.check("layout", "parallel.tensor=2", "parallel.data=2", ranks=6)
    assert check.detail == "tensor 2 x pipeline 1 x context 1 x data 2 = 4 ranks, but the world has 6"


def test_data_parallel_ranks_with_nothing_to_train_on_are_warned_of(case: Case) -> None:
    settings = ("train.prompts_per_step=2", "train.minibatches=2", "rollout.group_size=2", "parallel.data=4")
    check = case.check("layout", *settings)
    assert check.status == "warning" and "2 sequences per mini-batch for 4 data-parallel ranks" in check.detail
    assert "sequence parallel, since tensor > 1" in case.check("layout", "parallel.tensor=2").detail


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"architectures": ["Gemma3ForCausalLM"]}, "Gemma3ForCausalLM is not supported"),
        ({"architectures": 5}, "(none) is not supported"),
        ({"num_hidden_layers": "four"}, "num_hidden_layers = 'four'"),
        ({"hidden_size": 0}, "hidden_size = 0"),
        ({"vocab_size": 10**12}, "vocab_size = 1000000000000"),
        ({"num_experts": -1}, "num_experts = -1"),
        ({"num_experts_per_tok": 99}, "chooses 99 of 16 experts"),
        ({"num_key_value_heads": 3}, "4 attention heads for 3 key-value heads"),
        ({"rope_parameters": {"rope_type": "longrope"}}, 'rope_type = "longrope"'),
        ({"rope_parameters": 7}, "rotary settings of config.json are 7, not an object of settings"),
        ({"mlp_only_layers": 3}, "cannot be read as Qwen3MoeForCausalLM"),
    ],
)
def test_a_config_json_that_cannot_be_is_named_by_what_is_wrong(case: Case, settings: dict, said: str) -> None:
    case.change_config(**settings)
    check = case.check("model")
    assert check.status == "error" and said in check.detail and check.fix == "model.path"


def test_a_model_that_the_engine_takes_for_another_one_is_an_error_of_its_servers(case: Case) -> None:
    case.change_config(mlp_only_layers=[1])
    check = case.check("servers")
    assert check.status == "error" and "has dense layers (1; mlp_only_layers and" in check.detail


def test_a_tensor_that_is_missing_or_mis_shaped_is_named_with_both_shapes(case: Case) -> None:
    path = case.model / "model.safetensors"
    tensors = load_file(path)
    name = "model.layers.1.mlp.experts.3.down_proj.weight"
    save_file({n: t.T.contiguous() if n == name else t for n, t in tensors.items()}, path)
    assert f"{name} [32, 64], not [64, 32]" in case.check("weights").detail
    save_file({n: t for n, t in tensors.items() if n != name}, path)
    assert f"{name} missing, of 231" in case.check("weights").detail
    save_file(tensors | {"model.layers.9.surprise": torch.zeros(1)}, path)
    check = case.check("weights")
    assert check.status == "warning" and "model.layers.9.surprise" in check.detail
    save_file(tensors, path)
    assert case.check("weights").detail == "231 tensors, each of the shape that config.json asks for"


def test_a_shard_that_is_cut_off_or_absent_is_named(case: Case) -> None:
    tensors = load_file(case.model / "model.safetensors")
    names = sorted(tensors)
    (case.model / "model.safetensors").unlink()
    weight_map = {}
    for number, part in enumerate((names[:100], names[100:])):
        save_file({name: tensors[name] for name in part}, case.model / f"part-{number}.safetensors")
        weight_map |= dict.fromkeys(part, f"part-{number}.safetensors")
    (case.model / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    assert case.check("weights").status == "ok"
    second = case.model / "part-1.safetensors"
    second.write_bytes(second.read_bytes()[:-1])
    check = case.check("weights")
    assert check.status == "error" and str(second) in check.detail and check.fix.startswith("model.path")
    second.unlink()
    assert str(second) in case.check("weights").detail


def test_the_table_of_shapes_is_what_transformers_stores(case: Case) -> None:
    family, shape = read_model(case.model)
    stored = {name: tuple(tensor.shape) for name, tensor in load_file(case.model / "model.safetensors").items()}
    assert {tensor.name: tensor.shape for tensor in tensors_of(family, shape)} == stored


def test_a_tokenizer_of_another_model_is_an_error_with_both_sizes(case: Case) -> None:
    case.change_config(vocab_size=12)
    check = case.check("tokenizer")
    assert check.status == "error" and "highest id is 12, but config.vocab_size = 12" in check.detail
    (case.model / "tokenizer.json").unlink()
    (case.model / "tokenizer_config.json").unlink()
    assert "no tokenizer" in case.check("tokenizer").detail


def test_a_padding_token_whose_row_is_zero_is_warned_of(case: Case) -> None:
    case.change_config(pad_token_id=12)
    assert case.check("tokenizer").status == "ok"
    path = case.model / "model.safetensors"
    tensors = load_file(path)
    tensors["model.embed_tokens.weight"][12] = 0
    save_file(tensors, path)
    check = case.check("tokenizer")
    assert check.status == "warning" and "pad_token_id = 12" in check.detail and "pad_token_id = null" in check.fix


# --------------------------------------------------------------------------------------------------------- memory


def test_memory_that_is_not_there_is_an_error_that_shows_the_whole_sum(case: Case, monkeypatch) -> None:
    found = Machine(cores=2, free_memory=GIB // 2, gpus=())
    monkeypatch.setattr("megatron_gspo.doctor.facts.look_at_machine", lambda: found)
    check = case.check(
        "memory", "train.microbatch_tokens=65536", "train.prompts_per_step=4096", "rollout.local_servers=1"
    )
    assert check.status == "error" and "512 MiB free" in check.detail
    for term in ("weights", "gradients", "optimizer", "activations", "logprobs"):
        assert f"{term} " in check.detail
    assert "train.microbatch_tokens" in check.fix and 'model.recompute = "full"' in check.fix


def test_a_gpu_is_shared_with_the_local_server_on_it(case: Case, gpus) -> None:
    gpus(1)
    assert "80 GiB free on the fullest GPU, where a server sleeps" in case.check("memory").detail
    detail = case.check("memory", 'rollout.servers=["http://a"]').detail
    assert "80 GiB free" in detail and "server" not in detail


@pytest.mark.parametrize(
    ("setting", "term", "factor"),
    [
        ("parallel.data=2", "optimizer", 0.5),
        ('model.dtype="bfloat16"', "weights", 0.5),
        ('model.dtype="bfloat16"', "gradients", 1.0),
        ('model.dtype="bfloat16"', "optimizer", 1.5),  # and a master copy of the weights
        ('model.dtype="float64"', "optimizer", 2.0),
        ("parallel.tensor=2", "activations", 0.511),  # each rank has rotary tables of its own, and gathers tokens
        ("model.logprob_chunk=512", "logprobs", 0.5),
    ],
)
def test_the_estimate_follows_the_settings(case: Case, setting: str, term: str, factor: float) -> None:
    before, after = (
        estimate.worst_stage(facts.config, facts.shape, facts.tensors, facts.layout)[1]
        for facts in (case.facts(), case.facts(setting))
    )
    assert vars(after)[term] == pytest.approx(factor * vars(before)[term], rel=5e-3)


def test_recompute_keeps_a_layers_input_and_one_layer(case: Case) -> None:
    facts = case.facts('model.recompute="full"', "train.minibatches=1")
    needed = memory.worst_stage(facts.config, facts.shape, facts.tensors, 1)[1]
    layer = LayerBytes.of(facts.shape, facts.config.parallel, 4, True, "grouped")
    assert needed.activations == int(4096 * (3 * 64 * 4 + 4 * 16 + layer.kept(())))  # and a rotary table
    mixture = 4 * (2 * 16 + 6 * 4) + 4 * (4 * (64 + 3 * 32) + 32)
    assert layer.kept(["moe"]) == layer.kept(()) - mixture
    assert layer.kept(["core_attn"]) == layer.kept(()) - 4 * (2 * 64 + 32)
    shared = LayerBytes.of(
        replace(facts.shape, shared_expert_hidden_size=48), facts.config.parallel, 4, True, "grouped"
    )
    assert shared.kept(()) - layer.kept(()) == 5 * 4 * 48 and shared.kept(["moe"]) == layer.kept(["moe"])


@pytest.mark.parametrize(
    ("settings", "stages"),
    [
        (["parallel.pipeline=2"], [0, 0, 1, 1]),
        (["parallel.pipeline=3"], [0, 0, 1, 2]),
        (["parallel.pipeline=2", "parallel.virtual_pipeline=2"], [0, 1, 0, 1]),
        (["parallel.pipeline=2", "parallel.stage_layers=[3, 1]"], [0, 0, 0, 1]),
    ],
)
def test_layers_fall_on_the_stages_of_the_layout(case: Case, settings: list[str], stages: list[int]) -> None:
    facts = case.facts(*settings)
    assert [stage_of(layer, 4, facts.config.parallel) for layer in range(4)] == stages
    needed = [
        estimate.estimate(facts.config, facts.shape, facts.tensors, data_size=1, stage=s) for s in sorted(set(stages))
    ]
    stored = load_file(case.model / "model.safetensors").values()
    assert sum(part.weights for part in needed) == sum(tensor.nbytes for tensor in stored)


# ----------------------------------------------------------------------------------------------- prompts and reward


def test_a_malformed_line_is_named_by_file_and_line(case: Case) -> None:
    path = case.root / "train.jsonl"
    lines = path.read_text().splitlines()
    lines[2] = '{"prompt": '
    path.write_text("\n".join(lines))
    check = case.check("prompts")
    assert check.status == "error" and f"{path}, line 3: not JSON" in check.detail and check.fix == "data.path"
    skipped = case.checks("data.skip_bad=true", only="prompts")[0]
    assert "599 prompts" in skipped.detail or "600 prompts" in skipped.detail
    assert "1 of 600 rows skipped (line 3: not JSON" in skipped.detail


def test_too_few_prompts_and_too_long_ones_say_the_setting_and_the_value(case: Case) -> None:
    check = case.check("prompts", "data.limit=20")
    assert check.status == "error" and "20 prompts, 32 a step" in check.detail and "<= 20" in check.fix
    assert "600 prompts" in case.checks(only="prompts")[0].detail
    with_row(case, 7, prompt="12345678901234567890=")
    check = case.check("prompts")
    assert check.status == "error" and check.fix == "rollout.max_prompt_tokens = 21, or data.skip_bad = true"
    assert case.check("prompts", "data.skip_bad=true").status == "warning"


@pytest.mark.parametrize("name", ["data.path", "data.eval_path"])
def test_a_prompt_file_that_is_not_there_is_named(case: Case, name: str) -> None:
    check = case.check("prompts" if name == "data.path" else "eval prompts", f'{name}="{case.root}/none.jsonl"')
    assert check.detail == f"{case.root}/none.jsonl: no such data file" and check.fix == name


def test_few_held_out_prompts_say_how_well_an_accuracy_is_known(case: Case) -> None:
    check = case.check("eval prompts", "eval.prompts=64")
    assert check.status == "warning" and "+-12%" in check.detail and "512" in check.fix
    assert "never read: eval.every = 0" in case.check("eval prompts", "eval.every=0").detail
    assert "no evaluation" in case.check("eval prompts", 'data.eval_path=""').detail


@pytest.mark.parametrize(
    ("body", "said"),
    [
        ("return 1.5", "returned 1.5, outside [0, 1]"),
        ("raise KeyError('gold')", "raised KeyError: 'gold'"),
        ("return 'good'", "returned 'good', not a number"),
        ("import time; time.sleep(60)", "gave no answer within 0.2 s (reward.timeout_s)"),
        ("raise SystemExit(3)", "sys.exit(3)"),
    ],
)
def test_a_reward_that_fails_on_one_prompt_says_how(case: Case, body: str, said: str) -> None:
    path = case.root / "reward.py"
    path.write_text(f"def f(prompt, response):\n    {body}\n")
    timeout_s = 0.2 if "timeout_s" in said else 20  # starting its process takes longer on a busy machine
    check = case.check("reward", f'reward.function="{path}:f"', f"reward.timeout_s={timeout_s}")
    assert check.status == "error" and said in check.detail and check.fix == "reward.function"


def test_a_reward_is_called_with_the_reference_answer_and_with_nonsense(case: Case) -> None:
    assert case.check("reward").detail == "exact on prompt 'line-1': 1 for its reference answer, 0 for '0'"
    assert "reward.function = 'none' is unknown" in case.check("reward", 'reward.function="none"').detail


def with_row(case: Case, line: int, **fields: object) -> None:
    path = case.root / "train.jsonl"
    rows = [json.loads(row) for row in path.read_text().splitlines()]
    rows[line - 1] |= fields
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


@pytest.mark.parametrize("line", [1, 13, 600])
def test_a_reference_that_the_reward_cannot_use_is_named_by_its_line_wherever_it_stands(case: Case, line: int) -> None:
    with_row(case, line, answer="no solution")
    check = case.check("reward", 'reward.function="arithmetic"')
    assert check.status == "error" and check.fix == "the rows, or data.skip_bad = true"
    assert check.detail.startswith(f"{case.root}/train.jsonl, line {line}: the reference answer cannot be graded: ")
    assert (
        "'no solution'" in check.detail and "600 distinct references of 600 prompts graded, 1 unusable" in check.detail
    )
    skipped = case.check("reward", 'reward.function="arithmetic"', "data.skip_bad=true")
    assert skipped.status == "warning" and "skipped when drawn" in skipped.detail
    unseen = case.checks('reward.function="arithmetic"', "reward.check_references=0", only="reward")
    assert [check.status for check in unseen] == ["ok"] or line == 1


def test_references_that_are_sound_are_counted_and_an_absent_one_is_a_warning(case: Case) -> None:
    _, counted = case.checks(only="reward")
    assert (counted.status, counted.detail) == (
        "ok",
        "600 distinct references of 600 prompts graded, 0 unusable",
    )
    with_row(case, 40, answer=None)
    check = case.check("reward")
    assert check.status == "warning" and "train.jsonl, line 40: there is no reference answer" in check.detail


def test_a_long_file_says_how_many_rows_were_looked_at(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    from megatron_gspo.data import prompts

    monkeypatch.setattr(prompts, "CHECKED_ROWS", 100)
    monkeypatch.setattr(prompts, "FIRST_ROWS", 50)
    with_row(case, 300, prompt="a line that is far too long")
    check = case.checks(only="prompts")[0]
    assert check.status == "ok"
    assert (
        "600 prompts, 32 a step, read as 'prompts'; 50 rows looked at, the others are when they are drawn"
        in check.detail
    )
    graded = case.checks("reward.check_references=7", only="reward")[1]
    assert graded.detail == (
        "7 distinct references of 7 prompts graded, 0 unusable; the others are when they are drawn"
    )


def test_token_rewards_under_gspo_are_said_to_be_averaged(case: Case) -> None:
    path = case.root / "tokens.py"
    path.write_text(
        "from megatron_gspo.rewards.interface import TokenRewards\n"
        "def f(prompt, response):\n    return TokenRewards(response.response_ids * 0.0)\n"
    )
    check = case.check("reward", f'reward.function="{path}:f"')
    assert (check.status, check.fix) == ("warning", 'algorithm.name = "gspo-token"')
    assert case.check("reward", f'reward.function="{path}:f"', 'algorithm.name="gspo-token"').status == "ok"


# ------------------------------------------------------------------------------------------------- settings and disk


@pytest.mark.parametrize(
    ("overrides", "status", "said"),
    [
        (["optimizer.min_lr=1e-7"], "warning", "optimizer.min_lr has no effect"),
        (
            ['algorithm.name="sft"', "algorithm.kl_loss_coef=0.1"],
            "warning",
            "algorithm.kl_loss_coef, data.eval_path has no effect",
        ),
        (["train.minibatches=1", "algorithm.clip_high=0.01"], "warning", "nothing is ever clipped"),
        (["optimizer.warmup_steps=300"], "warning", "optimizer.warmup_steps = 300 of 400"),
        (["rollout.max_response_tokens=52"], "error", "= 65, above max_position_embeddings = 64"),
        (['model.dtype="float64"'], "warning", "the engine has float32 at most"),
        (['sync.directory="/tmp"'], "warning", "sync.directory has no effect"),
        (['rollout.servers=["http://a"]', "rollout.local_servers=2"], "warning", "rollout.local_servers has no effect"),
        (['rollout.servers=["http://a"]', 'sync.method="disk"'], "warning", "http://a is perhaps another"),
        (["train.checkpoint_every=0", "train.keep_last=5"], "warning", "train.keep_last has no effect"),
        (["eval.every=0", "eval.greedy=false"], "warning", "eval.greedy has no effect"),
        (['replay.mode="r3"', "replay.drift_every=2"], "warning", "replay.drift_every has no effect"),
    ],
)
def test_a_setting_that_does_not_do_what_one_expects_is_named(case: Case, overrides, status: str, said: str) -> None:
    check = case.check("settings", *overrides)
    assert check.status == status and said in check.detail, check
    assert case.check("settings").status == "ok"


def test_wandb_that_is_not_installed_names_the_extra(case: Case) -> None:
    with mock.patch("importlib.util.find_spec", return_value=None):
        check = case.check("settings", "train.wandb=true")
    assert check.status == "error" and 'pip install "megatron-gspo[wandb]"' in check.fix


def test_ranks_on_several_machines_need_named_servers(case: Case, gpus) -> None:
    gpus(8)
    check = case.check("settings", "parallel.data=16", ranks=16)
    assert check.status == "error" and "rollout.servers" in check.fix


def test_a_clip_range_inside_the_measured_noise_is_warned_of(case: Case) -> None:
    run_dir = case.root / "run"
    run_dir.mkdir()
    (run_dir / "config.toml").write_text("")
    line = {"step": 0, "outer_step": 0, "minibatch": 0, "noise/abs_log_ratio_p99": 5e-4}
    (run_dir / "metrics.jsonl").write_text(json.dumps(line) + "\n")
    check = case.check("settings")
    assert check.status == "warning" and "noise of 5.0e-04" in check.detail and "algorithm.clip_low" in check.fix
    assert case.check("settings", "algorithm.clip_low=1e-3", "algorithm.clip_high=1e-3").status == "ok"


def test_a_reference_of_another_vocabulary_is_an_error(case: Case, tmp_path: Path) -> None:
    other = shutil.copytree(case.model, tmp_path / "other")
    config = json.loads((other / "config.json").read_text())
    (other / "config.json").write_text(json.dumps(config | {"vocab_size": 50}))
    check = case.check("settings", f'algorithm.reference="{other}"', "algorithm.kl_loss_coef=0.1")
    assert check.status == "error" and "vocabulary of 50, the policy 13" in check.detail


def test_a_run_directory_is_new_replaced_or_refused(case: Case) -> None:
    path = case.root / "run"
    assert case.check("run directory").detail == f"{path} will be made"
    path.mkdir()
    check = case.check("run directory")
    assert check.status == "error" and "train.overwrite = true" in check.fix
    assert case.check("run directory", "train.overwrite=true").status == "ok"
    assert "no checkpoint is there yet" in case.check("run directory", "train.resume=true").detail
    (path / "thesis.tex").write_text("")
    for how in ("overwrite", "resume"):
        check = case.check("run directory", f"train.{how}=true")
        assert check.status == "error" and "no run directory" in check.detail
    (path / "checkpoints" / "outer_00004").mkdir(parents=True)
    (path / "checkpoints" / "latest").write_text("outer_00004\n")
    assert "goes on from outer_00004" in case.check("run directory", "train.resume=true").detail
    check = case.check("run directory", f'train.run_dir="{path}/thesis.tex/run"')
    assert check.status == "error" and "is a file" in check.detail


def test_a_disk_without_room_for_the_checkpoints_is_an_error(case: Case, monkeypatch) -> None:
    assert case.check("disk").status == "ok"
    usage = mock.Mock(free=10 * 2**20)
    monkeypatch.setattr(disk.shutil, "disk_usage", lambda path: usage)
    check = case.check("disk")
    assert check.status == "error" and "10 MiB free" in check.detail and "train.run_dir" in check.fix
    usage.free = 30 * 2**20
    assert case.check("disk").status == "warning"
    check = case.check("disk", 'sync.method="disk"', f'sync.directory="{case.root}/none"')
    assert check.status == "error" and check.fix == "sync.directory"


@pytest.mark.parametrize(
    ("every", "last", "forever", "kept"),
    [(0, 2, 0, 1), (5, 2, 20, 2 + 5), (5, 2, 4, 2 + 5), (60, 2, 4, 3), (100, 2, 0, 1), (5, 3, 0, 3)],
)
def test_checkpoints_are_counted_as_the_settings_keep_them(case: Case, every: int, last: int, forever: int, kept: int):
    """Of 100 outer steps. One every 5 of which every 4th stays: those after 20, 40, ... outer steps."""
    settings = [f"train.checkpoint_every={every}", f"train.keep_last={last}", f"train.keep_every={forever}"]
    assert disk.checkpoints_kept(load(case.config, settings)) == kept
