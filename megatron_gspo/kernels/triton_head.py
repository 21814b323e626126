"""The output layer in two Triton kernels that never write a logit to memory. Not run on a GPU yet.

Forward: a program has BLOCK_T tokens and SPLIT columns. It makes a block of logits at a time in registers and keeps,
per token, their maximum, the two sums relative to it (online softmax) and the label's logit. What it writes is these
four numbers a token and split; a small merge in torch follows. Splits are as wide on every card, so that the order of
a sum never changes.

Backward: for COLUMNS columns at a time, one kernel makes the logits again and writes grad (1[column = label] - softmax)
in the head's dtype: [tokens, COLUMNS], 16 MB of bfloat16 at 1,024 tokens. That tile is what two matrix products of
cuBLAS read, for dh and dW. (Fusing these as well would need each logit a second time, or sums of many programs into one
dW: atomics, in an order that changes.) There are no atomics, and each number is one program's.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
import triton
import triton.language as tl

from megatron_gspo.kernels.sums import Sums

BLOCK_T, BLOCK_V, BLOCK_H = 128, 128, 64
"""Tokens, columns and hidden width of a product. Three stages of both inputs take 96 KiB of shared memory."""
WARPS, STAGES = 8, 3
SPLIT = 4096
"""Columns of a program of forward: a multiple of BLOCK_V. 38 splits of Qwen3's vocabulary."""
COLUMNS = 8192
"""Columns of a tile of backward."""


@triton.jit
def _logits(
    h, weight, row, column, tokens, columns, hidden, temperature,
    BLOCK_T: tl.constexpr, BLOCK_V: tl.constexpr, BLOCK_H: tl.constexpr, WIDEN: tl.constexpr,
):  # fmt: skip
    """[BLOCK_T, BLOCK_V] in float32. Rows and columns beyond the last read the last: nobody uses what becomes of it."""
    from_h = h + tl.minimum(row, tokens - 1).to(tl.int64)[:, None] * hidden
    from_weight = weight + tl.minimum(column, columns - 1).to(tl.int64)[None, :] * hidden
    z = tl.zeros([BLOCK_T, BLOCK_V], tl.float32)
    for start in range(0, hidden, BLOCK_H):
        at = start + tl.arange(0, BLOCK_H)
        a = tl.load(from_h + at[None, :], mask=(at < hidden)[None, :], other=0.0)
        b = tl.load(from_weight + at[:, None], mask=(at < hidden)[:, None], other=0.0)
        if WIDEN:
            a, b = a.to(tl.float32), b.to(tl.float32)
        z = tl.dot(a, b, z, input_precision="ieee")
    return z / temperature


@triton.jit
def _sums(
    h, weight, labels, maximum, exp, weighted, label, tokens, columns, hidden, first, temperature,
    SPLIT: tl.constexpr, LOWEST: tl.constexpr,
    BLOCK_T: tl.constexpr, BLOCK_V: tl.constexpr, BLOCK_H: tl.constexpr, WIDEN: tl.constexpr,
):  # fmt: skip
    blocks = tl.cdiv(tokens, BLOCK_T)
    split = tl.program_id(0) // blocks  # programs that run together share the columns, which are most of what is read
    row = (tl.program_id(0) % blocks) * BLOCK_T + tl.arange(0, BLOCK_T)
    place = tl.load(labels + row, mask=row < tokens, other=-1) - first
    top = tl.full([BLOCK_T], LOWEST, tl.float32)
    total = tl.zeros([BLOCK_T], tl.float32)
    moment = tl.zeros([BLOCK_T], tl.float32)
    of_label = tl.zeros([BLOCK_T], tl.float32)
    for start in range(split * SPLIT, tl.minimum(split * SPLIT + SPLIT, columns), BLOCK_V):
        column = start + tl.arange(0, BLOCK_V)
        z = _logits(
            h, weight, row, column, tokens, columns, hidden, temperature, BLOCK_T, BLOCK_V, BLOCK_H, WIDEN
        )  # fmt: skip
        valid = (column < columns)[None, :]
        of_label += tl.sum(tl.where(valid & (column[None, :] == place[:, None]), z, 0.0), axis=1)
        new = tl.maximum(top, tl.max(tl.where(valid, z, LOWEST), axis=1))
        scale = tl.exp(top - new)
        moment = (moment + (top - new) * total) * scale
        total = total * scale
        z = tl.where(valid, z - new[:, None], 0.0)
        e = tl.where(valid, tl.exp(z), 0.0)
        total += tl.sum(e, axis=1)
        moment += tl.sum(e * z, axis=1)
        top = new
    to = split.to(tl.int64) * tokens + row
    tl.store(maximum + to, top, mask=row < tokens)
    tl.store(exp + to, total, mask=row < tokens)
    tl.store(weighted + to, moment, mask=row < tokens)
    tl.store(label + to, of_label, mask=row < tokens)


