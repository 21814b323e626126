"""``rotate`` as one Triton kernel, which reads x once and writes y once; backward is the same kernel. Not run on a GPU
yet."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

ELEMENTS = 2048
"""Of a program's block of pairs, at most."""


@triton.jit
def _turn(
    x, cos, sin, y, rows, heads, half, rest, token_stride, head_stride,
    FROM_NEIGHBOURS: tl.constexpr, TO_NEIGHBOURS: tl.constexpr, BACK: tl.constexpr,
    ROWS: tl.constexpr, BLOCK: tl.constexpr, REST: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    token, head = row // heads, row % heads
    pair = tl.arange(0, BLOCK)
    inside = (row < rows)[:, None] & (pair < half)[None, :]
    angle = token[:, None] * half + pair[None, :]
    c = tl.load(cos + angle, mask=inside, other=0.0)
    s = tl.load(sin + angle, mask=inside, other=0.0)
    if BACK:
        s = -s
    source = x + (token * token_stride + head * head_stride)[:, None]
    target = y + (row * (2 * half + rest))[:, None]
    if FROM_NEIGHBOURS:
        first = tl.load(source + 2 * pair[None, :], mask=inside, other=0.0).to(tl.float32)
        second = tl.load(source + 2 * pair[None, :] + 1, mask=inside, other=0.0).to(tl.float32)
    else:
        first = tl.load(source + pair[None, :], mask=inside, other=0.0).to(tl.float32)
        second = tl.load(source + half + pair[None, :], mask=inside, other=0.0).to(tl.float32)
    one = (first * c - second * s).to(y.dtype.element_ty)
    other = (second * c + first * s).to(y.dtype.element_ty)
    if TO_NEIGHBOURS:
        tl.store(target + 2 * pair[None, :], one, mask=inside)
        tl.store(target + 2 * pair[None, :] + 1, other, mask=inside)
    else:
        tl.store(target + pair[None, :], one, mask=inside)
        tl.store(target + half + pair[None, :], other, mask=inside)
    if REST > 0:
        column = tl.arange(0, REST)
        beyond = (row < rows)[:, None] & (column < rest)[None, :]
        kept = tl.load(source + 2 * half + column[None, :], mask=beyond, other=0.0)
        tl.store(target + 2 * half + column[None, :], kept, mask=beyond)


def turn(
    x_Thd: torch.Tensor, cos_TR: torch.Tensor, sin_TR: torch.Tensor, neighbours: bool, *, back: bool
) -> torch.Tensor:
    """y [T, heads, d], contiguous, in x's dtype; ``back`` turns the other way. x may be a view with whole heads."""
    tokens, heads, width = x_Thd.shape
    half = cos_TR.shape[1]
    x = x_Thd if x_Thd.stride(2) == 1 else x_Thd.contiguous()
    y = x_Thd.new_empty(x_Thd.shape)
    rows, rest = tokens * heads, width - 2 * half
    block = triton.next_power_of_2(half)
    height = max(1, ELEMENTS // block)
    if rows:
        _turn[(triton.cdiv(rows, height),)](
            x, cos_TR, sin_TR, y, rows, heads, half, rest, x.stride(0), x.stride(1),
            neighbours and not back, neighbours and back, back,
            height, block, triton.next_power_of_2(rest) if rest else 0,
        )  # fmt: skip
    return y
