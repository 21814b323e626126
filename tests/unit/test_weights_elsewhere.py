"""Weights under other names than one file or an index: read where that is possible, else named with what to do."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from megatron_gspo.convert.kinds import kind_of
from megatron_gspo.doctor.tensors import tensors_of
from megatron_gspo.errors import ConfigError, WeightError
from megatron_gspo.hf.catalog import read_model
from megatron_gspo.hf.checkpoint import HfReader
from megatron_gspo.hf.elsewhere import other_names, what_is_there
from megatron_gspo.hf.quantisation import refuse_quantised, without_quantization
from megatron_gspo.parity.models import make_model
from tests.unit.doctor_cases import Case, prepare

Tensors = dict[str, torch.Tensor]


@pytest.fixture(scope="module")
def sound(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("sound")
    prepare().write_model(root / "model", seed=0)
    return root / "model"


@pytest.fixture
def case(sound: Path, tmp_path: Path) -> Case:
    import shutil

    shutil.copytree(sound, tmp_path / "model")
    return Case(tmp_path).write()


def rewrite(model: Path, change: Callable[[Tensors], Tensors]) -> None:
    path = model / "model.safetensors"
    save_file(change(load_file(path)), path)


# ------------------------------------------------------------------------------------------------------ names of files


def split(model: Path, count: int) -> Tensors:
    tensors = load_file(model / "model.safetensors")
    (model / "model.safetensors").unlink()
    names = sorted(tensors)
    for number in range(count):
        part = {name: tensors[name] for name in names[number::count]}
        save_file(part, model / f"model-{number + 1:05d}-of-{count:05d}.safetensors")
    return tensors


def test_shards_without_an_index_are_read_when_all_are_there(case: Case) -> None:
    tensors = split(case.model, 3)
    reader = HfReader(case.model)
    assert set(reader.names()) == set(tensors)
    assert all(torch.equal(reader.read(name), tensor) for name, tensor in tensors.items())
    assert kind_of(case.model) == "hugging-face"
    check = case.check("weights")
    assert check.status == "ok"
    assert "in 3 files without an index (model-00001-of-00003.safetensors, " in check.detail


def test_shards_that_are_missing_are_named(case: Case) -> None:
    split(case.model, 3)
    (case.model / "model-00002-of-00003.safetensors").unlink()
    said = "model-00002-of-00003.safetensors missing, of 3 files (there: model-00001-of-00003.safetensors, model-00003"
    check = case.check("weights")
    assert check.status == "error" and said in check.detail
    with pytest.raises(WeightError, match="download the model again"):
        HfReader(case.model)


def test_shards_of_two_sets_are_not_mixed(case: Case) -> None:
    split(case.model, 2)
    save_file({"x": torch.ones(1)}, case.model / "model-00001-of-00003.safetensors")
    with pytest.raises(WeightError, match=r"several models \(model-00001-of-00002.safetensors, model-00001-of-00003"):
        HfReader(case.model)


def test_a_tensor_in_two_shards_is_refused(case: Case) -> None:
    split(case.model, 2)
    for number in (1, 2):
        save_file({"x": torch.ones(1)}, case.model / f"model-0000{number}-of-00002.safetensors")
    with pytest.raises(
        WeightError, match=r"model-00002-of-00002.safetensors: x is in model-00001-of-00002.safetensors"
    ):
        HfReader(case.model)


@pytest.mark.parametrize(
    ("files", "words"),
    [
        (["pytorch_model.bin", "training_args.bin"], "pytorch_model.bin is there, pickles, .* load it in transformers"),
        (["pytorch_model-00001-of-00002.bin"], "pytorch_model-00001-of-00002.bin is there, pickles"),
        (["model.pth"], "model.pth is there, pickles"),
        (
            ["consolidated.00.pth", "consolidated.01.pth"],
            "consolidated.00.pth, consolidated.01.pth is there, in the na",
        ),
        (["consolidated.safetensors"], "take the files that transformers reads"),
        (["q.Q4_K_M.gguf"], "q.Q4_K_M.gguf is there, llama.cpp's format: take the model that it was made from"),
        (["tf_model.h5", "flax_model.msgpack"], "another framework's"),
        (["weights.safetensors"], "weights.safetensors is there, by another name: call it model.safetensors"),
        (["model.fp16.safetensors"], "model.fp16.safetensors is there, by another name"),
        ([".metadata", "__0_0.distcp"], "a Megatron checkpoint: megatron-gspo convert makes a Hugging Face directory"),
        (["model.safetensors.incomplete"], "model.safetensors.incomplete is there, a download that did not end"),
        (["model.safetensors.part", "model.safetensors.aria2"], "a download that did not end: download it again"),
        (["optimizer.pt", "README.md"], "there are no weights in it"),
        (["hf/model.safetensors"], "there are weights in hf: name that directory"),
        ([], "there are no weights in it"),
    ],
)
def test_what_is_there_instead_is_named_with_what_to_do(case: Case, files: list[str], words: str) -> None:
    (case.model / "model.safetensors").unlink()
    for name in files:
        (case.model / name).parent.mkdir(exist_ok=True)
        (case.model / name).write_bytes(b"x")
    with pytest.raises(WeightError, match=rf"neither model.safetensors.index.json nor model.safetensors: .*{words}"):
        HfReader(case.model)
    if ".metadata" not in files:
        with pytest.raises(ConfigError, match=words):
            kind_of(case.model)
        check = case.check("weights")
        assert check.status == "error" and "neither model.safetensors.index.json" in check.detail


def test_an_adapter_is_named_with_its_base(case: Case) -> None:
    (case.model / "model.safetensors").rename(case.model / "adapter_model.safetensors")
    (case.model / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": "some/base"}))
    found = what_is_there(case.model)
    assert found.startswith("adapter_config.json, adapter_model.safetensors is there, an adapter, not a model: merge")
    assert "into its base (some/base) with peft (merge_and_unload())" in found


def test_a_link_to_a_file_that_is_gone_is_named(case: Case) -> None:
    (case.model / "model.safetensors").unlink()
    (case.model / "model.safetensors").symlink_to(case.root / "blobs" / "abc")
    assert what_is_there(case.model) == "model.safetensors links to a file that is not there: download the model again"


# ---------------------------------------------------------------------------------------------------- names of tensors


@pytest.mark.parametrize(
    ("rename", "words"),
    [
        (lambda name: f"language_model.{name}", "begin with 'language_model.model.', where 'model.' is read"),
        (lambda name: name.replace("model.", "model.language_model."), "begin with 'model.language_model.'"),
        (lambda name: f"_orig_mod.{name}", "begin with '_orig_mod.model.'"),
        (lambda name: f"base_model.model.{name}", "begin with 'base_model.model.model.'"),
        (lambda name: name.removeprefix("model."), "the names lack 'model.' (there is embed_tokens.weight)"),
        (lambda name: name.replace(".weight", ".qweight"), "GPTQ's or AWQ's: take the model that was quantised"),
        (lambda name: name.replace(".weight", ".weight_packed"), "of compressed-tensors: decompress it"),
        (lambda name: name.replace(".weight", ".weight.absmax"), "of bitsandbytes"),
        (lambda name: name.replace(".weight", ".lora_A.weight"), "an adapter, not a model"),
        (lambda name: name.replace("model.layers.0.", "model.layers.9."), ""),
    ],
)
def test_tensors_of_other_names_are_named_with_what_to_do(case: Case, rename: Callable[[str], str], words: str) -> None:
    rewrite(case.model, lambda tensors: {rename(name): tensor for name, tensor in tensors.items()})
    check = case.check("weights")
    assert check.status == "error" and " missing, of " in check.detail
    assert words in check.detail
    stored = HfReader(case.model).names()
    assert words in other_names(stored) and bool(words) == bool(other_names(stored))
    with pytest.raises(WeightError) as caught:
        HfReader(case.model).read("model.layers.0.self_attn.q_proj.weight")
    assert words in str(caught.value)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"quant_method": "gptq", "bits": 4}, "take the model that was quantised, in bfloat16"),
        ({"quant_method": "awq"}, "take the model that was quantised, in bfloat16"),
        ({"quant_method": "bitsandbytes", "load_in_4bit": True}, "call dequantize() and save_pretrained()"),
        ({"load_in_8bit": True}, "call dequantize() and save_pretrained()"),
        ({"quant_method": "compressed-tensors"}, "decompress it with the compressed-tensors package"),
        ({"quant_method": "fp8"}, "dequantise it with the tool that quantised it"),
        ({"quant_method": "torchao"}, "dequantise it with the tool that quantised it"),
    ],
)
def test_a_quantised_model_is_told_what_helps_and_not_what_does_not(settings: dict[str, Any], words: str) -> None:
    for key in ("quantization_config", "compression_config"):
        for look in (refuse_quantised, without_quantization):
            with pytest.raises(ConfigError) as caught:
                look({key: settings})
            assert words in str(caught.value) and "megatron-gspo convert" not in str(caught.value)


def test_fp8_blocks_are_sent_to_the_converter() -> None:
    known = {"quant_method": "fp8", "fmt": "e4m3", "weight_block_size": [128, 128]}
    with pytest.raises(ConfigError, match="megatron-gspo convert, there and back, makes bfloat16"):
        refuse_quantised({"quantization_config": known})
    with pytest.raises(ConfigError, match=r"quantization_config = \[1\] in config.json is not an object"):
        refuse_quantised({"quantization_config": [1]})


# ---------------------------------------------------------------------------------------------------- stacked experts

FAMILIES = ("tiny-moe", "tiny-mixtral", "tiny-qwen2-moe", "tiny-olmoe", "tiny-deepseek-v3", "tiny-glm4-moe")


@pytest.mark.parametrize("name", FAMILIES)
def test_stacked_experts_are_read_one_by_one_as_transformers_has_them(tmp_path: Path, name: str) -> None:
    """transformers writes one model in both forms. Its logits are the same from either, and so is every tensor here."""
    single, stacked = tmp_path / "single", tmp_path / "stacked"
    exact = make_model(name, tmp_path / "exact", seed=0)
    model = AutoModelForCausalLM.from_pretrained(exact, dtype=torch.float32).eval()
    model.save_pretrained(single)
    model.save_pretrained(stacked, save_original_format=False)
    stored = load_file(stacked / "model.safetensors")
    assert any(name.endswith("mlp.experts.gate_up_proj") for name in stored)
    again = AutoModelForCausalLM.from_pretrained(stacked, dtype=torch.float32).eval()
    tokens = torch.tensor([[3, 1, 4, 1, 5, 9]])
    with torch.no_grad():
        torch.testing.assert_close(again(tokens).logits, model(tokens).logits, atol=1e-5, rtol=0)  # kernels vary

    family, shape = read_model(stacked)
    one, other = HfReader(single), HfReader(stacked)
    wanted = {tensor.name: tensor.shape for tensor in tensors_of(family, shape)}
    assert set(other.names()) == set(one.names()) == set(wanted)
    assert other.stacked() and not one.stacked()
    for tensor, size in wanted.items():
        assert other.shape(tensor) == size
        assert other.dtype(tensor) == one.dtype(tensor)
        assert torch.equal(other.read(tensor), one.read(tensor)), tensor


def stack(tensors: Tensors, *, turned: bool = False) -> Tensors:
    rest = {name: tensor for name, tensor in tensors.items() if ".experts." not in name}
    for layer in {name.split(".mlp.")[0] for name in tensors if ".experts." in name}:
        prefix = f"{layer}.mlp.experts"
        count = len({name for name in tensors if name.startswith(prefix) and "gate_proj" in name})
        one = [[tensors[f"{prefix}.{e}.{n}_proj.weight"] for n in ("gate", "up", "down")] for e in range(count)]
        both = torch.stack([torch.cat([gate, up]) for gate, up, _ in one])
        down = torch.stack([third for _, _, third in one])
        turn = (lambda t: t.transpose(1, 2).contiguous()) if turned else (lambda t: t)
        rest |= {f"{prefix}.gate_up_proj": turn(both), f"{prefix}.down_proj": turn(down)}
    return rest


def test_the_doctor_says_that_experts_are_stacked(case: Case) -> None:
    before = load_file(case.model / "model.safetensors")
    rewrite(case.model, stack)
    check = case.check("weights")
    assert check.status == "ok"
    assert "experts are stacked (model.layers." in check.detail and check.detail.endswith("and read as slices")
    reader = HfReader(case.model)
    assert all(torch.equal(reader.read(name), tensor) for name, tensor in before.items())


def test_experts_that_are_stacked_the_other_way_round_are_refused(case: Case) -> None:
    rewrite(case.model, lambda tensors: stack(tensors, turned=True))
    check = case.check("weights")
    assert check.status == "error" and "stacked experts, but not as [experts, 2 x rows, hidden]" in check.detail
    assert not HfReader(case.model).stacked()


def test_servers_start_empty_where_experts_are_stacked(case: Case) -> None:
    from megatron_gspo.config import load
    from megatron_gspo.train.models import placed_here, served

    config = load(case.config)
    placement = placed_here(config, ranks=1)
    assert served(config, placement).server_args == config.rollout.server_args
    rewrite(case.model, stack)
    assert served(config, placement).server_args[:2] == ("--load-format", "dummy")


def test_an_evaluation_sends_stacked_experts_to_a_server_of_its_own_and_refuses_those_of_others(case: Case) -> None:
    from megatron_gspo.evaluation.examine import read_questions
    from megatron_gspo.evaluation.lengths import fitting
    from megatron_gspo.evaluation.subject import of_model
    from megatron_gspo.train.models import placed_here, served

    rewrite(case.model, stack)
    asked = [f'data.eval_path="{case.root}/eval.jsonl"', 'reward.function="exact"']
    assert read_questions(fitting(of_model(case.model, asked)), greedy=True).prompts
    config = of_model(case.model, asked).config
    assert served(config, placed_here(config, ranks=0), case.model).server_args[:2] == ("--load-format", "dummy")
    subject = of_model(case.model, [*asked, 'rollout.servers=["http://127.0.0.1:9"]'])
    with pytest.raises(ConfigError, match=r"its experts are stacked .*rollout\.servers=\[\]"):
        read_questions(subject, greedy=True)


@pytest.mark.parametrize("name", ["config.json", "model.safetensors"])
def test_a_pointer_of_git_lfs_in_the_place_of_a_file_is_named(case: Case, name: str) -> None:
    (case.model / name).write_text("version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 3554214752\n")
    check = case.check("model" if name == "config.json" else "weights")
    assert check.status == "error" and f"{name}: it is a pointer of Git LFS, not the file: git lfs pull" in check.detail


def test_architectures_that_are_a_text_are_named_as_such(case: Case) -> None:
    case.change_config(architectures="Qwen3MoeForCausalLM")
    assert "architectures = 'Qwen3MoeForCausalLM' in config.json is a text: write it as" in case.check("model").detail
