"""One product for all experts of a layer: rows [N, in], of which each expert has a run, by weights [E, out, in].

    forward     y_e = x_e W_e^T                      for the rows x_e of expert e
    backward    dx_e = dy_e W_e,    dW_e = dy_e^T x_e

No collective is among them: an expert's rows are all here (``dispatch``), and expert-tensor ranks hold slices of W_e
whose partial sums meet when rows go back.

Two forms, chosen in ``product_form`` alone. torch's ``grouped_mm`` is one kernel for all experts, and takes the number
of rows from the device's memory. The loop is one matrix product an expert, exact in every dtype.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal, get_args

import torch
import torch.nn.functional as F

from megatron_gspo.parallel.gradients import gradient_was_added, where_gradients_add

Form = Literal["grouped_mm", "loop"]
FORMS: tuple[Form, ...] = get_args(Form)
ROW_BYTES = 16
"""``grouped_mm`` takes rows of a multiple of so many bytes."""
SMALL_ON_CPU = 128 * 128
"""Elements of an expert's weight up to which the CPU's ``grouped_mm`` beats the loop, which is what calls cost there.
``megatron-gspo bench experts`` measures it: 1.9 times at 64 x 64, 1.3 at 128 x 128, 0.8 at 256 x 256."""


@dataclass(frozen=True)
class Runs:
    """How many rows each expert has, ``counts_E`` [E] int64, in the forms that the products ask for."""

    counts_E: torch.Tensor

    @cached_property
    def ends_E(self) -> torch.Tensor:
        """[E] int32: the first row behind each expert's."""
        return self.counts_E.cumsum(0, dtype=torch.int32)

    @cached_property
    def slices(self) -> list[slice]:
        """Each expert's rows. Waits for the device."""
        ends = [0, *itertools.accumulate(self.counts_E.tolist())]
        return [slice(start, end) for start, end in itertools.pairwise(ends)]


def product_form(outputs: int, inputs: int, dtype: torch.dtype, device: str) -> Form:
    """The one place that chooses, by an expert's weight [outputs, inputs] and where it lies ("cpu" or "cuda").

    float64 is the loop's alone, and so are rows that ``grouped_mm`` refuses.
    """
    known = dtype in (torch.float32, torch.bfloat16, torch.float16) and hasattr(F, "grouped_mm")
    whole = all(width * dtype.itemsize % ROW_BYTES == 0 for width in (outputs, inputs))
    if not known or not whole:
        return "loop"
    return "grouped_mm" if device == "cuda" or outputs * inputs <= SMALL_ON_CPU else "loop"


def grouped_linear(x_NI: torch.Tensor, weight_EOI: torch.Tensor, runs: Runs, form: Form | None = None) -> torch.Tensor:
    """[N, I] -> [N, O], each row by its expert's weight; differentiable.

    ``form`` is ``product_form``'s unless named. A weight to which Megatron's DDP gave a ``main_grad`` gets its gradient
    added to that, in the dtype in which gradients are accumulated.
    """
    _, outputs, inputs = weight_EOI.shape
    form = form or product_form(outputs, inputs, weight_EOI.dtype, weight_EOI.device.type)
    y_NO: torch.Tensor = _GroupedLinear.apply(x_NI, weight_EOI, runs, form)
    return y_NO


class _GroupedLinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x_NI: torch.Tensor, weight_EOI: torch.Tensor, runs: Runs, form: Form) -> torch.Tensor:
        ctx.save_for_backward(x_NI if ctx.needs_input_grad[1] else None, weight_EOI)  # a frozen weight needs no rows
        ctx.runs, ctx.form = runs, form
        return _PRODUCTS[form](x_NI, weight_EOI.transpose(1, 2), runs)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        x_NI, weight_EOI = ctx.saved_tensors
        dy_NO = grads[0].contiguous()
        dx_NI = _PRODUCTS[ctx.form](dy_NO, weight_EOI, ctx.runs) if ctx.needs_input_grad[0] else None
        if not ctx.needs_input_grad[1]:
            return dx_NI, None, None, None
        total, returned = where_gradients_add(weight_EOI), None
        if total is None:
            total = returned = torch.zeros_like(weight_EOI)
        _ADD_OUTER[ctx.form](total, dy_NO, x_NI, ctx.runs)
        if returned is None:
            gradient_was_added(weight_EOI)
        return dx_NI, returned, None, None


def _loop(rows_NA: torch.Tensor, weight_EAB: torch.Tensor, runs: Runs) -> torch.Tensor:
    out = rows_NA.new_empty(len(rows_NA), weight_EAB.shape[2])
    for rows, weight_AB in _with_rows(runs, weight_EAB):
        torch.mm(rows_NA[rows], weight_AB, out=out[rows])
    return out


def _grouped(rows_NA: torch.Tensor, weight_EAB: torch.Tensor, runs: Runs) -> torch.Tensor:
    if not len(rows_NA):  # a gradient of no rows may have strides that it refuses
        return rows_NA.new_empty(0, weight_EAB.shape[2])
    return F.grouped_mm(rows_NA, weight_EAB, offs=runs.ends_E)


def _loop_add_outer(total_EOI: torch.Tensor, dy_NO: torch.Tensor, x_NI: torch.Tensor, runs: Runs) -> None:
    for rows, total_OI in _with_rows(runs, total_EOI):
        if total_OI.dtype == dy_NO.dtype:
            total_OI.addmm_(dy_NO[rows].t(), x_NI[rows])
        else:
            total_OI += dy_NO[rows].t() @ x_NI[rows]


def _grouped_add_outer(total_EOI: torch.Tensor, dy_NO: torch.Tensor, x_NI: torch.Tensor, runs: Runs) -> None:
    if len(x_NI):
        total_EOI += F.grouped_mm(dy_NO.t(), x_NI, offs=runs.ends_E)


def _with_rows(runs: Runs, per_expert: torch.Tensor) -> Iterator[tuple[slice, torch.Tensor]]:
    """(rows, the expert's part) of each expert that has rows."""
    return ((rows, part) for rows, part in zip(runs.slices, per_expert, strict=True) if rows.stop > rows.start)


_PRODUCTS = {"loop": _loop, "grouped_mm": _grouped}
_ADD_OUTER = {"loop": _loop_add_outer, "grouped_mm": _grouped_add_outer}
