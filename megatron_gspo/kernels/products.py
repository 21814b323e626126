"""Matrix products whose result is float32 although their inputs are of a half type.

A product of two bfloat16 numbers is exact in float32, and sums of them are float32: rounding the result to bfloat16 is
what would be lost. One place asks which device it is, and either way takes the same arguments to the same values, up to
the order of a sum.
"""

from __future__ import annotations

import torch


def wide_product(a: torch.Tensor, b: torch.Tensor, out: torch.Tensor | None = None) -> torch.Tensor:
    """a b in float32 (float64 of float64), for a [m, k] and b [k, n] of one dtype. ``out`` [m, n] is of that dtype.

    On CUDA the product writes float32 (not run on a GPU yet). On a CPU, which has no such product, inputs are widened.
    """
    dtype = torch.promote_types(a.dtype, torch.float32)
    if a.dtype == dtype:
        return torch.mm(a, b, out=out)
    if _writes_float32(a):
        return torch.mm(a, b, out_dtype=dtype) if out is None else torch.mm(a, b, out_dtype=dtype, out=out)
    return torch.mm(a.to(dtype), b.to(dtype), out=out)


def add_product(total: torch.Tensor, a: torch.Tensor, b: torch.Tensor) -> None:
    """total += a b, in ``total``'s dtype, which is float32 for half types."""
    if a.dtype == total.dtype:
        total.addmm_(a, b)
    else:
        total += wide_product(a, b)


def _writes_float32(a: torch.Tensor) -> bool:
    return a.is_cuda
