"""``swiglu`` as two Triton kernels: one reads x and writes y, one reads x and dy and writes dx and d probs.

A program has some whole rows, so that the sum over a row, for the gradient of its probability, is one program's and in
one order. Not run on a GPU yet.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

ELEMENTS = 2048
"""Of a program's block, at most."""


@triton.jit
def _forward(x, probs, y, rows, width, HAS_PROBS: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    if HAS_PROBS:
        prob = tl.load(probs + row, mask=row < rows, other=0.0).to(tl.float32)
    for start in range(0, width, BLOCK):
        column = start + tl.arange(0, BLOCK)
        inside = (row < rows)[:, None] & (column < width)[None, :]
        at = row[:, None] * (2 * width) + column[None, :]
        gate = tl.load(x + at, mask=inside, other=0.0).to(tl.float32)
        up = tl.load(x + at + width, mask=inside, other=0.0).to(tl.float32)
        product = gate * tl.sigmoid(gate) * up
        if HAS_PROBS:
            product = product * prob[:, None]
        tl.store(y + row[:, None] * width + column[None, :], product.to(y.dtype.element_ty), mask=inside)


@triton.jit
def _backward(dy, x, probs, dx, dprobs, rows, width, HAS_PROBS: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    if HAS_PROBS:
        prob = tl.load(probs + row, mask=row < rows, other=0.0).to(tl.float32)
    dprob = tl.zeros([ROWS], tl.float32)
    for start in range(0, width, BLOCK):
        column = start + tl.arange(0, BLOCK)
        inside = (row < rows)[:, None] & (column < width)[None, :]
        at = row[:, None] * (2 * width) + column[None, :]
        gate = tl.load(x + at, mask=inside, other=0.0).to(tl.float32)
        up = tl.load(x + at + width, mask=inside, other=0.0).to(tl.float32)
        grad = tl.load(dy + row[:, None] * width + column[None, :], mask=inside, other=0.0).to(tl.float32)
        sigmoid = tl.sigmoid(gate)
        act = gate * sigmoid
        if HAS_PROBS:
            dprob += tl.sum(grad * act * up, axis=1)
            grad = grad * prob[:, None]
        dgate = grad * up * (sigmoid + act * (1.0 - sigmoid))
        tl.store(dx + at, dgate.to(dx.dtype.element_ty), mask=inside)
        tl.store(dx + at + width, (grad * act).to(dx.dtype.element_ty), mask=inside)
    if HAS_PROBS:
        tl.store(dprobs + row, dprob.to(dprobs.dtype.element_ty), mask=row < rows)


def forward(x_T2I: torch.Tensor, probs_T: torch.Tensor | None) -> torch.Tensor:
    """y [T, I] of x [T, 2 I] and probabilities [T]."""
    rows, width = x_T2I.shape[0], x_T2I.shape[1] // 2
    y = x_T2I.new_empty(rows, width)
    if rows:
        x, probs = x_T2I.contiguous(), None if probs_T is None else probs_T.contiguous()
        _forward[_grid(rows, width)](x, probs, y, rows, width, probs is not None, *_block(width))
    return y


def backward(
    dy_TI: torch.Tensor, x_T2I: torch.Tensor, probs_T: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """dx [T, 2 I] and, where there are probabilities, theirs [T]."""
    rows, width = x_T2I.shape[0], x_T2I.shape[1] // 2
    dy, x = dy_TI.contiguous(), x_T2I.contiguous()
    dx = torch.empty_like(x)
    probs = None if probs_T is None else probs_T.contiguous()
    dprobs = None if probs is None else torch.empty_like(probs)
    if rows:
        _backward[_grid(rows, width)](dy, x, probs, dx, dprobs, rows, width, probs is not None, *_block(width))
    return dx, dprobs


def _block(width: int) -> tuple[int, int]:
    """(rows, columns) of a program's block."""
    columns = min(1024, triton.next_power_of_2(width))
    return ELEMENTS // columns, columns


def _grid(rows: int, width: int) -> tuple[int]:
    return (triton.cdiv(rows, _block(width)[0]),)
