"""What Triton kernels allocate, without Triton: stand-ins for the modules that hold them, for fake tensors.

Each makes the tensors that its kernel's wrapper makes, in the same order and dtypes, and nothing else; a test holds
them against the real ones.
"""

from __future__ import annotations

import types
from collections.abc import Iterator
from typing import Any

import torch

from megatron_gspo.kernels.sums import Sums

SPLIT, COLUMNS = 4096, 8192
"""As in ``kernels.triton_head``."""
PROGRAMS, ELEMENTS = 256, 4096
"""As in ``kernels.triton_norm``."""


class Head:
    """Of ``kernels.triton_head.TritonHead``."""

    def __init__(self, weight_VH: torch.Tensor, first: int, temperature: float, tokens: int) -> None:
        self.weight_VH, self.first, self.tokens = weight_VH.contiguous(), first, tokens
        self.dtype = torch.float32

    def sums(self, h: torch.Tensor, labels: torch.Tensor) -> Sums:
        """Four numbers a token and split of columns, and what they are merged to."""
        columns = len(self.weight_VH)
        _product(h, self.weight_VH)
        maximum, exp, weighted, label = h.new_empty(4, max(1, -(-columns // SPLIT)), len(h), dtype=torch.float32)
        local = labels - self.first
        sums = Sums(maximum, exp, weighted, label, (local >= 0) & (local < columns))
        sums.move_to(maximum.amax(dim=0))
        return Sums(sums.maximum, sums.exp.sum(dim=0), sums.weighted.sum(dim=0), label.sum(dim=0), sums.found)

    def gradients(
        self, h: torch.Tensor, labels: torch.Tensor, lse: torch.Tensor, grad: torch.Tensor
    ) -> Iterator[tuple[slice, torch.Tensor, torch.Tensor]]:
        """A tile of one dtype, used again for each run of columns."""
        tokens, memory = len(h), self.weight_VH.new_empty(self.tokens * min(COLUMNS, len(self.weight_VH)))
        for start in range(0, len(self.weight_VH), COLUMNS):
            weight = self.weight_VH[start : start + COLUMNS]
            _product(h, weight)
            yield slice(start, start + len(weight)), weight, memory[: tokens * len(weight)].view(tokens, len(weight))


def _product(h: torch.Tensor, weight: torch.Tensor) -> None:
    """Tells the meter of logits that are never written."""
    computed(2 * h.shape[0] * h.shape[1] * weight.shape[0])


def computed(flops: int) -> None:
    """Where the stand-ins report floating-point operations; the meter's ``add_flops`` takes its place."""


def norm_forward(x_TH: torch.Tensor, weight_H: torch.Tensor, eps: float) -> torch.Tensor:
    """Of ``triton_norm.forward``."""
    return x_TH.new_empty(x_TH.shape)


def norm_backward(
    dy_TH: torch.Tensor, x_TH: torch.Tensor, weight_H: torch.Tensor, eps: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """Of ``triton_norm.backward``."""
    dx = x_TH.new_empty(x_TH.shape)
    rows = max(1, ELEMENTS // (1 << (x_TH.shape[1] - 1).bit_length()))
    partial = x_TH.new_empty(min(PROGRAMS, -(-len(x_TH) // rows)), x_TH.shape[1], dtype=torch.float32)
    return dx, partial.sum(dim=0).to(weight_H.dtype)


def swiglu_forward(x_T2I: torch.Tensor, probs_T: torch.Tensor | None) -> torch.Tensor:
    """Of ``triton_swiglu.forward``."""
    return x_T2I.new_empty(x_T2I.shape[0], x_T2I.shape[1] // 2)


def swiglu_backward(
    dy_TI: torch.Tensor, x_T2I: torch.Tensor, probs_T: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Of ``triton_swiglu.backward``."""
    return torch.empty_like(x_T2I.contiguous()), None if probs_T is None else torch.empty_like(probs_T.contiguous())


def turn(
    x_Thd: torch.Tensor, cos_TR: torch.Tensor, sin_TR: torch.Tensor, neighbours: bool, *, back: bool
) -> torch.Tensor:
    """Of ``triton_rotary.turn``."""
    return x_Thd.new_empty(x_Thd.shape)


def modules() -> dict[str, types.ModuleType]:
    """Name of a module that needs Triton -> what stands in for it."""
    contents: dict[str, dict[str, Any]] = {
        "triton_head": {"TritonHead": Head},
        "triton_norm": {"forward": norm_forward, "backward": norm_backward},
        "triton_rotary": {"turn": turn},
        "triton_swiglu": {"forward": swiglu_forward, "backward": swiglu_backward},
    }
    made = {}
    for name, values in contents.items():
        module = made[f"megatron_gspo.kernels.{name}"] = types.ModuleType(name)
        vars(module).update(values)
    return made
