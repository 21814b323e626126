"""``rms_norm`` as two Triton kernels. Not run on a GPU yet.

With r = 1 / sqrt(mean(x^2) + eps), n = x r and m = the mean over a row of dy w n:

    dx = r (dy w - n m),    dw = sum over rows of dy n

A program of backward takes every PROGRAMS-th block of rows, keeps its sum for dw in registers and writes it once, to
its own row of [PROGRAMS, H] in float32; a sum over these follows. No atomics, and a number of programs that does not
depend on the device: the order of a sum never changes. r is computed again: x is read anyway.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from megatron_gspo.errors import ConfigError

PROGRAMS = 256
"""Partial sums of dw, at most: 2 MB of float32 beside a row of 2,048."""
ELEMENTS = 4096
"""Of a program's block, unless one row has more."""
WIDEST = 32_768
"""Of a row, which a program holds whole."""


@triton.jit
def _forward(x, weight, y, rows, width, eps, ROWS: tl.constexpr, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    column = tl.arange(0, BLOCK)
    inside = (row < rows)[:, None] & (column < width)[None, :]
    at = row[:, None] * width + column[None, :]
    w = tl.load(weight + column, mask=column < width, other=0.0).to(tl.float32)
    v = tl.load(x + at, mask=inside, other=0.0).to(tl.float32)
    r = 1.0 / tl.sqrt(tl.sum(v * v, axis=1) / width + eps)
    tl.store(y + at, (v * r[:, None] * w[None, :]).to(y.dtype.element_ty), mask=inside)


@triton.jit
def _backward(dy, x, weight, dx, partial, rows, width, eps, ROWS: tl.constexpr, BLOCK: tl.constexpr):
    program, programs = tl.program_id(0), tl.num_programs(0)
    column = tl.arange(0, BLOCK)
    w = tl.load(weight + column, mask=column < width, other=0.0).to(tl.float32)
    total = tl.zeros([BLOCK], tl.float32)
    for block in range(program, tl.cdiv(rows, ROWS), programs):
        row = block * ROWS + tl.arange(0, ROWS).to(tl.int64)
        inside = (row < rows)[:, None] & (column < width)[None, :]
        at = row[:, None] * width + column[None, :]
        v = tl.load(x + at, mask=inside, other=0.0).to(tl.float32)
        grad = tl.load(dy + at, mask=inside, other=0.0).to(tl.float32)
        r = 1.0 / tl.sqrt(tl.sum(v * v, axis=1) / width + eps)
        n = v * r[:, None]
        total += tl.sum(grad * n, axis=0)
        grad = grad * w[None, :]
        m = tl.sum(grad * n, axis=1) / width
        tl.store(dx + at, (r[:, None] * (grad - n * m[:, None])).to(dx.dtype.element_ty), mask=inside)
    tl.store(partial + program.to(tl.int64) * width + column, total, mask=column < width)


def forward(x_TH: torch.Tensor, weight_H: torch.Tensor, eps: float) -> torch.Tensor:
    """y [T, H] in x's dtype."""
    rows, width = x_TH.shape
    y = x_TH.new_empty(rows, width)
    block = _block(width)
    if rows:
        _forward[(triton.cdiv(rows, block[0]),)](x_TH.contiguous(), weight_H, y, rows, width, eps, *block)
    return y


def backward(
    dy_TH: torch.Tensor, x_TH: torch.Tensor, weight_H: torch.Tensor, eps: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """dx [T, H] and dw [H], in the dtypes of x and of the weight."""
    rows, width = x_TH.shape
    block = _block(width)
    programs = min(PROGRAMS, triton.cdiv(rows, block[0]))
    dx = x_TH.new_empty(rows, width)
    partial = x_TH.new_empty(programs, width, dtype=torch.float32)
    if rows:
        dy, x = dy_TH.contiguous(), x_TH.contiguous()
        _backward[(programs,)](dy, x, weight_H, dx, partial, rows, width, eps, *block)
    return dx, partial.sum(dim=0).to(weight_H.dtype)


def _block(width: int) -> tuple[int, int]:
    """(rows, columns) of a program's block."""
    if width > WIDEST:
        raise ConfigError(f'a row of {width:,} is wider than {WIDEST:,}: set model.kernels = "reference"')
    columns = triton.next_power_of_2(width)
    return max(1, ELEMENTS // columns), columns
