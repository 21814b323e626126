"""DeepSeek's eight-bit weights, read as bfloat16."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from megatron_gspo.errors import ConfigError, WeightError
from megatron_gspo.hf.checkpoint import HfReader
from megatron_gspo.hf.quantisation import without_quantization

KNOWN = {"quant_method": "fp8", "fmt": "e4m3", "weight_block_size": [128, 128]}


def directory(path: Path, rows: int, columns: int) -> tuple[HfReader, torch.Tensor, torch.Tensor]:
    """A matrix of 200 x 300, whose last blocks are partial, beside scales of so many rows and columns."""
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(200, 300, generator=generator).to(torch.float8_e4m3fn)
    scale = torch.rand(rows, columns, generator=generator) + 0.5
    save_file({"w": weight, "w_scale_inv": scale, "alone_scale_inv": torch.ones(1)}, path / "model.safetensors")
    return HfReader(path), weight, scale


def test_each_element_is_scaled_by_its_block(tmp_path: Path) -> None:
    reader, weight, scale = directory(tmp_path, 2, 3)
    assert set(reader.names()) == {"w", "alone_scale_inv"}, "a scale is part of its tensor"
    assert reader.dtype("w") == torch.bfloat16 and reader.shape("w") == (200, 300)
    expected = [[float(weight[i, j]) * float(scale[i // 128, j // 128]) for j in range(300)] for i in range(200)]
    assert torch.equal(reader.read("w"), torch.tensor(expected, dtype=torch.float64).to(torch.bfloat16))


def test_scales_of_other_blocks_are_refused(tmp_path: Path) -> None:
    reader, _, _ = directory(tmp_path, 3, 2)
    with pytest.raises(WeightError, match=r"w_scale_inv has shape \(3, 2\), and .*w has \(2, 3\) blocks of 128"):
        reader.read("w")


def test_eight_bits_without_scales_are_refused(tmp_path: Path) -> None:
    save_file({"w": torch.ones(2, 2).to(torch.float8_e4m3fn)}, tmp_path / "model.safetensors")
    for read in (HfReader(tmp_path).read, HfReader(tmp_path).dtype):
        with pytest.raises(WeightError, match="w is stored as"):
            read("w")


@pytest.mark.parametrize(
    "change", [{"quant_method": "gptq"}, {"fmt": "e5m2"}, {"weight_block_size": [64, 64]}, {"weight_block_size": None}]
)
def test_another_quantisation_is_refused_with_its_value(change: dict[str, Any]) -> None:
    (setting,) = change
    with pytest.raises(ConfigError, match=f"{setting} = "):
        without_quantization({"a": 1, "quantization_config": KNOWN | change})
    assert without_quantization({"a": 1, "quantization_config": KNOWN}) == {"a": 1}
