"""Tokens to the experts that they chose, and back: permutation, all-to-all, and the sum of what comes back.

Notation of one rank: T tokens that chose K of E experts each; n ranks that the experts lie on, of which s share each
expert (expert-tensor ranks), so that e = E s / n experts are local. A *row* is one token on its way to one rank for one
expert: a token has F = K s of them. With P the matrix [rows of all experts, tokens] of zeros and ones that says which
token a row is of,

    to the experts      x -> P x         rows copied, sent, and put in the order of experts
    back from them      y -> P^T y       rows put back, sent, and the F of a token added up

so each of the two is the other's backward, and one function each serves forward and backward. Under expert-tensor
parallelism a row comes back from each of the s ranks with a partial sum over its part of the expert's hidden
dimension; P^T adds these up as well, which is what a reduce-scatter would do.

The F rows of a token are added in float32 or better, in the order of experts, whatever the model's dtype: the sum of
eight bfloat16 numbers depends on its order in the third digit, and atomic additions have no order. So the same weights
and tokens give the same bits in every pass, and pi_old is what training starts from.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F


@dataclass(frozen=True)
class Dispatch:
    """Which row is of which token, and which rank it goes to; made once a layer and pass, by ``plan_dispatch``.

    Two tokens with experts [0, 1] and [1, 2], one rank: ``experts_TK`` = [[0, 1], [1, 2]], rows in the order of experts
    are of ``token_R`` = [0, 0, 1, 1], ``rows_TF`` = [[0, 1], [2, 3]], ``counts_e`` = [1, 2, 1].
    """

    experts_TK: torch.Tensor
    """[T, K] int64, ascending."""
    token_R: torch.Tensor
    """[R] int64: the token of each row that this rank sends."""
    choice_R: torch.Tensor
    """[R] int64: which of the T K choices it is."""
    rows_TF: torch.Tensor
    """[T, F] int64: the rows of each token."""
    counts_e: torch.Tensor
    """[e] int64: rows that each local expert gets."""
    group: dist.ProcessGroup
    """The n ranks: expert ranks, and within each the s that share its experts."""
    sent: list[int] | None = None
    """Rows for each rank of the group; None where it is one."""
    received: list[int] | None = None
    """Rows from each of them."""
    order_N: torch.Tensor | None = None
    """[N] int64: the received row that stands at each place of the experts' order; None where it is that order."""
    place_N: torch.Tensor | None = None
    """[N] int64: its inverse."""


