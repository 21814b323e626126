"""Differentiable collectives of a layer: gathering keys and values over context ranks, and sums over tensor ranks.

``gather_rows`` gives every context rank what it needs of every other: keys and values, by all-gather.

With x_r the rows of context rank r of n, and L the loss that every rank computes,

    forward     y = [x_0; x_1; ...; x_(n-1)]                  on every rank
    backward    dL/dx_r = sum over ranks q of (dL/dy on q)_r   reduce-scatter

Each rank's queries attend to all of y, so each rank knows only the part of dL/dy that its own queries gave: the parts
are summed, and each rank keeps its own rows. A local slice in place of the sum would leave out what other ranks'
queries say of this rank's keys; logprobs and loss stay right, and only gradients show it.

``sum_over`` is the same for a sum that every rank goes on with by itself, y = sum over q of x_q: each rank knows the
part of dL/dy that its own heads gave, so dL/dx_r is the sum of all ranks' dL/dy.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist


def gather_rows(rows: torch.Tensor, group: dist.ProcessGroup) -> torch.Tensor:
    """[T / n, ...] on each rank of the group -> [T, ...] on all of them, in rank order; differentiable."""
    return rows if group.size() == 1 else _GatherRows.apply(rows, group)


class _GatherRows(torch.autograd.Function):
    """All-gather forward, reduce-scatter backward."""

    @staticmethod
    def forward(ctx: Any, rows: torch.Tensor, group: dist.ProcessGroup) -> torch.Tensor:
        ctx.group = group
        whole = rows.new_empty(group.size() * rows.shape[0], *rows.shape[1:])
        dist.all_gather_into_tensor(whole, rows.contiguous(), group=group)
        return whole

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor, None]:
        whole = grads[0].contiguous()
        own = whole.new_empty(whole.shape[0] // ctx.group.size(), *whole.shape[1:])
        dist.reduce_scatter_tensor(own, whole, group=ctx.group)
        return own, None


def scatter_sum(rows: torch.Tensor, group: dist.ProcessGroup) -> torch.Tensor:
    """[T, ...], a part of a sum on each of n ranks -> [T / n, ...], each rank's own rows of the sum: the transpose of
    ``gather_rows``; differentiable."""
    return rows if group.size() == 1 else _ScatterSum.apply(rows, group)


class _ScatterSum(torch.autograd.Function):
    """Reduce-scatter forward, all-gather backward."""

    @staticmethod
    def forward(ctx: Any, rows: torch.Tensor, group: dist.ProcessGroup) -> torch.Tensor:
        ctx.group = group
        own = rows.new_empty(rows.shape[0] // group.size(), *rows.shape[1:])
        dist.reduce_scatter_tensor(own, rows.contiguous(), group=group)
        return own

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor, None]:
        own = grads[0].contiguous()
        whole = own.new_empty(ctx.group.size() * own.shape[0], *own.shape[1:])
        dist.all_gather_into_tensor(whole, own, group=ctx.group)
        return whole, None


def sum_over(x: torch.Tensor, group: dist.ProcessGroup) -> torch.Tensor:
    """The sum of every rank's ``x``, on each of them; differentiable."""
    return x if group.size() == 1 else _SumOver.apply(x, group)


class _SumOver(torch.autograd.Function):
    """All-reduce forward, all-reduce backward."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, group: dist.ProcessGroup) -> torch.Tensor:
        ctx.group = group
        total = x.clone(memory_format=torch.contiguous_format)
        dist.all_reduce(total, group=group)
        return total

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor, None]:
        total = grads[0].clone(memory_format=torch.contiguous_format)
        dist.all_reduce(total, group=ctx.group)
        return total, None
