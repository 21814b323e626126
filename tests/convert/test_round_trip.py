"""What goes in comes out: every tensor byte for byte, at every layout, and the files beside them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from tests import oracle
from tests.convert.ranks import convert, names_of_index, save_rank, tensors_of, weights_rank
from tests.pool import RankError, RankPool

pytestmark = pytest.mark.distributed

LAYOUTS = {
    "1": (1, {}),
    "TP2": (2, {"tensor": 2}),
    "EP2": (2, {"expert": 2}),
    "PP2": (2, {"pipeline": 2}),
    "TP2xPP2xEP2": (4, {"tensor": 2, "pipeline": 2, "expert": 2}),
    "TP2xDP2xEP4": (4, {"tensor": 2, "expert": 4}),
    "TP2xDP2xEP2xETP2": (4, {"tensor": 2, "expert": 2, "expert_tensor": 2}),
}
SMALL = 40_000
"""Bytes of a shard: several of a tiny model."""


@pytest.fixture(scope="module")
def megatron(ranks: RankPool, tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("megatron") / "tiny"
    convert(ranks, tiny, directory, max_shard_bytes=SMALL)
    return directory


def test_there_and_back_gives_the_same_tensors_and_files(ranks: RankPool, tiny: Path, megatron: Path, tmp_path: Path):
    done = convert(ranks, megatron, tmp_path / "back", max_shard_bytes=SMALL)
    assert tensors_of(tmp_path / "back") == tensors_of(tiny)
    assert names_of_index(tmp_path / "back") == set(tensors_of(tiny))
    assert done.tensors == len(tensors_of(tiny)) and done.files > 3
    for name in ("config.json", "generation_config.json", "tokenizer.json", "notes.txt"):
        assert (tmp_path / "back" / name).read_bytes() == (tiny / name).read_bytes()
    assert not list(tmp_path.glob("*.partial"))


def test_files_stay_below_the_size_asked_for(ranks: RankPool, megatron: Path, tmp_path: Path):
    convert(ranks, megatron, tmp_path / "back", max_shard_bytes=SMALL)
    sizes = [path.stat().st_size for path in (tmp_path / "back").glob("*.safetensors")]
    assert max(sizes) < SMALL + 4000 and len(sizes) > 3  # headers come on top


@pytest.mark.parametrize("layout", LAYOUTS)
def test_any_layout_loads_what_was_converted(ranks: RankPool, tiny: Path, megatron: Path, layout: str):
    world, parallel = LAYOUTS[layout]
    loaded: dict[str, Any] = {}
    for part in ranks.run(world, weights_rank, megatron, parallel, "float32"):
        loaded |= part
    assert loaded == tensors_of(tiny)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_what_any_layout_wrote_is_converted(ranks: RankPool, tiny: Path, tmp_path: Path, layout: str):
    world, parallel = LAYOUTS[layout]
    ranks.run(world, save_rank, tiny, parallel, "float32", tmp_path / "saved")
    convert(ranks, tmp_path / "saved", tmp_path / "back")
    assert tensors_of(tmp_path / "back") == tensors_of(tiny)
    assert (tmp_path / "back" / "config.json").read_bytes() == (tiny / "config.json").read_bytes()


def test_several_ranks_share_the_files(ranks: RankPool, tiny: Path, tmp_path: Path):
    convert(ranks, tiny, tmp_path / "megatron", world=3, max_shard_bytes=SMALL)
    convert(ranks, tmp_path / "megatron", tmp_path / "back", world=2, max_shard_bytes=SMALL)
    assert tensors_of(tmp_path / "back") == tensors_of(tiny)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_every_dtype_is_kept(ranks: RankPool, tmp_path: Path, dtype: torch.dtype):
    source = oracle.make_tiny_qwen3_moe(tmp_path / "source", layers=1, dtype=dtype)
    convert(ranks, source, tmp_path / "megatron")
    convert(ranks, tmp_path / "megatron", tmp_path / "back")
    assert tensors_of(tmp_path / "back") == tensors_of(source)
    assert {stored for stored, _, _ in tensors_of(source).values()} == {str(dtype)}


def test_a_checkpoint_of_another_dtype_than_the_run_loads(ranks: RankPool, tmp_path: Path):
    source = oracle.make_tiny_qwen3_moe(tmp_path / "source", layers=1, dtype=torch.bfloat16)
    convert(ranks, source, tmp_path / "megatron")
    assert ranks.run(1, weights_rank, tmp_path / "megatron", {}, "float32") == ranks.run(
        1, weights_rank, source, {}, "float32"
    )


@pytest.mark.parametrize("stored_twice", [False, True])
def test_tied_embeddings(ranks: RankPool, tmp_path: Path, stored_twice: bool):
    source = oracle.make_tiny_qwen3_moe(tmp_path / "source", layers=2, tie=True, dtype=torch.float32)
    if stored_twice:
        store_head(source)
    convert(ranks, source, tmp_path / "megatron")
    convert(ranks, tmp_path / "megatron", tmp_path / "back")
    assert tensors_of(tmp_path / "back") == tensors_of(source)
    assert ("lm_head.weight" in tensors_of(source)) == stored_twice
    loaded: dict[str, Any] = {}
    for part in ranks.run(2, weights_rank, tmp_path / "megatron", {"pipeline": 2}, "float32"):
        loaded |= part
    assert loaded == {name: found for name, found in tensors_of(source).items() if name != "lm_head.weight"}


def test_a_tied_head_is_the_embedding_byte_for_byte_or_refused(ranks: RankPool, tmp_path: Path):
    source = oracle.make_tiny_qwen3_moe(tmp_path / "source", layers=2, tie=True, dtype=torch.bfloat16)
    store_head(source, nan=True)
    convert(ranks, source, tmp_path / "megatron")
    store_head(source, dtype=torch.float32)
    with pytest.raises(RankError, match=r"lm_head\.weight is not model\.embed_tokens\.weight byte for byte"):
        convert(ranks, source, tmp_path / "other")


def store_head(directory: Path, dtype: torch.dtype | None = None, nan: bool = False) -> None:
    from safetensors.torch import load_file, save_file

    tensors = load_file(directory / "model.safetensors")
    if nan:
        tensors["model.embed_tokens.weight"][0, 0] = torch.nan
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].to(dtype, copy=True)
    save_file(tensors, directory / "model.safetensors", {"format": "pt"})


def test_a_dense_model(ranks: RankPool, tmp_path: Path):
    source = oracle.make_tiny_qwen3(tmp_path / "source", layers=2, dtype=torch.bfloat16)
    convert(ranks, source, tmp_path / "megatron")
    convert(ranks, tmp_path / "megatron", tmp_path / "back")
    assert tensors_of(tmp_path / "back") == tensors_of(source)