@torch.no_grad()
def plan_dispatch(chosen_TE: torch.Tensor, top_k: int, group: dist.ProcessGroup, shards: int) -> Dispatch:
    """The dispatch of a layer's tokens. Collective over ``group``.

    Args:
        chosen_TE: [T, E] bool, ``top_k`` of them true for each token.
        group: all ranks of the experts, n of them.
        shards: s, ranks that share each expert; they are neighbours in ``group``.
    """
    tokens, experts = chosen_TE.shape
    choices = tokens * top_k
    # ``nonzero`` would ask the device how many there are; here they are known.
    experts_TK = torch.nonzero_static(chosen_TE, size=choices)[:, 1].view(tokens, top_k)
    counts_E = chosen_TE.sum(dim=0)
    owners = group.size() // shards
    rows_TK = _inverse(experts_TK.flatten().argsort(stable=True)).view(tokens, top_k)
    rows_TF = _rows_of_shards(rows_TK, experts_TK, counts_E, owners, shards)
    choice_R = _inverse(rows_TF.flatten()) // shards
    common = (experts_TK, choice_R // top_k, choice_R, rows_TF)
    if group.size() == 1:
        return Dispatch(*common, counts_E, group)
    counts_nE = counts_E.new_empty(group.size() * experts)
    dist.all_gather_into_tensor(counts_nE, counts_E, group=group)
    counts_nE = counts_nE.view(-1, experts)
    owner, local = group.rank() // shards, experts // owners
    counts_ne = counts_nE[:, owner * local : (owner + 1) * local]
    received, sent = exchange_sizes(counts_ne.sum(dim=1), counts_E.view(owners, local).sum(dim=1), choices)
    order = _experts_order(counts_ne, sum(received)) if local > 1 else None
    return Dispatch(
        *common,
        counts_ne.sum(dim=0),
        group,
        sent=[rows for rows in sent for _ in range(shards)],
        received=received,
        order_N=order,
        place_N=None if order is None else _inverse(order),
    )


def to_experts(x_TH: torch.Tensor, plan: Dispatch) -> torch.Tensor:
    """[T, H] -> [N, H]: the rows of this rank's experts, one expert after the other; differentiable. Collective."""
    rows: torch.Tensor = _Dispatched.apply(x_TH, plan, _spread, _collect)
    return rows


def from_experts(y_NH: torch.Tensor, plan: Dispatch) -> torch.Tensor:
    """[N, H] -> [T, H]: the sum of each token's rows; differentiable. Collective."""
    tokens: torch.Tensor = _Dispatched.apply(y_NH, plan, _collect, _spread)
    return tokens


def probs_to_experts(probs_TE: torch.Tensor, plan: Dispatch) -> torch.Tensor:
    """[T, E] -> [N]: the weight of each of this rank's experts' rows; differentiable. Collective."""
    chosen_TK = probs_TE.gather(1, plan.experts_TK)
    rows: torch.Tensor = _Dispatched.apply(chosen_TK.reshape(-1, 1), plan, _spread_choices, _collect_choices)
    return rows[:, 0]


class _Dispatched(torch.autograd.Function):
    """A linear map and, for backward, its transpose."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, plan: Dispatch, there: Any, back: Any) -> torch.Tensor:
        ctx.plan, ctx.back = plan, back
        return there(x, plan)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor, None, None, None]:
        return ctx.back(grads[0].contiguous(), ctx.plan), None, None, None


def _spread(x_TH: torch.Tensor, plan: Dispatch) -> torch.Tensor:
    return _sent(x_TH.index_select(0, plan.token_R), plan)


def _collect(y_NH: torch.Tensor, plan: Dispatch) -> torch.Tensor:
    return ordered_sum(_returned(y_NH, plan), plan.rows_TF)


def _spread_choices(probs_C1: torch.Tensor, plan: Dispatch) -> torch.Tensor:
    return _sent(probs_C1.index_select(0, plan.choice_R), plan)


def _collect_choices(rows_N1: torch.Tensor, plan: Dispatch) -> torch.Tensor:
    return ordered_sum(_returned(rows_N1, plan), plan.rows_TF.view(plan.experts_TK.numel(), -1))


def _sent(rows_RH: torch.Tensor, plan: Dispatch) -> torch.Tensor:
    """[R, H] in the order of ranks -> [N, H] in the order of this rank's experts."""
    if plan.sent is None or plan.received is None:
        return rows_RH
    received = rows_RH.new_empty(sum(plan.received), rows_RH.shape[1])
    dist.all_to_all_single(received, rows_RH, plan.received, plan.sent, group=plan.group)
    return received if plan.order_N is None else received.index_select(0, plan.order_N)


def _returned(rows_NH: torch.Tensor, plan: Dispatch) -> torch.Tensor:
    """The way back: the transpose of ``_sent``, which is its inverse."""
    if plan.sent is None or plan.received is None:
        return rows_NH
    rows_NH = rows_NH if plan.place_N is None else rows_NH.index_select(0, plan.place_N)
    returned = rows_NH.new_empty(sum(plan.sent), rows_NH.shape[1])
    dist.all_to_all_single(returned, rows_NH.contiguous(), plan.sent, plan.received, group=plan.group)
    return returned


def ordered_sum(rows_RH: torch.Tensor, rows_TF: torch.Tensor) -> torch.Tensor:
    """[T, H]: the rows ``rows_TF`` [T, F] of ``rows_RH`` [R, H], added from left to right.

    A bag of embeddings is that sum, without the [T, F, H] in between. Its CUDA kernel adds half types in float32; the
    CPU's does not, and gets float32 rows.
    """
    narrow = rows_RH.dtype in (torch.bfloat16, torch.float16) and rows_RH.device.type == "cpu"
    return F.embedding_bag(rows_TF, rows_RH.float() if narrow else rows_RH, mode="sum").to(rows_RH.dtype)


def _rows_of_shards(
    rows_TK: torch.Tensor, experts_TK: torch.Tensor, counts_E: torch.Tensor, owners: int, shards: int
) -> torch.Tensor:
    """[T, F]: the rows of each token where each owner's rows are sent to all its shards, one after the other.

    ``rows_TK``: where they would be with one shard.
    """
    counts_o = counts_E.view(owners, -1).sum(dim=1)
    owner_TK = experts_TK // (len(counts_E) // owners)
    first_TK = (counts_o.cumsum(0) - counts_o)[owner_TK]
    shard = torch.arange(shards, device=rows_TK.device)
    rows_TKs = (rows_TK + (shards - 1) * first_TK)[..., None] + shard * counts_o[owner_TK][..., None]
    return rows_TKs.flatten(1)


def _experts_order(counts_ne: torch.Tensor, rows: int) -> torch.Tensor:
    """[rows]: rows that came rank by rank, experts in order within each, as indices in the order of experts."""
    by_rank, by_expert = counts_ne.flatten(), counts_ne.T.flatten()
    first_by_rank = (by_rank.cumsum(0) - by_rank).view(counts_ne.shape).T.flatten()
    shift = first_by_rank - (by_expert.cumsum(0) - by_expert)
    return torch.arange(rows, device=counts_ne.device) + shift.repeat_interleave(by_expert, output_size=rows)


def _inverse(permutation: torch.Tensor) -> torch.Tensor:
    count = torch.arange(len(permutation), device=permutation.device)
    return torch.empty_like(permutation).scatter_(0, permutation, count)


def exchange_sizes(from_n: torch.Tensor, to_o: torch.Tensor, choices: int) -> tuple[list[int], list[int]]:
    """Rows from each rank and rows for each owner, ``choices`` of them, as the all-to-all wants them: on the host.

    The one wait for the device in a layer. A dry run, whose counts have no values, puts balanced ones in its place.
    """
    received, sent = (part.tolist() for part in torch.cat([from_n, to_o]).cpu().split([len(from_n), len(to_o)]))
    assert sum(sent) == choices, f"{sum(sent)} rows to send of {choices} choices"
    return received, sent