@triton.jit
def _gradients(
    h, weight, labels, lse, grad, dz, tokens, columns, hidden, first, temperature,
    BLOCK_T: tl.constexpr, BLOCK_V: tl.constexpr, BLOCK_H: tl.constexpr, WIDEN: tl.constexpr,
):  # fmt: skip
    blocks = tl.cdiv(tokens, BLOCK_T)
    row = (tl.program_id(0) % blocks) * BLOCK_T + tl.arange(0, BLOCK_T)
    column = (tl.program_id(0) // blocks) * BLOCK_V + tl.arange(0, BLOCK_V)
    place = tl.load(labels + row, mask=row < tokens, other=-1) - first
    of_token = tl.load(lse + row, mask=row < tokens, other=0.0)
    g = tl.load(grad + row, mask=row < tokens, other=0.0).to(tl.float32)
    z = _logits(
        h, weight, row, column, tokens, columns, hidden, temperature, BLOCK_T, BLOCK_V, BLOCK_H, WIDEN
    )  # fmt: skip
    hit = tl.where(column[None, :] == place[:, None], 1.0, 0.0)
    d = g[:, None] * (hit - tl.exp(z - of_token[:, None]))
    inside = (row < tokens)[:, None] & (column < columns)[None, :]
    to = row.to(tl.int64)[:, None] * columns + column[None, :]
    tl.store(dz + to, d.to(dz.dtype.element_ty), mask=inside)


class TritonHead:
    """``HeadShard`` by kernels, for float32 and half types."""

    def __init__(self, weight_VH: torch.Tensor, first: int, temperature: float, tokens: int) -> None:
        """``weight_VH`` holds the vocabulary's rows from ``first`` on; ``tokens`` is the most that a call is for."""
        self.weight_VH, self.first, self.temperature, self.tokens = weight_VH.contiguous(), first, temperature, tokens
        self.dtype = torch.float32

    def sums(self, h: torch.Tensor, labels: torch.Tensor) -> Sums:
        """Over all columns, for h [tokens, H] and labels [tokens]."""
        (tokens, hidden), columns = h.shape, len(self.weight_VH)
        splits = max(1, triton.cdiv(columns, SPLIT))
        lowest = torch.finfo(torch.float32).min
        maximum, exp, weighted, label = h.new_empty(4, splits, tokens, dtype=torch.float32)
        _sums[(splits * triton.cdiv(tokens, BLOCK_T),)](
            h.contiguous(), self.weight_VH, labels, maximum, exp, weighted, label, tokens, columns, hidden,
            self.first, self.temperature, SPLIT, lowest, **self._blocks(h),
        )  # fmt: skip
        local = labels - self.first
        sums = Sums(maximum, exp, weighted, label, (local >= 0) & (local < columns))
        sums.move_to(maximum.amax(dim=0))
        return Sums(sums.maximum, sums.exp.sum(dim=0), sums.weighted.sum(dim=0), label.sum(dim=0), sums.found)

    def gradients(
        self, h: torch.Tensor, labels: torch.Tensor, lse: torch.Tensor, grad: torch.Tensor
    ) -> Iterator[tuple[slice, torch.Tensor, torch.Tensor]]:
        """(columns, their rows of the head, grad (1[column = label] - softmax)), each until the next is asked for."""
        h, (tokens, hidden) = h.contiguous(), h.shape
        memory = self.weight_VH.new_empty(self.tokens * min(COLUMNS, len(self.weight_VH)))
        for start in range(0, len(self.weight_VH), COLUMNS):
            weight = self.weight_VH[start : start + COLUMNS]
            columns = len(weight)
            dz = memory[: tokens * columns].view(tokens, columns)
            _gradients[(triton.cdiv(tokens, BLOCK_T) * triton.cdiv(columns, BLOCK_V),)](
                h, weight, labels, lse, grad, dz, tokens, columns, hidden, self.first + start, self.temperature,
                **self._blocks(h),
            )  # fmt: skip
            yield slice(start, start + columns), weight, dz

    def _blocks(self, h: torch.Tensor) -> dict[str, int | bool]:
        """Sizes, and whether to widen: the interpreter's products of half types are wrong."""
        widen = bool(triton.knobs.runtime.interpret) and h.dtype != torch.float32
        sizes = {"BLOCK_T": BLOCK_T, "BLOCK_V": BLOCK_V, "BLOCK_H": BLOCK_H}
        return {**sizes, "WIDEN": widen, "num_warps": WARPS, "num_stages": STAGES}
