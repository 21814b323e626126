"""Damaged Hugging Face directories: ``config.json``, the index, safetensors, generation settings.

A tensor that is accepted is compared with an independent reading of the same file (the format is a JSON header and raw
bytes, without checksums: bytes of a weight that changed cannot be noticed, and the comparison does not pretend it).
A shape that is accepted is compared with ``config.json``, field by field and type by type.
"""

from __future__ import annotations

import json
import math
import re
import shutil
import typing
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st

from megatron_gspo.data.tokenizer import load_tokenizer
from megatron_gspo.errors import ConfigError, DataError, WeightError
from megatron_gspo.hf.catalog import read_model
from megatron_gspo.hf.checkpoint import INDEX, SINGLE, HfReader
from megatron_gspo.hf.family import ModelShape
from tests.fuzz.mutations import (
    BYTE_MUTATIONS,
    HANG_S,
    MUTATIONS,
    VALUES,
    as_json,
    assert_says,
    fuzz,
    mutated,
    mutated_bytes,
)
from tests.unit.doctor_cases import prepare

pytestmark = pytest.mark.timeout(HANG_S)

DTYPES = {"F32": np.float32, "F64": np.float64, "F16": np.float16}


@pytest.fixture(scope="module")
def sound(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("sound") / "model"
    prepare().write_model(directory, seed=0)
    return directory


@pytest.fixture
def model(sound: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(sound, tmp_path / "model"))


# ------------------------------------------------------------------------------------------------------ config.json

FIELDS = {
    "num_layers": "num_hidden_layers",
    "hidden_size": "hidden_size",
    "vocab_size": "vocab_size",
    "num_attention_heads": "num_attention_heads",
    "num_query_groups": "num_key_value_heads",
    "head_dim": "head_dim",
    "num_experts": "num_experts",
    "top_k": "num_experts_per_tok",
    "expert_hidden_size": "moe_intermediate_size",
    "norm_epsilon": "rms_norm_eps",
    "tied_embeddings": "tie_word_embeddings",
    "max_positions": "max_position_embeddings",
}
READ = (*FIELDS.values(), "rope_parameters", "mlp_only_layers", "decoder_sparse_step", "norm_topk_prob", "hidden_act")


def check_shape(model: Path) -> None:
    config = json.loads((model / "config.json").read_bytes().decode())
    try:
        _, shape = read_model(model)
    except ConfigError as error:
        assert_says(error, model)
        return
    for ours, theirs in FIELDS.items():
        value = getattr(shape, ours)
        if config.get(theirs) is not None:
            assert value == config[theirs], f"{theirs} = {config[theirs]!r} was read as {ours} = {value!r}"
    for name, kind in typing.get_type_hints(ModelShape).items():
        value = getattr(shape, name)
        if kind is float:
            assert type(value) in (int, float) and math.isfinite(value), (name, value)
        elif isinstance(kind, type):
            assert type(value) is kind, (name, value)
    assert len(shape.moe_layers) == shape.num_layers and all(type(is_moe) is bool for is_moe in shape.moe_layers)
    assert type(shape.megatron["moe_router_pre_softmax"]) is bool


@fuzz(250)
@given(st.sampled_from(READ), st.one_of(VALUES, MUTATIONS), st.booleans())
@example("tie_word_embeddings", "false", True)
@example("norm_topk_prob", "false", True)
@example("rms_norm_eps", True, True)
@example("mlp_only_layers", [99], True)
@example("decoder_sparse_step", 1.0, True)
@example("intermediate_size", None, True)
def test_any_field_of_config_json_is_read_as_it_is_or_refused(
    sound: Path, model: Path, name: str, value: Any, whole: bool
) -> None:
    config = json.loads((sound / "config.json").read_text())
    is_mutation = isinstance(value, list) and value and isinstance(value[0], tuple)
    if is_mutation:
        config = mutated(config, value) if whole else config | {name: mutated(config.get(name), value)}
    else:
        config[name] = value
    (model / "config.json").write_bytes(as_json(config))
    check_shape(model)


@fuzz(100)
@given(BYTE_MUTATIONS)
@example([("cut", 0.0, 0, b"x"), ("insert", 0.0, 0, b"[" * 50_000)])
@example([("cut", 0.0, 0, b"x"), ("insert", 0.0, 0, b'{"architectures": ["\\ud800"]}')])
def test_any_bytes_of_config_json_are_read_as_they_are_or_refused(sound: Path, model: Path, changes: list[Any]) -> None:
    (model / "config.json").write_bytes(mutated_bytes((sound / "config.json").read_bytes(), changes))
    try:
        read_model(model)
    except ConfigError as error:
        assert_says(error, model)
        return
    check_shape(model)


@fuzz(80)
@given(st.sampled_from(["generation_config.json", "config.json"]), st.one_of(VALUES, MUTATIONS))
@example("generation_config.json", True)
@example("config.json", [True])
def test_stop_tokens_are_ids_of_the_vocabulary_or_refused(sound: Path, model: Path, name: str, value: Any) -> None:
    path = model / name
    config = json.loads((sound / name).read_text()) if (sound / name).exists() else {}
    config["eos_token_id"] = value
    path.write_bytes(as_json(config))
    try:
        tokenizer = load_tokenizer(model)
    except DataError as error:
        assert_says(error, model)
        return
    finally:
        (shutil.copyfile(sound / name, path) if (sound / name).exists() else path.unlink())
    assert all(type(token) is int and 0 <= token < tokenizer.vocab_size for token in tokenizer.stop_ids)
    wanted = [] if value is None else value if isinstance(value, list) else [value]
    assert set(wanted) <= set(tokenizer.stop_ids)


# ------------------------------------------------------------------------------------------------------ safetensors


def check_tensors(model: Path, expected: set[str]) -> None:
    """Reads every tensor that a run would read, by ours and by hand."""
    try:
        reader = HfReader(model)
        found = {name: reader.read(name) for name in sorted(expected)}
    except WeightError as error:
        assert_says(error, model)
        return
    for name, tensor in found.items():
        theirs = by_hand(reader.file_of(name), name)
        assert tensor.is_floating_point(), (name, tensor.dtype)
        assert tuple(tensor.shape) == theirs.shape == reader.shape(name)
        assert np.array_equal(tensor.double().numpy(), theirs.astype(np.float64), equal_nan=True)


def by_hand(path: Path, name: str) -> np.ndarray:
    content = path.read_bytes()
    size = int.from_bytes(content[:8], "little")
    entry = json.loads(content[8 : 8 + size])[name]
    start, end = entry["data_offsets"]
    data = content[8 + size + start : 8 + size + end]
    if entry["dtype"] == "BF16":  # the upper half of a float32
        return (np.frombuffer(data, np.uint16).astype(np.uint32) << 16).view(np.float32).reshape(entry["shape"])
    values = np.frombuffer(data, dtype=DTYPES[entry["dtype"]])
    return values.reshape(entry["shape"])


def stored(sound: Path) -> set[str]:
    return set(HfReader(sound).names())


@fuzz(200)
@given(BYTE_MUTATIONS, st.booleans())
def test_any_bytes_of_safetensors_are_read_as_they_are_or_refused(
    sound: Path, model: Path, changes: list[Any], in_header: bool
) -> None:
    content = (sound / SINGLE).read_bytes()
    split = 8 + int.from_bytes(content[:8], "little") if in_header else len(content)
    (model / SINGLE).write_bytes(mutated_bytes(content[:split], changes) + content[split:])
    check_tensors(model, stored(sound))


@fuzz(200)
@given(MUTATIONS)
@example([("set", 2, 0, "I32")])
def test_a_header_of_safetensors_is_followed_or_refused(sound: Path, model: Path, mutations: list[Any]) -> None:
    content = (sound / SINGLE).read_bytes()
    size = int.from_bytes(content[:8], "little")
    header = as_json(mutated(json.loads(content[8 : 8 + size]), mutations))
    (model / SINGLE).write_bytes(len(header).to_bytes(8, "little") + header + content[8 + size :])
    check_tensors(model, stored(sound))


@pytest.mark.parametrize("dtype", ["I32", "U32"])
def test_weights_that_are_no_floating_point_numbers_are_refused(sound: Path, model: Path, dtype: str) -> None:
    content = (sound / SINGLE).read_bytes()
    (model / SINGLE).write_bytes(content.replace(b'"F32"', f'"{dtype}"'.encode()))
    with pytest.raises(WeightError, match=r"model\.safetensors: .* is stored as torch\.u?int32"):
        HfReader(model).read("model.norm.weight")


@pytest.mark.parametrize(
    ("tensors", "said"),
    [
        ({"x": torch.ones(4, 4).to(torch.float8_e4m3fn)}, "x is stored as torch.float8_e4m3fn"),
        ({"x": torch.ones(4).to(torch.float8_e4m3fn), "x_scale_inv": torch.ones(1)}, "x has shape (4,)"),
        ({"x": torch.ones(4, 4).to(torch.float8_e5m2), "x_scale_inv": torch.ones(1, 1)}, "x is stored as"),
    ],
)
def test_weights_in_eight_bits_are_refused_where_their_scales_would_be_lost(
    model: Path, tensors: dict[str, torch.Tensor], said: str
) -> None:
    from safetensors.torch import save_file

    save_file(tensors, model / SINGLE)
    with pytest.raises(WeightError, match=re.escape(said)):
        HfReader(model).read("x")


@fuzz(150)
@given(st.one_of(MUTATIONS, BYTE_MUTATIONS), st.booleans())
@example([("cut", 0.0, 0, b"x"), ("insert", 0.0, 0, b"[" * 50_000)], True)
def test_an_index_is_followed_or_refused(sound: Path, model: Path, mutations: list[Any], as_bytes: bool) -> None:
    index: dict[str, Any] = {"metadata": {}, "weight_map": dict.fromkeys(sorted(stored(sound)), SINGLE)}
    if isinstance(mutations[0][1], float):
        content = mutated_bytes(as_json(index), mutations)
    else:
        content = as_json(mutated(index, mutations))
    (model / INDEX).write_bytes(content)
    check_tensors(model, stored(sound))
