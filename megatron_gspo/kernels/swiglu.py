"""SwiGLU with a probability per row: what an expert does between its two matrix products."""

from __future__ import annotations

from typing import Any

import torch
from torch.autograd.function import once_differentiable

from megatron_gspo.errors import ConfigError


def swiglu(x_T2I: torch.Tensor, probs_T: torch.Tensor | None = None, kernel: str = "torch") -> torch.Tensor:
    """silu(gate) * up * probability, [T, I], in x's dtype.

    Computed in float32 (float64 for float64 x) and rounded once. Backward keeps ``x_T2I`` and ``probs_T`` and nothing
    else, and computes the rest again.

    Args:
        x_T2I: [T, 2 I], gate and up side by side: gate = x[:, :I], up = x[:, I:]. T may be 0.
        probs_T: [T] a router's probabilities of any floating dtype; their gradient is in that dtype. None: all 1.
        kernel: "triton" for tensors on CUDA (not run on a GPU yet).
    """
    check_form(kernel, x_T2I)
    return _Swiglu.apply(x_T2I, probs_T, kernel)


def check_form(kernel: str, x: torch.Tensor) -> None:
    """Raises ConfigError for a form that does not exist, and for float64 in Triton, which computes in float32."""
    if kernel not in ("torch", "triton") or (kernel == "triton" and x.dtype == torch.float64):
        raise ConfigError(f'no kernel "{kernel}" for {x.dtype}: "torch", or "triton" below float64')


class _Swiglu(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x_T2I: torch.Tensor, probs_T: torch.Tensor | None, kernel: str) -> torch.Tensor:
        ctx.save_for_backward(x_T2I, probs_T)
        ctx.kernel = kernel
        if kernel == "triton":
            from megatron_gspo.kernels import triton_swiglu

            return triton_swiglu.forward(x_T2I, probs_T)
        return _forward(x_T2I, probs_T)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_TI: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        x_T2I, probs_T = ctx.saved_tensors
        if ctx.kernel == "triton":
            from megatron_gspo.kernels import triton_swiglu

            return *triton_swiglu.backward(grad_TI, x_T2I, probs_T), None
        return *_backward(grad_TI, x_T2I, probs_T), None


def _forward(x_T2I: torch.Tensor, probs_T: torch.Tensor | None) -> torch.Tensor:
    gate_TI, up_TI = _halves(x_T2I)
    product_TI = torch.nn.functional.silu(gate_TI.contiguous()).mul_(up_TI)
    if probs_T is not None:
        product_TI.mul_(_column(probs_T, product_TI.dtype))
    return product_TI.to(x_T2I.dtype)


def _backward(
    grad_TI: torch.Tensor, x_T2I: torch.Tensor, probs_T: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """With s = sigmoid(gate), a = gate s, the gradient d and the probability p:

    d up = d a p,    d gate = d up p (s + s (gate - a)),    d p = sum over I of d a up

    One sigmoid, the only slow function here, serves all; it is taken of contiguous memory, which a CPU does faster.
    """
    gate_TI, up_TI = _halves(x_T2I)
    grad_TI = grad_TI.to(gate_TI.dtype)
    grad_x = torch.empty_like(x_T2I, dtype=gate_TI.dtype, memory_format=torch.contiguous_format)
    grad_gate, grad_up = grad_x.chunk(2, dim=1)
    sigmoid = gate_TI.contiguous().sigmoid()
    act = gate_TI * sigmoid
    torch.mul(grad_TI, act, out=grad_up)
    slope = sigmoid.addcmul(sigmoid, torch.sub(gate_TI, act, out=act)).mul_(grad_TI)
    grad_probs = None
    if probs_T is not None:
        grad_probs = torch.linalg.vecdot(grad_up, up_TI).to(probs_T.dtype)
        column = _column(probs_T, grad_x.dtype)
        grad_up.mul_(column)
        slope.mul_(column)
    torch.mul(slope, up_TI, out=grad_gate)
    return grad_x.to(x_T2I.dtype), grad_probs


def _halves(x_T2I: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Gate and up, at least in float32."""
    gate_TI, up_TI = x_T2I.to(torch.promote_types(x_T2I.dtype, torch.float32)).chunk(2, dim=1)
    return gate_TI, up_TI


def _column(probs_T: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    return probs_T.to(dtype)[:, None]
