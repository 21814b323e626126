"""RMSNorm, rounded once: x / sqrt(mean(x^2) + eps) * weight."""

from __future__ import annotations

from typing import Any

import torch
from torch.autograd.function import once_differentiable

from megatron_gspo.kernels.swiglu import check_form


def rms_norm(x: torch.Tensor, weight_H: torch.Tensor, eps: float, kernel: str = "torch") -> torch.Tensor:
    """x / sqrt(mean(x^2) + eps) * weight over the last dimension, in x's shape and dtype.

    Computed in float32 (float64 for float64 x) and rounded once, behind the weight, as engines' kernels do. (Hugging
    Face's modules round before it too.)

    Args:
        x: [..., H]
        weight_H: [H]
        eps: added to the mean square.
        kernel: "triton" for tensors on CUDA, with a backward that keeps x and the weight alone (not run on a GPU yet).
    """
    check_form(kernel, x)
    if kernel == "triton":
        return _TritonNorm.apply(x, weight_H, eps)
    dtype = torch.promote_types(x.dtype, torch.float32)
    wide = x.to(dtype)
    return (wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps) * weight_H.to(dtype)).to(x.dtype)


class _TritonNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, weight_H: torch.Tensor, eps: float) -> torch.Tensor:
        from megatron_gspo.kernels import triton_norm

        ctx.save_for_backward(x, weight_H)
        ctx.eps = eps
        return triton_norm.forward(x.reshape(-1, len(weight_H)), weight_H, eps).view(x.shape)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        from megatron_gspo.kernels import triton_norm

        x, weight_H = ctx.saved_tensors
        rows = (-1, len(weight_H))
        dx, dweight = triton_norm.backward(dy.reshape(rows), x.reshape(rows), weight_H, ctx.eps)
        return dx.view(x.shape), dweight, None
