"""Weights of eight bits with a scale for each block, as DeepSeek-V3 ships them: read as bfloat16, never written.

A matrix ``w`` [m, n] float8_e4m3fn is stored beside ``w_scale_inv`` [ceil(m / 128), ceil(n / 128)] float32 and means
their product, block by block (arXiv 2412.19437, section 3.3.2).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from math import ceil
from typing import Any

import torch

from megatron_gspo.errors import WeightError

BLOCK = 128
STORED, READ = "F8_E4M3", torch.bfloat16
"""The dtype in a safetensors header, and the one that is read."""
SCALE = "_scale_inv"
SETTINGS = {"quant_method": ("fp8",), "fmt": ("e4m3", None), "weight_block_size": ([BLOCK, BLOCK],)}
"""Of ``quantization_config``: what they may be here."""


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
