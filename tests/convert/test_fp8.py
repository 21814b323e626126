"""Directories for engines in eight bits: what a sync sends, bit for bit, and what is read back."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors import safe_open

from megatron_gspo.hf.catalog import read_model
from megatron_gspo.hf.checkpoint import HfReader
from megatron_gspo.hf.fp8 import dequantise, quantise
from megatron_gspo.train.engine_dtype import sent
from tests.convert.ranks import Tensors, convert, make_policy, plain, store, tensors_of
from tests.pool import RankError, RankPool
from tests.rollout.models import save_wide_model

pytestmark = pytest.mark.distributed

EXPERT = "model.layers.1.mlp.experts.3.down_proj.weight"
CARRIED = "model.layers.2."


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """DeepSeek-V3's kinds of tensors in float32: latent projections of partial blocks, expert biases, shared experts,
    and behind the last layer one that is carried."""
    directory = save_wide_model(
        "deepseek_v3", tmp_path_factory.mktemp("wide") / "model", seed=0, num_nextn_predict_layers=1
    )
    generator = torch.Generator().manual_seed(1)
    shapes = {"eh_proj.weight": (128, 256), "mlp.experts.0.up_proj.weight": (128, 128), "enorm.weight": (128,)}
    store(directory, {CARRIED + name: torch.randn(shape, generator=generator) for name, shape in shapes.items()})
    return directory


@pytest.fixture(scope="module")
def written(ranks: RankPool, source: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("converted")
    convert(ranks, source, root / "megatron")
    convert(ranks, root / "megatron", root / "narrow", eight_bits=True, max_shard_bytes=300_000)
    return root / "narrow"


def test_a_sync_sends_what_is_written_bit_for_bit(ranks: RankPool, source: Path, written: Path) -> None:
    found = {name: tensor for name, tensor in tensors_of(written).items() if not name.startswith(CARRIED)}
    assert ranks.run(1, sent_rank, source)[0] == found
    assert len(list(written.glob("*.safetensors"))) > 2


def sent_rank(path: Path) -> Tensors:
    policy = make_policy(path, {}, "float32")
    stream = sent("fp8", policy.weights(copies=False), policy.family, policy.shape)
    return {name: plain(tensor) for name, tensor in stream}


def test_matrices_are_read_back_as_their_bytes_mean(source: Path, written: Path) -> None:
    reader, own = HfReader(written), HfReader(source)
    assert set(reader.names()) == set(own.names())
    kinds = set()
    for name in reader.names():
        read, was = reader.read(name), own.read(name)
        stored = stored_as(written, name)
        kinds.add(stored)
        if stored == "F8_E4M3":
            assert torch.equal(read, dequantise(name, *quantise(name, was)))
        else:
            assert torch.equal(read, was.to(read.dtype)), name
    assert kinds == {"F8_E4M3", "BF16", "F32"}, "the last: expert biases and what is carried"
    assert reader.dtype("model.layers.1.mlp.gate.e_score_correction_bias") == torch.float32
    assert stored_as(written, f"{CARRIED}mlp.experts.0.up_proj.weight") == "F8_E4M3"
    assert stored_as(written, f"{CARRIED}eh_proj.weight") == "F32"


def stored_as(directory: Path, name: str) -> str:
    with safe_open(HfReader(directory).file_of(name), framework="pt") as file:
        return str(file.get_slice(name).get_dtype())


def test_config_json_says_how_and_the_index_names_scales(source: Path, written: Path) -> None:
    config = json.loads((written / "config.json").read_text())
    asked = config.pop("quantization_config")
    assert (asked["quant_method"], asked["weight_block_size"]) == ("fp8", [128, 128])
    assert config == json.loads((source / "config.json").read_text()) | {"dtype": "bfloat16"}
    index = json.loads((written / "model.safetensors.index.json").read_text())
    assert set(index["weight_map"]) == set(tensors_of(written)) > {EXPERT, f"{EXPERT}_scale_inv"}
    assert index["metadata"]["total_size"] == sum(len(data) for _, _, data in tensors_of(written).values())


def test_what_is_read_back_and_written_again_has_the_same_eight_bits(
    ranks: RankPool, written: Path, tmp_path: Path
) -> None:
    convert(ranks, written, tmp_path / "megatron")
    convert(ranks, tmp_path / "megatron", tmp_path / "again", eight_bits=True)
    before, after = tensors_of(written), tensors_of(tmp_path / "again")
    assert before.keys() == after.keys()
    narrow = {name for name, (dtype, _, _) in before.items() if dtype == "torch.float8_e4m3fn"}
    assert len(narrow) > 20 and all(after[name] == before[name] for name in narrow)
    assert read_model(tmp_path / "again", dequantised=True) == read_model(written, dequantised=True)


def test_eight_bits_of_a_directory_to_train_from_are_refused(ranks: RankPool, source: Path, tmp_path: Path) -> None:
    with pytest.raises(RankError, match="eight bits are for engines"):
        convert(ranks, source, tmp_path / "megatron", eight_bits=True)


def test_a_model_of_other_sizes_than_blocks_is_refused(ranks: RankPool, tiny: Path, tmp_path: Path) -> None:
    convert(ranks, shutil.copytree(tiny, tmp_path / "tiny"), tmp_path / "megatron")
    with pytest.raises(RankError, match=r"engines take whole ones: self_attn.q_proj.weight is 64 x 32"):
        convert(ranks, tmp_path / "megatron", tmp_path / "back", eight_bits=True)
