"""Rotary embedding: pairs of a head's numbers, turned by angles."""

from __future__ import annotations

from typing import Any

import torch
from torch.autograd.function import once_differentiable

from megatron_gspo.kernels.swiglu import check_form


def rotate(
    x_Thd: torch.Tensor, cos_TR: torch.Tensor, sin_TR: torch.Tensor, *, neighbours: bool = False, kernel: str = "torch"
) -> torch.Tensor:
    """The first 2 R numbers of each head turned, pair by pair, and the others as they are; in x's shape and dtype.

        y[r] = x[r] cos[r] - x[R + r] sin[r],    y[R + r] = x[R + r] cos[r] + x[r] sin[r]        (0 <= r < R)

    (RoFormer, arXiv 2104.09864, equation 34, with the halves of a head as pairs.) Computed in the dtype of the angles
    and rounded once, as engines' kernels do. Backward turns the other way, and keeps the two tables alone, which all
    layers share.

    Args:
        x_Thd: [T, heads, d], d >= 2 R.
        cos_TR, sin_TR: [T, R] float32 (float64 for float64 x), without gradient.
        neighbours: the pairs of x are x[2 r] and x[2 r + 1], and their halves lie end to end in y all the same
            (DeepSeek's order of weights).
        kernel: "triton" for tensors on CUDA (not run on a GPU yet).
    """
    check_form(kernel, x_Thd)
    turned: torch.Tensor = _Rotated.apply(x_Thd, cos_TR, sin_TR, neighbours, kernel)
    return turned


class _Rotated(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x_Thd: torch.Tensor, cos_TR: torch.Tensor, sin_TR: torch.Tensor, neighbours: bool, kernel: str
    ) -> torch.Tensor:
        ctx.save_for_backward(cos_TR, sin_TR)
        ctx.neighbours, ctx.turn = neighbours, _turn_of(kernel)
        return ctx.turn(x_Thd, cos_TR, sin_TR, neighbours, back=False)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy_Thd: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        return ctx.turn(dy_Thd, *ctx.saved_tensors, ctx.neighbours, back=True), None, None, None, None


def _turn_of(kernel: str) -> Any:
    if kernel != "triton":
        return _turn
    from megatron_gspo.kernels import triton_rotary

    return triton_rotary.turn


def _turn(
    x_Thd: torch.Tensor, cos_TR: torch.Tensor, sin_TR: torch.Tensor, neighbours: bool, *, back: bool
) -> torch.Tensor:
    """The rotation; ``back``: its transpose, which is its inverse."""
    turned = 2 * cos_TR.shape[1]
    cos, sin = cos_TR[:, None], sin_TR[:, None]
    x = x_Thd.to(cos.dtype)
    y = torch.empty_like(x, memory_format=torch.contiguous_format)
    first, second = _pairs(x[..., :turned], neighbours and not back)
    one, other = _pairs(y[..., :turned], neighbours and back)
    torch.mul(first, cos, out=one)
    torch.mul(second, cos, out=other)
    if back:
        one.add_(second * sin)
        other.sub_(first * sin)
    else:
        one.sub_(second * sin)
        other.add_(first * sin)
    y[..., turned:] = x[..., turned:]
    return y.to(x_Thd.dtype)


def _pairs(x: torch.Tensor, neighbours: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """The first and the second of each pair, as views."""
    if neighbours:
        return x[..., 0::2], x[..., 1::2]
    first, second = x.chunk(2, dim=-1)
    return first, second
