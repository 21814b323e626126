"""Weights of eight bits with a scale for each block, as DeepSeek-V3 and Qwen3's FP8 directories have them.

A matrix ``w`` [m, n] float8_e4m3fn is stored beside ``w_scale_inv`` [ceil(m / 128), ceil(n / 128)] float32 and means
their product, block by block (arXiv 2412.19437, section 3.3.2). Blocks at the right and lower edge may be partial.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from math import ceil
from typing import Any

import torch
from torch.nn.functional import pad

from megatron_gspo.errors import WeightError

BLOCK = 128
STORED, READ = "F8_E4M3", torch.bfloat16
"""The dtype in a safetensors header, and the one that is read."""
SCALE = "_scale_inv"
SETTINGS = {"quant_method": ("fp8",), "fmt": ("e4m3", None), "weight_block_size": ([BLOCK, BLOCK],)}
"""Of ``quantization_config``: what they may be here."""
WRITTEN = {"quant_method": "fp8", "fmt": "e4m3", "weight_block_size": [BLOCK, BLOCK], "activation_scheme": "dynamic"}
"""Of ``quantization_config``: what is written. Engines round activations too, by what they are at the time."""
LARGEST = torch.finfo(torch.float8_e4m3fn).max
"""448."""
SMALLEST_SCALE = torch.finfo(torch.float32).tiny
"""2 ** -126: of blocks whose largest element is below 448 times as much, above all of those that are zero."""


def unknown_settings(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Those of a ``quantization_config`` that make it another one than this."""
    return {name: settings.get(name) for name, known in SETTINGS.items() if settings.get(name) not in known}


def scales_among(names: Iterable[str]) -> frozenset[str]:
    """The scales of other tensors among ``names``."""
    found = set(names)
    return frozenset(name for name in found if name.endswith(SCALE) and name.removesuffix(SCALE) in found)


def dequantise(name: str, weight: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """[m, n] bfloat16. Raises WeightError for what is no matrix, or a scale that does not have one number a block."""
    blocks = tuple(ceil(size / BLOCK) for size in weight.shape)
    if weight.dim() != 2:
        raise WeightError(f"{name} has shape {tuple(weight.shape)}, and blocks of {BLOCK} x {BLOCK} are of matrices")
    if scale.shape != blocks:
        raise WeightError(f"{name}{SCALE} has shape {tuple(scale.shape)}, and {name} has {blocks} blocks of {BLOCK}")
    rows, columns = weight.shape
    spread = scale.float().repeat_interleave(BLOCK, 0)[:rows].repeat_interleave(BLOCK, 1)[:, :columns]
    return (weight.float() * spread).to(READ)


def quantise(name: str, weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """(float8_e4m3fn [m, n], float32 scales [ceil(m / 128), ceil(n / 128)]) of a matrix in any floating-point dtype.

    Of each block, in float32: scale = max(largest |w| / 448, 2 ** -126), and w / scale rounded to the nearest, ties to
    even (arXiv 2412.19437, section 3.3.2: the scale is that of the largest element, found anew). Every operation is
    one that IEEE 754 defines to the last bit, so the bytes are the same on every device. An element is off by at most
    1/16 of itself or scale / 1024, whichever is more. The weight is not changed. Raises WeightError for what is no
    matrix, and for elements that are not finite: a block's scale would carry them to all of it.
    """
    if weight.dim() != 2:
        raise WeightError(f"{name} has shape {tuple(weight.shape)}, and blocks of {BLOCK} x {BLOCK} are of matrices")
    rows, columns = weight.shape
    blocks = pad(weight.detach().float(), (0, -columns % BLOCK, 0, -rows % BLOCK)).unflatten(0, (-1, BLOCK))
    blocks = blocks.unflatten(2, (-1, BLOCK))
    largest = blocks.abs().amax((1, 3))
    if not torch.isfinite(largest).all():  # amax keeps NaN
        raise WeightError(f"{name} has elements that are not finite, and no scale makes eight bits of them")
    # By a tensor: on a GPU, torch divides by a number of Python's as it multiplies by its inverse, which rounds twice.
    scale = (largest / torch.full_like(largest, LARGEST)).clamp_min(SMALLEST_SCALE)
    narrow = (blocks / scale[:, None, :, None]).to(torch.float8_e4m3fn)
    return narrow.reshape(-1, narrow.shape[2] * BLOCK)[:rows, :columns].contiguous(), scale
