"""--verify names what differs, whatever kinds the two checkpoints are of."""

from __future__ import annotations

import pickle
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.convert.ranks import convert, logits_rank, store, verify_rank
from tests.pool import RankPool

pytestmark = pytest.mark.distributed

UP = "model.layers.1.mlp.experts.3.up_proj.weight"
Q = "model.layers.0.self_attn.q_proj.weight"


@pytest.fixture(scope="module")
def megatron(ranks: RankPool, tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("verify") / "megatron"
    convert(ranks, tiny, directory)
    return directory


def verify(ranks: RankPool, first: Path, second: Path, world: int = 1) -> Any:
    return ranks.run(world, verify_rank, first, second)[0]


def changed(tiny: Path, directory: Path, change: dict[str, torch.Tensor | None]) -> Path:
    shutil.copytree(tiny, directory)
    store(directory, change)
    return directory


def test_checkpoints_of_the_same_tensors_are_the_same(ranks: RankPool, tiny: Path, megatron: Path):
    verdicts = [verify(ranks, tiny, megatron), verify(ranks, megatron, tiny, world=2), verify(ranks, tiny, tiny)]
    assert all(verdict.held and verdict.equal == verdict.tensors == 47 for verdict in verdicts)
    assert len({verdict.digest for verdict in verdicts}) == 1


def test_one_bit_is_named(ranks: RankPool, tiny: Path, megatron: Path, tmp_path: Path):
    from safetensors.torch import load_file

    tensor = load_file(tiny / "model.safetensors")[Q]
    tensor[3, 4] += 0.5
    verdict = verify(ranks, megatron, changed(tiny, tmp_path / "other", {Q: tensor}))
    (found,) = verdict.differences
    assert (found.name, found.what) == (Q, "values")
    assert f"1 of {tensor.numel()} elements differ, by 0.5 at most" in found.detail
    assert verdict.digest == verify(ranks, tiny, tiny).digest, "the digest is the first checkpoint's"


def test_missing_extra_shape_and_dtype_are_named(ranks: RankPool, tiny: Path, megatron: Path, tmp_path: Path):
    change = {
        UP: None,
        "model.stranger": torch.zeros(2),
        Q: torch.zeros(2, 2),
        "model.norm.weight": torch.zeros(32).half(),
    }
    verdict = verify(ranks, megatron, changed(tiny, tmp_path / "other", change))
    assert {found.name: found.what for found in verdict.differences} == {
        UP: "missing",
        "model.stranger": "extra",
        Q: "shape",
        "model.norm.weight": "dtype",
    }
    assert verdict.equal == 47 - 3 and not verdict.held


def test_the_digest_is_of_all_that_the_first_has(ranks: RankPool, tiny: Path, tmp_path: Path):
    more = changed(tiny, tmp_path / "more", {"model.stranger": torch.zeros(2)})
    assert verify(ranks, more, tiny).digest != verify(ranks, tiny, more).digest
    assert verify(ranks, more, tiny).digest == verify(ranks, more, more).digest
    assert verify(ranks, more, tiny).equal == verify(ranks, tiny, more).equal == 47


def test_a_tensor_of_no_hugging_face_name_is_named(ranks: RankPool, tiny: Path, megatron: Path, tmp_path: Path):
    other = Path(shutil.copytree(megatron, tmp_path / "other"))
    metadata = pickle.loads((other / ".metadata").read_bytes())
    norm, stranger = "decoder.final_layernorm.weight", "decoder.stranger.weight"
    metadata.state_dict_metadata[stranger] = metadata.state_dict_metadata[norm]
    (other / ".metadata").write_bytes(pickle.dumps(metadata))
    for first, second, what in ((tiny, other, "extra"), (other, tiny, "missing")):
        (found,) = verify(ranks, first, second).differences
        assert (found.name, found.what) == (stranger, what)


def test_a_damaged_block_is_named(ranks: RankPool, tiny: Path, megatron: Path, tmp_path: Path):
    other = tmp_path / "other"
    shutil.copytree(megatron, other)
    file = other / "__0_0.distcp"
    file.write_bytes(file.read_bytes()[:-100])
    verdict = verify(ranks, tiny, other)
    assert {found.what for found in verdict.differences} == {"unreadable"}
    assert "__0_0.distcp: " in verdict.differences[0].detail


TOKENS = [3, 1, 4, 1, 5, 9, 2, 6, 5, 35, 66, 0]


@pytest.mark.parametrize("parallel", [{}, {"tensor": 2, "pipeline": 2, "expert": 2}])
def test_logits_are_those_of_transformers_at_every_layout(
    ranks: RankPool, tiny: Path, megatron: Path, parallel: dict[str, int]
):
    world = parallel.get("tensor", 1) * parallel.get("pipeline", 1)
    rows = ranks.run(world, logits_rank, tiny, megatron, TOKENS, parallel)[0]
    assert [row.implementation.split(",")[0] for row in rows] == ["transformers", "megatron"] * 2
    assert rows[0].error == 0 == rows[2].error
    assert all(0 < row.error < 1e-5 for row in (rows[1], rows[3]))


def test_logits_of_another_model_differ(ranks: RankPool, tiny: Path, tmp_path: Path):
    other = changed(tiny, tmp_path / "other", {"model.norm.weight": torch.ones(32)})
    rows = ranks.run(1, logits_rank, tiny, other, TOKENS, {})[0]
    assert rows[1].error < 1e-5 and rows[2].error > 0.01 and rows[3].error > 0.01
