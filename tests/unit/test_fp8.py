"""Matrices of eight bits with a scale for each block: read as bfloat16, and made."""

from __future__ import annotations

import io
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

from megatron_gspo.errors import ConfigError, WeightError
from megatron_gspo.hf.checkpoint import HfReader
from megatron_gspo.hf.fp8 import dequantise, quantise
from megatron_gspo.hf.quantisation import without_quantization
from megatron_gspo.sync.tensor import pickled

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


VALUES = torch.arange(256, dtype=torch.int32).to(torch.uint8).view(torch.float8_e4m3fn).double().numpy()
"""What each byte means; NaN twice."""


def nearest(values: np.ndarray) -> np.ndarray:
    """The byte of each number's nearest neighbour, of two the one with an even last bit: looked up in ``VALUES``."""
    known = [byte for byte in range(128) if not np.isnan(VALUES[byte])]
    grid = VALUES[known]
    distance = np.abs(np.abs(values)[..., None] - grid)
    ties = distance == distance.min(-1, keepdims=True)
    even = ties & (np.arange(len(grid)) % 2 == 0)
    chosen = np.where(even.any(-1), even.argmax(-1), ties.argmax(-1))
    return (chosen + 128 * np.signbit(values)).astype(np.uint8)


def by_hand(weight: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The formula, a block at a time, in NumPy's float32."""
    rows, columns = weight.shape
    scales = np.zeros((-(-rows // 128), -(-columns // 128)), np.float32)
    bits = np.zeros(weight.shape, np.uint8)
    for i in range(scales.shape[0]):
        for j in range(scales.shape[1]):
            block = weight[128 * i : 128 * (i + 1), 128 * j : 128 * (j + 1)]
            scales[i, j] = max(np.abs(block).max() / np.float32(448), np.float32(2.0**-126))
            bits[128 * i : 128 * (i + 1), 128 * j : 128 * (j + 1)] = nearest(block / scales[i, j])
    return bits, scales


def random_matrix(rows: int, columns: int, seed: int, exponent: int = 0, dtype: torch.dtype = torch.float32) -> Any:
    generator = torch.Generator().manual_seed(seed)
    spread = torch.exp2(torch.randint(-12, 1, (rows, columns), generator=generator).float())
    return (torch.randn(rows, columns, generator=generator) * spread * 2.0**exponent).to(dtype)


matrices = st.builds(
    random_matrix,
    rows=st.integers(1, 260),
    columns=st.integers(1, 260),
    seed=st.integers(0, 2**31),
    exponent=st.integers(-120, 100),
    dtype=st.sampled_from([torch.float32, torch.bfloat16]),
)
few = settings(max_examples=25, deadline=None)


@few
@given(
    st.builds(random_matrix, st.integers(1, 140), st.integers(1, 140), st.integers(0, 2**31), st.integers(-130, 100))
)
def test_every_byte_is_the_nearest_to_the_quotient(weight: torch.Tensor) -> None:
    narrow, scale = quantise("w", weight)
    bits, scales = by_hand(weight.numpy())
    assert np.array_equal(narrow.view(torch.uint8).numpy(), bits)
    assert np.array_equal(scale.numpy(), scales)


@few
@given(matrices)
def test_an_element_is_off_by_a_sixteenth_of_itself_or_a_thousandth_of_the_scale(weight: torch.Tensor) -> None:
    narrow, scale = quantise("w", weight)
    rows, columns = weight.shape
    spread = scale.double().repeat_interleave(128, 0)[:rows].repeat_interleave(128, 1)[:, :columns]
    error = (narrow.double() * spread - weight.double()).abs()
    assert (error <= torch.maximum(weight.double().abs() / 16, spread / 1024) * (1 + 1e-6)).all()
    assert narrow.is_contiguous() and narrow.double().abs().max() <= 448


@few
@given(matrices.filter(lambda weight: weight.dtype == torch.bfloat16))
def test_what_was_read_as_bfloat16_gives_the_same_bytes_again(weight: torch.Tensor) -> None:
    once = quantise("w", weight)
    again = quantise("w", dequantise("w", *once))
    assert torch.equal(again[0].view(torch.uint8), once[0].view(torch.uint8))
    assert torch.equal(again[1], once[1])


def test_a_block_of_zeros_stays_one_and_changes_no_other() -> None:
    weight = random_matrix(200, 300, seed=0)
    whole = quantise("w", weight)
    weight[:128, 128:256] = 0
    narrow, scale = quantise("w", weight)
    assert not dequantise("w", narrow, scale)[:128, 128:256].any() and scale[0, 1] == 2.0**-126
    scale[0, 1] = whole[1][0, 1]
    assert torch.equal(scale, whole[1])


def test_a_view_of_live_memory_is_read_and_left_as_it_is() -> None:
    live = random_matrix(140, 130, seed=0)
    before = live.clone()
    narrow, scale = quantise("w", live.T)
    assert torch.equal(live, before)
    bits, scales = by_hand(before.T.numpy())
    assert np.array_equal(narrow.view(torch.uint8).numpy(), bits) and np.array_equal(scale.numpy(), scales)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_elements_that_are_not_finite_are_refused_by_name(value: float) -> None:
    weight = torch.zeros(3, 200)
    weight[2, 199] = value
    with pytest.raises(WeightError, match=r"model\.x has elements that are not finite"):
        quantise("model.x", weight)


def test_what_is_no_matrix_is_refused() -> None:
    with pytest.raises(WeightError, match=r"w has shape \(3,\)"):
        quantise("w", torch.zeros(3))


class AsAServer(pickle.Unpickler):
    """Reads storages as SGLang 0.5.23 does."""

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) == ("torch.storage", "_load_from_bytes"):
            return lambda data: torch.load(io.BytesIO(data), weights_only=True)
        assert (module, name) in SERVERS_TAKE, (module, name)
        return super().find_class(module, name)


SERVERS_TAKE = {
    ("collections", "OrderedDict"),
    ("torch", "float8_e4m3fn"),
    ("torch._utils", "_rebuild_tensor_v2"),
    ("torch._utils", "_rebuild_tensor_v3"),
}


def test_eight_bits_are_pickled_as_a_server_unpickles_them() -> None:
    weight = random_matrix(300, 200, seed=0)
    narrow, scale = quantise("w", weight)
    views = [("w", narrow), ("part", narrow[128:256]), ("w_scale_inv", scale), ("norm", weight[0].bfloat16())]
    received = AsAServer(io.BytesIO(pickled(views))).load()
    for (name, tensor), (told, found) in zip(views, received, strict=True):
        assert (told, found.dtype, found.shape) == (name, tensor.dtype, tensor.shape)
        assert torch.equal(found.contiguous().view(torch.uint8), tensor.contiguous().view(torch.uint8))
