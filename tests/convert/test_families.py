"""Every model family there and back, with what only some of them have: expert biases, layers that are only carried."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from megatron_gspo.parity.models import make_model
from tests.convert.ranks import Tensors, convert, make_policy, names_of_index, plain, store, tensors_of, verify_rank
from tests.pool import RankError, RankPool

pytestmark = pytest.mark.distributed

LAYOUTS: dict[str, tuple[int, dict[str, int]]] = {
    "tiny-mixtral": (2, {"tensor": 2, "expert": 2}),
    "tiny-qwen2-moe": (4, {"tensor": 2, "pipeline": 2, "expert": 2}),
    "tiny-olmoe": (2, {"tensor": 2}),
    "tiny-deepseek-v3": (4, {"tensor": 2, "pipeline": 2, "expert": 2}),
    "tiny-moonlight": (2, {"expert": 2}),
    "tiny-glm4-moe": (2, {"pipeline": 2}),
    "tiny-qwen2": (2, {"tensor": 2}),
    "tiny-llama": (2, {"pipeline": 2}),
}
"""(Ranks, ``[parallel]``), one a family; Qwen3-MoE is at all of them in ``test_round_trip``."""
TOKENS = [3, 1, 4, 1, 5, 9, 2, 6, 5, 35, 66, 0]
BIAS = "e_score_correction_bias"
PREDICTING = "model.layers.4."
"""Where the layer behind the last is, which nothing computes."""
SMALL = 40_000
"""Bytes of a shard: several of a tiny model."""
Make = Callable[[str, torch.dtype], Path]


@pytest.fixture(scope="module")
def make(tmp_path_factory: pytest.TempPathFactory) -> Make:
    """transformers' own directory of a family's tiny model in a dtype; those that may predict several tokens do."""
    from transformers import AutoModelForCausalLM

    def once(name: str, dtype: torch.dtype) -> Path:
        path = root / f"{name}-{dtype}"
        if not path.exists():
            exact = make_model(name, root / f"{path.name}-exact", seed=0)
            AutoModelForCausalLM.from_pretrained(exact, dtype=dtype).save_pretrained(path)
            if name in ("tiny-deepseek-v3", "tiny-moonlight", "tiny-glm4-moe"):
                add_predicting_layer(path, dtype)
        return path

    root = tmp_path_factory.mktemp("families")
    return once


def add_predicting_layer(path: Path, dtype: torch.dtype) -> None:
    """As DeepSeek and GLM ship it: tensors of one layer more than ``num_hidden_layers``, of names of its own too."""
    generator = torch.Generator().manual_seed(1)
    shapes = {"eh_proj.weight": (32, 64), "mlp.experts.7.up_proj.weight": (24, 32), "shared_head.norm.weight": (32,)}
    tensors = {PREDICTING + name: torch.rand(shape, generator=generator).to(dtype) for name, shape in shapes.items()}
    store(path, {**tensors, f"{PREDICTING}mlp.gate.{BIAS}": torch.rand(8, generator=generator)})
    config = json.loads((path / "config.json").read_text())
    config.pop("num_mtp_layers", None)
    (path / "config.json").write_text(json.dumps(config | {"num_nextn_predict_layers": 1}))


def pass_on(path: Path, parallel: dict[str, int], directory: Path) -> tuple[Tensors, np.ndarray]:
    """Loads a checkpoint at a layout and writes what training writes; what it holds, and its logits."""
    from megatron_gspo.megatron.checkpoint import save_checkpoint
    from megatron_gspo.megatron.logits import logits_of

    policy = make_policy(path, parallel, "float32")
    save_checkpoint({"policy": policy}, directory, {"config": {"model": {"path": str(path)}}})
    return {name: plain(tensor) for name, tensor in policy.weights()}, logits_of(policy, TOKENS).numpy()


def transformers_logits(path: Path) -> np.ndarray:
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()
    with torch.no_grad():
        logits: np.ndarray = model(torch.tensor([TOKENS])).logits[0].numpy()
    return logits


@pytest.mark.parametrize("name", LAYOUTS)
def test_there_through_a_layout_and_back(ranks: RankPool, make: Make, tmp_path: Path, name: str) -> None:
    """Converted, loaded and written at a layout, converted back: each byte is the file's; logits are transformers'."""
    source, (world, parallel) = make(name, torch.float32), LAYOUTS[name]
    convert(ranks, source, tmp_path / "megatron", max_shard_bytes=SMALL)
    parts = ranks.run(world, pass_on, tmp_path / "megatron", parallel, tmp_path / "saved")
    loaded: dict[str, Any] = {name: found for tensors, _ in parts for name, found in tensors.items()}
    stored = tensors_of(source)
    assert loaded == {name: found for name, found in stored.items() if not name.startswith(PREDICTING)}
    assert sum(len(tensors) for tensors, _ in parts) == len(loaded), "a tensor is streamed twice"
    expected = transformers_logits(source)
    assert np.abs(parts[0][1] - expected).max() < 1e-5 * np.abs(expected).max()
    for kind in ("megatron", "saved"):
        convert(ranks, tmp_path / kind, tmp_path / f"{kind}-back", max_shard_bytes=SMALL)
        assert tensors_of(tmp_path / f"{kind}-back") == stored
        assert names_of_index(tmp_path / f"{kind}-back") == set(stored)
        assert (tmp_path / f"{kind}-back" / "config.json").read_bytes() == (source / "config.json").read_bytes()


@pytest.mark.parametrize("stored", [torch.float32, torch.bfloat16])
def test_an_expert_bias_keeps_the_dtype_of_its_file(
    ranks: RankPool, make: Make, tmp_path: Path, stored: torch.dtype
) -> None:
    source = make("tiny-moonlight", torch.bfloat16)
    biases = {f"model.layers.{layer}.mlp.gate.{BIAS}": torch.linspace(-1, 1, 8).to(stored) for layer in (1, 2, 3)}
    store(source, biases)
    convert(ranks, source, tmp_path / "megatron")
    convert(ranks, tmp_path / "megatron", tmp_path / "back")
    assert tensors_of(tmp_path / "back") == tensors_of(source)
    found = {kept for name, (kept, _, _) in tensors_of(tmp_path / "back").items() if name in biases}
    assert found == {str(stored)}


def test_layers_that_are_only_carried_have_files_of_their_own(ranks: RankPool, make: Make, tmp_path: Path) -> None:
    source, megatron = make("tiny-glm4-moe", torch.float32), tmp_path / "megatron"
    convert(ranks, source, megatron, max_shard_bytes=4096)
    carried = {name: found for name, found in tensors_of(source).items() if name.startswith(PREDICTING)}
    assert len(carried) == 4 and tensors_of(megatron) == carried
    assert len(list(megatron.glob("carried-*-of-00002.safetensors"))) == 2
    convert(ranks, megatron, tmp_path / "back", world=2)
    assert tensors_of(tmp_path / "back") == tensors_of(source)
    assert {path.name for path in (tmp_path / "back").iterdir()} == {path.name for path in source.iterdir()}


def test_a_configuration_that_megatron_makes_no_model_of_is_named(ranks: RankPool, make: Make, tmp_path: Path) -> None:
    source = Path(shutil.copytree(make("tiny-moonlight", torch.float32), tmp_path / "source"))
    config = json.loads((source / "config.json").read_text())
    (source / "config.json").write_text(json.dumps(config | {"v_head_dim": None}))
    with pytest.raises(RankError, match=r"ConfigError: .*source/config\.json: Megatron makes no model of it: "):
        convert(ranks, source, tmp_path / "megatron")


def test_carried_tensors_whose_file_is_gone_are_missed(ranks: RankPool, make: Make, tmp_path: Path) -> None:
    convert(ranks, make("tiny-glm4-moe", torch.float32), tmp_path / "megatron")
    (tmp_path / "megatron" / "carried.safetensors").unlink()
    with pytest.raises(RankError, match=r"carried\.safetensors: it is missing"):
        convert(ranks, tmp_path / "megatron", tmp_path / "back")


def test_a_carried_tensor_that_differs_is_named(ranks: RankPool, make: Make, tmp_path: Path) -> None:
    source, megatron = make("tiny-glm4-moe", torch.float32), tmp_path / "megatron"
    convert(ranks, source, megatron)
    assert ranks.run(1, verify_rank, source, megatron)[0].equal == len(tensors_of(source))
    file = megatron / "carried.safetensors"
    file.write_bytes(file.read_bytes()[:-1] + b"\x7f")
    verdict = ranks.run(1, verify_rank, source, megatron)[0]
    assert [found.what for found in verdict.differences] == ["values"]
    assert verdict.differences[0].name.startswith(PREDICTING)


def test_fp8_blocks_come_out_as_bfloat16(ranks: RankPool, make: Make, tmp_path: Path) -> None:
    """DeepSeek's scales, one a block of 128 x 128: the product is stored, and config.json asks for no quantisation."""
    source = Path(shutil.copytree(make("tiny-deepseek-v3", torch.bfloat16), tmp_path / "source"))
    plainly = tensors_of(source)
    head, bits = "lm_head.weight", torch.arange(67 * 32, dtype=torch.int64).remainder(120).to(torch.uint8).view(67, 32)
    store(source, {head: bits.view(torch.float8_e4m3fn), f"{head}_scale_inv": torch.tensor([[0.375]])})
    config = json.loads((source / "config.json").read_text())
    fp8 = {"quant_method": "fp8", "fmt": "e4m3", "weight_block_size": [128, 128]}
    (source / "config.json").write_text(json.dumps(config | {"quantization_config": fp8}))
    convert(ranks, source, tmp_path / "megatron")
    convert(ranks, tmp_path / "megatron", tmp_path / "back")
    exponent, mantissa = (bits >> 3).double(), (bits & 7).double()
    value = torch.where(exponent == 0, mantissa / 8 * 2.0**-6, (1 + mantissa / 8) * 2 ** (exponent - 7))
    assert tensors_of(tmp_path / "back") == plainly | {head: plain((value * 0.375).to(torch.bfloat16))}
    assert json.loads((tmp_path / "back" / "config.json").read_text()) == config
    assert ranks.run(1, verify_rank, source, tmp_path / "megatron")[0].held
