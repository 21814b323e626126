"""Products with matrices of eight bits, in torch: what a GPU's kernels compute, for servers on a CPU.

Loaded by path in a server's process, where this package is not installed: torch is all that it may import. Weights
have a scale for each block of 128 x 128; activations are rounded to eight bits in groups of 128, as SGLang's kernels
do before each product (``per_token_group_quant_fp8``), and products are summed in float32.
"""

from __future__ import annotations

import torch
from torch.nn.functional import silu

BLOCK = 128
LARGEST = torch.finfo(torch.float8_e4m3fn).max
SMALLEST = 1e-10
"""Of a group's largest element, as SGLang has it."""


def widen(weight_MN: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """[m, n] float32 of a matrix of eight bits and its scales [ceil(m / 128), ceil(n / 128)]."""
    rows, columns = weight_MN.shape
    spread = scale.repeat_interleave(BLOCK, 0)[:rows].repeat_interleave(BLOCK, 1)[:, :columns]
    return weight_MN.float() * spread


def rounded(x_TN: torch.Tensor) -> torch.Tensor:
    """[tokens, n] float32: activations as eight bits in groups of 128 hold them. ``n`` is a multiple of 128."""
    groups = x_TN.float().unflatten(-1, (-1, BLOCK))
    scale = groups.abs().amax(-1, keepdim=True).clamp_min(SMALLEST) / LARGEST
    narrow = (groups / scale).clamp(-LARGEST, LARGEST).to(torch.float8_e4m3fn)
    return (narrow.float() * scale).flatten(-2)


def product(x_TN: torch.Tensor, weight_MN: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """[tokens, m] in the dtype of the activations."""
    return (rounded(x_TN) @ widen(weight_MN, scale).T).to(x_TN.dtype)


def experts(
    x_TN: torch.Tensor,
    gate_up: tuple[torch.Tensor, torch.Tensor],
    down: tuple[torch.Tensor, torch.Tensor],
    weights_TK: torch.Tensor,
    chosen_TK: torch.Tensor,
) -> torch.Tensor:
    """[tokens, n]: SwiGLU experts, each token's ``chosen_TK`` under ``weights_TK``, summed in float32.

    ``gate_up`` are matrices [experts, 2 m, n] and their scales, ``down`` [experts, n, m] and theirs.
    """
    out_TN = torch.zeros_like(x_TN, dtype=torch.float32)
    for expert in chosen_TK.unique().tolist():
        rows, slots = (chosen_TK == expert).nonzero(as_tuple=True)
        gate, up = product(x_TN[rows], gate_up[0][expert], gate_up[1][expert]).chunk(2, dim=-1)
        part = product(silu(gate) * up, down[0][expert], down[1][expert])
        out_TN.index_add_(0, rows, part.float() * weights_TK[rows, slots, None].float())
    return out_TN.to(x_TN.dtype)
