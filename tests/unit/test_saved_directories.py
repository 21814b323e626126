"""What goes with weights into a written directory: tokenizers, templates, code that auto_map names, what config.json
says of the weights, and the index."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from megatron_gspo.errors import ConfigError, WeightError
from megatron_gspo.hf import directory as written
from megatron_gspo.hf.checkpoint import HfReader, write_shards
from megatron_gspo.hf.directory import copy_companions, name_shards, name_stop_tokens, tensor_bytes, write_index
from megatron_gspo.megatron.checkpoint_files import HEADER, METADATA
from megatron_gspo.megatron.checkpoint_stream import COMMON

BESIDE = (
    *("generation_config.json", "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json"),
    *("added_tokens.json", "vocab.json", "vocab.txt", "merges.txt", "tokenizer.model", "tiktoken.model"),
    *("qwen.tiktoken", "spiece.model", "tekken.json", "chat_template.jinja", "chat_template.json"),
    *("preprocessor_config.json", "LICENSE", "LICENSE.txt", "NOTICE", "README.md", "USAGE_POLICY"),
    "additional_chat_templates/tool_use.jinja",
)
NOT = (
    *("model.safetensors", "model.safetensors.index.json", "pytorch_model.bin", "pytorch_model.bin.index.json"),
    *("consolidated.00.pth", "model.gguf", "adapter_model.safetensors", "adapter_config.json", "training_args.bin"),
    *("optimizer.pt", "rng_state_0.pth", "trainer_state.json", ".gitattributes", "__0_0.distcp", "metadata.json"),
    *(HEADER, METADATA, COMMON, "carried.safetensors.index.json", "original/params.json"),
)


def store(directory: Path, files: dict[str, Any]) -> Path:
    for name, content in files.items():
        path = directory / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(content if isinstance(content, str) else json.dumps(content))
    return directory


def files_in(directory: Path) -> set[str]:
    return {str(path.relative_to(directory)) for path in directory.rglob("*") if path.is_file()}


@pytest.fixture
def out(tmp_path: Path) -> Path:
    (tmp_path / "out").mkdir()
    return tmp_path / "out"


def test_what_lies_beside_the_weights_is_copied_byte_for_byte_and_nothing_of_the_weights(
    tmp_path: Path, out: Path
) -> None:
    config = '{"a":1,   "torch_dtype": "bfloat16"}'
    source = store(tmp_path / "source", {name: f"{{}} {name}" for name in (*BESIDE, *NOT)} | {"config.json": config})
    assert copy_companions(source, out) == []
    assert files_in(out) == {*BESIDE, "config.json"}
    for name in files_in(out):
        assert (out / name).read_bytes() == (source / name).read_bytes()


@pytest.mark.parametrize(
    ("stored", "asked", "found"),
    [
        ({"torch_dtype": "float16"}, "bfloat16", {"torch_dtype": "bfloat16"}),
        ({"dtype": "float16"}, "bfloat16", {"dtype": "bfloat16"}),
        ({"dtype": "float16", "torch_dtype": "float16"}, "float32", {"dtype": "float32", "torch_dtype": "float32"}),
        ({}, "float32", {"dtype": "float32"}),
        ({"torch_dtype": "float16"}, None, {"torch_dtype": "float16"}),
        ({}, None, {}),
    ],
)
def test_a_dtype_is_named_by_the_key_that_the_source_has(
    tmp_path: Path, out: Path, stored: dict[str, str], asked: str | None, found: dict[str, str]
) -> None:
    copy_companions(store(tmp_path / "source", {"config.json": {"a": 1} | stored}), out, dtype=asked)
    assert json.loads((out / "config.json").read_text()) == {"a": 1} | found


def test_a_configuration_loses_the_quantisation_that_its_weights_have_lost(tmp_path: Path, out: Path) -> None:
    fp8 = {"quant_method": "fp8", "fmt": "e4m3", "weight_block_size": [128, 128]}
    config = {"torch_dtype": "float8_e4m3fn", "quantization_config": fp8}
    copy_companions(store(tmp_path / "source", {"config.json": config}), out)
    assert json.loads((out / "config.json").read_text()) == {"torch_dtype": "bfloat16"}
    other = {"quantization_config": {"quant_method": "gptq", "bits": 4}}
    with pytest.raises(ConfigError, match=r"quant_method = 'gptq' .*: only fp8 in blocks of 128 x 128 is read; take"):
        copy_companions(store(tmp_path / "other", {"config.json": other}), out)


# ------------------------------------------------------------------------------------------------------------ auto_map

CODE = {
    "modeling.py": "import torch\nfrom .configuration import C\nfrom .sub.layers import L\nfrom . import util\n",
    "configuration.py": "class Config: ...\n",
    "sub/__init__.py": "",
    "sub/layers.py": "from ..helper import f\nif True:\n    from .deep import g\n",
    "sub/deep.py": "g = 1\n",
    "helper.py": "f = 1\n",
    "util.py": "",
    "tokenization.py": "class Tokenizer: ...\n",
}
CONFIG = {"AutoConfig": "configuration.Config", "AutoModelForCausalLM": "modeling.Model"}
TOKENIZER = {"AutoTokenizer": ["tokenization.Tokenizer", None]}


def source_of(path: Path, code: dict[str, str], config: Any = CONFIG, tokenizer: Any = TOKENIZER) -> Path:
    settings = {"config.json": {"a": 1, "auto_map": config}, "tokenizer_config.json": {"auto_map": tokenizer}}
    return store(path, code | settings)


def map_of(directory: Path, name: str = "config.json") -> Any:
    return json.loads((directory / name).read_text()).get("auto_map")


def test_code_that_auto_map_names_is_copied_with_all_that_it_imports_from_beside_it(tmp_path: Path, out: Path) -> None:
    source = source_of(tmp_path / "source", CODE)
    assert copy_companions(source, out) == []
    assert files_in(out) == {*CODE, "config.json", "tokenizer_config.json"}
    for name in files_in(out):
        assert (out / name).read_bytes() == (source / name).read_bytes()


@pytest.mark.parametrize(
    ("absent", "kept", "said"),
    [
        ("configuration.py", None, "AutoConfig = 'configuration.Config' is left out: there is no configuration.py"),
        ("modeling.py", {"AutoConfig": CONFIG["AutoConfig"]}, "there is no modeling.py"),
        ("helper.py", {"AutoConfig": CONFIG["AutoConfig"]}, "there is no helper.py, which sub/layers.py imports"),
        ("sub/deep.py", {"AutoConfig": CONFIG["AutoConfig"]}, "there is no sub/deep.py, which sub/layers.py imports"),
    ],
)
def test_a_reference_without_its_code_is_left_out_with_a_word(
    tmp_path: Path, out: Path, absent: str, kept: Any, said: str
) -> None:
    source = source_of(tmp_path / "source", {name: text for name, text in CODE.items() if name != absent})
    lines = copy_companions(source, out)
    assert any(said in line and str(source / "config.json") in line for line in lines), lines
    assert map_of(out) == kept and json.loads((out / "config.json").read_text())["a"] == 1
    assert map_of(out, "tokenizer_config.json") == TOKENIZER


@pytest.mark.parametrize(
    ("value", "kept"),
    [
        ("someone/repository--modeling.Model", True),
        (["someone/repository--tokenization.Slow", "someone/repository--tokenization.Fast"], True),
        (None, True),
        ([None, "absent.Fast"], False),
        (["absent.Slow", "absent.Fast"], False),
        ("Model", False),
        ("../../secret.Model", False),
        (7, False),
    ],
)
def test_references_elsewhere_stay_and_those_that_name_no_file_go(
    tmp_path: Path, out: Path, value: Any, kept: bool
) -> None:
    store(tmp_path, {"secret.py": "1"})
    said = copy_companions(source_of(tmp_path / "source", {}, {"AutoModel": value}, {}), out)
    assert map_of(out) == ({"AutoModel": value} if kept else None)
    assert bool(said) is not kept


def test_one_of_two_tokenizers_stays(tmp_path: Path, out: Path) -> None:
    both = {"AutoTokenizer": ["tokenization.Slow", "absent.Fast"]}
    (line,) = copy_companions(source_of(tmp_path / "source", CODE, CONFIG, both), out)
    assert "absent.Fast" in line
    assert map_of(out, "tokenizer_config.json") == {"AutoTokenizer": ["tokenization.Slow", None]}


@pytest.mark.parametrize(
    "text",
    ["from ...secret import f\n", "from .. import secret\n", "from ..secret import f\n", "from ...x.y import f"],
)
def test_code_from_outside_of_the_directory_is_not_copied(tmp_path: Path, out: Path, text: str) -> None:
    store(tmp_path, {"secret.py": "1", "x/y.py": "1"})
    copy_companions(source_of(tmp_path / "a" / "source", CODE | {"configuration.py": text}), out)
    assert not any("secret" in name or "y.py" in name for name in files_in(tmp_path) - {"secret.py", "x/y.py"})


@pytest.mark.parametrize("text", ["print 1\n", "\x00", "import .x\n", "(" * 5000])
def test_code_that_is_not_python_is_copied_as_it_is(tmp_path: Path, out: Path, text: str) -> None:
    source = source_of(tmp_path / "source", CODE | {"configuration.py": text})
    copy_companions(source, out)
    assert (out / "configuration.py").read_bytes() == (source / "configuration.py").read_bytes()
    assert map_of(out) == CONFIG


# --------------------------------------------------------------------------------------------------------------- index


def test_shards_get_the_names_of_transformers_and_an_index_of_their_tensors_bytes(tmp_path: Path) -> None:
    """As two ranks write them: three files, by owner and then by number."""
    first = [("b", torch.ones(3, 5)), ("a", torch.zeros(2, dtype=torch.bfloat16))]
    files = write_shards(tmp_path, first, owner=0, max_bytes=60)
    files |= write_shards(tmp_path, [("c", torch.full((7,), 2.0))], owner=1, max_bytes=60)
    files = name_shards(tmp_path, files)
    assert write_index(tmp_path, files) == ["model.safetensors.index.json"]
    assert files == {
        "b": "model-00001-of-00003.safetensors",
        "a": "model-00002-of-00003.safetensors",
        "c": "model-00003-of-00003.safetensors",
    }
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    assert index == {"metadata": {"total_size": 3 * 5 * 4 + 2 * 2 + 7 * 4}, "weight_map": dict(sorted(files.items()))}
    assert files_in(tmp_path) == {*files.values(), "model.safetensors.index.json"}
    reader = HfReader(tmp_path)
    assert torch.equal(reader.read("c"), torch.full((7,), 2.0)) and reader.read("a").dtype == torch.bfloat16


def test_one_file_needs_no_index(tmp_path: Path) -> None:
    files = name_shards(tmp_path, write_shards(tmp_path, [("a", torch.ones(2))], owner=0, max_bytes=60))
    assert write_index(tmp_path, files) == []
    assert files_in(tmp_path) == {"model.safetensors"}
    assert torch.equal(load_file(tmp_path / "model.safetensors")["a"], torch.ones(2))


def test_a_file_that_is_cut_short_has_no_size(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    save_file({"a": torch.ones(100)}, path)
    assert tensor_bytes(path) == 400
    path.write_bytes(path.read_bytes()[:20])
    with pytest.raises(WeightError, match=r"20 bytes, and a header of \d+: it is cut short"):
        tensor_bytes(path)


def test_names_of_a_megatron_checkpoint_are_none_of_the_companions() -> None:
    for name in (HEADER, METADATA, COMMON, "metadata.json"):
        assert written.OF_WEIGHTS.fullmatch(name) or Path(name).suffix in written.WEIGHTS


@pytest.mark.parametrize(
    ("before", "after"),
    [
        ({"eos_token_id": 7, "top_p": 0.9}, {"eos_token_id": [7, 3], "top_p": 0.9}),
        ({"eos_token_id": [3, 9]}, {"eos_token_id": [3, 9, 7]}),
        (None, {"eos_token_id": [3, 7]}),
    ],
)
def test_stop_tokens_of_the_run_are_added_to_those_that_a_server_reads(
    tmp_path: Path, before: dict[str, Any] | None, after: dict[str, Any]
) -> None:
    if before is not None:
        (tmp_path / "generation_config.json").write_text(json.dumps(before))
    name_stop_tokens(tmp_path, (3, 7))
    assert json.loads((tmp_path / "generation_config.json").read_text()) == after
