"""Vocabulary-parallel logprobs and entropy, fused with the output layer, a tile of logits at a time.

The logits of a whole batch never exist, and neither do those of a whole chunk of tokens: at any time there is one tile
[chunk, COLUMNS] of them, small enough for a cache, so that what is done to it costs little beside the matrix products.
Notation for one chunk: n tensor ranks; h [n*c, H] the chunk's hidden states, gathered from the ranks'
sequence-parallel slices; W_r [V_r, H] rank r's rows of the head, of which only those below ``vocab_size`` take part;
z = h W^T / temperature; l the label.

    forward     logprob = z_l - lse,    lse = log sum_v exp z_v,    entropy = lse - sum_v softmax(z)_v z_v

Each rank goes over its columns of z and keeps, per token, their maximum m so far and the sums of exp(z - m) and of
exp(z - m) (z - m), which move with m (online softmax: Milakov and Gimelshein 2018). Then m is all-reduced over the
tensor ranks, and the sums, moved to it, with it: the result is complete everywhere, and each rank keeps its own slice
of tokens. Both outputs are formed relative to m: lse, of the size of the logits, would round them.

    backward    dz_v = g (1[v = l] - softmax(z)_v),    dh = dz W / temperature,    dW = dz^T h / temperature

g is the gradient of one token's logprob, and it lives on the one rank that kept the token. But *every* vocabulary
shard W_r needs every token's g. So the backward of "keep the own slice" is an all-gather of g over the tensor ranks
(a local slice leaves all but 1/n of the head's gradient out), done chunk by chunk when g is needed. dh is a partial
sum over vocabulary shards on each rank: its reduce-scatter completes it and returns each rank's slice. dW is complete
on its rank. z is computed again in backward from h and the stored lse.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist

COLUMNS = 8192
"""Vocabulary rows of a tile. Wide enough for the matrix products to run at full speed."""


def vocab_parallel_logprobs(
    hidden_TH: torch.Tensor,
    weight_VH: torch.Tensor,
    labels_T: torch.Tensor,
    *,
    group: dist.ProcessGroup,
    vocab_size: int,
    temperature: float,
    chunk: int,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Logprobs of the labels and entropies, for this rank's slice of tokens.

    Args:
        hidden_TH: [T / n, H] this tensor rank's slice of the hidden states after the final norm.
        weight_VH: [V_padded / n, H] this tensor rank's rows of the output layer. If Megatron's DDP gave it a
            ``main_grad`` of the accumulation dtype, backward adds to that in place, as Megatron's own fused layers do:
            no gradient of the head's size is made, and none is rounded to the model's dtype.
        labels_T: [T] int64 in [0, vocab_size), the same on every tensor rank: the whole micro-batch's labels, or those
            of this context rank's share of it (T then counts that share).
        group: the n tensor ranks. T is a multiple of n.
        vocab_size: rows of the Hugging Face embedding; rows at or above it take no probability.
        temperature: logits are divided by it, as the engine does.
        chunk: tokens, over all tensor ranks, that are worked on at one time; memory is two tiles [chunk, COLUMNS].

    Returns:
        (logprobs [T / n], entropy [T / n] without gradient), float32, or float64 for a float64 model. The logprob of a
        label outside the vocabulary is NaN, which stops a step: no rank holds its logit.
    """
    return _VocabParallelLogprobs.apply(hidden_TH, weight_VH, labels_T, group, vocab_size, temperature, chunk)


class _VocabParallelLogprobs(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden_TH: torch.Tensor,
        weight_VH: torch.Tensor,
        labels_T: torch.Tensor,
        group: dist.ProcessGroup,
        vocab_size: int,
        temperature: float,
        chunk: int,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        ranks, rank, rows = group.size(), group.rank(), hidden_TH.shape[0]
        first = rank * weight_VH.shape[0]
        valid = max(0, min(weight_VH.shape[0], vocab_size - first))
        chunk = min(max(1, chunk // ranks), rows)  # from here on, of each rank's tokens
        tiles = _Tiles(weight_VH[:valid], first, temperature, ranks * chunk)
        labels = labels_T.view(ranks, rows)
        lse = hidden_TH.new_empty(ranks, rows, dtype=tiles.dtype)
        logprobs, entropy = (hidden_TH.new_empty(rows, dtype=tiles.dtype) for _ in range(2))
        for start in range(0, rows, chunk):
            own = slice(start, start + chunk)
            sums = _local_sums(tiles, _gather(hidden_TH[own], group), labels[:, own].reshape(-1))
            maximum = sums.maximum.clone()
            _all_reduce(maximum, group, dist.ReduceOp.MAX)
            sums.move_to(maximum)
            exp, weighted, target = _all_reduce(sums.stacked(), group, dist.ReduceOp.SUM)
            log_sum = exp.log()
            lse[:, own] = (maximum + log_sum).view(ranks, -1)
            label = labels[rank, own]
            known = (label >= 0) & (label < vocab_size)
            logprobs[own] = (target - log_sum).view(ranks, -1)[rank].where(known, torch.nan)
            entropy[own] = (log_sum - weighted / exp).view(ranks, -1)[rank]
        ctx.save_for_backward(hidden_TH, weight_VH, labels_T, lse)
        ctx.settings = (group, first, valid, temperature, chunk)
        ctx.mark_non_differentiable(entropy)
        return logprobs, entropy

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        hidden_TH, weight_VH, labels_T, lse = ctx.saved_tensors
        group, first, valid, temperature, chunk = ctx.settings
        ranks, rows = group.size(), hidden_TH.shape[0]
        tiles = _Tiles(weight_VH[:valid], first, temperature, ranks * chunk)
        grad_logprobs, labels = grads[0].contiguous(), labels_T.view(ranks, rows)
        grad_hidden = torch.empty_like(hidden_TH)
        grad_weight, returned = _weight_gradient(weight_VH, lse.dtype)
        for start in range(0, rows, chunk):
            own = slice(start, start + chunk)
            h, g = _gather(hidden_TH[own], group), _gather(grad_logprobs[own], group) / temperature
            lse_c, labels_c = lse[:, own].reshape(-1), labels[:, own].reshape(-1)
            dh = torch.zeros_like(h, dtype=lse.dtype)
            for columns, weight, z in tiles.logits(h):
                softmax = tiles.minus(z, lse_c).exp_()
                local, here = tiles.columns_of(labels_c, columns)
                softmax.scatter_add_(1, local[:, None], -here.to(softmax.dtype)[:, None])
                dz = tiles.times(softmax, -g)
                _add_product(dh, dz, weight)
                _add_product(grad_weight[columns], dz.t(), h)
            grad_hidden[own] = _reduce_scatter(dh, group)
        return grad_hidden, returned.to(weight_VH.dtype), None, None, None, None, None


class _Tiles:
    """This rank's logits, [tokens, COLUMNS] at a time. Each tile lies where the one before it lay."""

    def __init__(self, weight_VH: torch.Tensor, first: int, temperature: float, tokens: int) -> None:
        self.weight_VH, self.first, self.temperature = weight_VH, first, temperature
        self.dtype = torch.float64 if weight_VH.dtype == torch.float64 else torch.float32
        self._size = tokens * min(COLUMNS, len(weight_VH))
        self._product = weight_VH.new_empty(self._size)
        self._wide = self._product if weight_VH.dtype == self.dtype else self.scratch()

    def scratch(self) -> torch.Tensor:
        """Memory for one more tile."""
        return self._product.new_empty(self._size, dtype=self.dtype)

    def logits(self, h: torch.Tensor) -> Iterator[tuple[slice, torch.Tensor, torch.Tensor]]:
        """(columns of this shard, their rows of the head, their logits), each until the next is asked for.

        The product is in the model's dtype, as the engine computes it; what follows is in ``dtype``.
        """
        for start in range(0, len(self.weight_VH), COLUMNS):
            weight = self.weight_VH[start : start + COLUMNS]
            z = torch.mm(h, weight.t(), out=_shaped(self._product, len(h), len(weight)))
            if self.temperature != 1:
                z = _shaped(self._wide, *z.shape).copy_(z).div_(self.temperature)
            yield slice(start, start + len(weight)), weight, z

    def minus(self, z: torch.Tensor, of_token: torch.Tensor) -> torch.Tensor:
        """``z`` less a number a token, in ``dtype``."""
        return torch.sub(z, of_token[:, None], out=_shaped(self._wide, *z.shape))

    def times(self, tile: torch.Tensor, of_token: torch.Tensor) -> torch.Tensor:
        """A tile times a number a token, rounded to the model's dtype."""
        return torch.mul(tile, of_token[:, None], out=_shaped(self._product, *tile.shape))

    def columns_of(self, labels: torch.Tensor, columns: slice) -> tuple[torch.Tensor, torch.Tensor]:
        """Labels as columns of a tile (clamped into it), and whether each is in the tile at all."""
        local = labels - (self.first + columns.start)
        here = (local >= 0) & (local < columns.stop - columns.start)
        return local.where(here, 0), here


@dataclass
class _Sums:
    """Per token, over columns: their maximum, and sums relative to it. One entry a token of the chunk."""

    maximum: torch.Tensor
    exp: torch.Tensor
    """sum exp(z - maximum)"""
    weighted: torch.Tensor
    """sum exp(z - maximum) (z - maximum)"""
    label: torch.Tensor
    """z at the label, for a label among the columns"""
    found: torch.Tensor
    """whether the label is among the columns"""

    def move_to(self, maximum: torch.Tensor) -> None:
        """Makes the sums relative to another maximum, not below the present one."""
        difference = self.maximum - maximum
        scale = difference.exp()
        self.weighted = (self.weighted + difference * self.exp) * scale
        self.exp = self.exp * scale
        self.maximum = maximum

    def stacked(self) -> torch.Tensor:
        """[3, tokens]: what adds up over tensor ranks, the label's logit relative to the maximum."""
        return torch.stack([self.exp, self.weighted, (self.label - self.maximum).where(self.found, 0)])


def _local_sums(tiles: _Tiles, h: torch.Tensor, labels: torch.Tensor) -> _Sums:
    zeros = h.new_zeros(len(h), dtype=tiles.dtype)
    # A finite lowest number: for a rank without columns, -inf would make 0 * inf of sums that are 0.
    lowest = torch.full_like(zeros, torch.finfo(tiles.dtype).min)
    sums = _Sums(lowest, zeros, zeros, zeros, torch.zeros_like(labels, dtype=torch.bool))
    scratch = tiles.scratch()
    for columns, _, z in tiles.logits(h):
        local, here = tiles.columns_of(labels, columns)
        sums.label = z.gather(1, local[:, None])[:, 0].to(tiles.dtype).where(here, sums.label)
        sums.found = sums.found | here
        sums.move_to(torch.maximum(sums.maximum, z.amax(dim=1)))
        z = tiles.minus(z, sums.maximum)
        exp = torch.exp(z, out=_shaped(scratch, *z.shape))
        sums.exp = sums.exp + exp.sum(dim=1)
        sums.weighted = sums.weighted + exp.mul_(z).sum(dim=1)
    return sums


def _weight_gradient(weight_VH: torch.Tensor, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    """(where to add the head's gradient, what backward returns for it).

    ``grad_added_to_main_grad`` tells DDP's hook to throw away what is returned, which is then never written.
    ``zero_out_wgrad`` marks a head that is tied to the embedding of the same stage: the hook gets the sum of both.
    """
    main_grad = getattr(weight_VH, "main_grad", None)
    fused = hasattr(weight_VH, "grad_added_to_main_grad") and not getattr(weight_VH, "zero_out_wgrad", False)
    if main_grad is None or main_grad.dtype != dtype or not fused:
        grad = torch.zeros_like(weight_VH, dtype=dtype)
        return grad, grad
    weight_VH.grad_added_to_main_grad = True  # type: ignore[attr-defined]
    return main_grad, torch.empty_like(weight_VH)


def _add_product(total: torch.Tensor, a: torch.Tensor, b: torch.Tensor) -> None:
    """total += a b. Products are in the model's dtype; their sum over tiles and chunks in ``total``'s."""
    if a.dtype == total.dtype:
        total.addmm_(a, b)
    else:
        total += a @ b


def _shaped(memory: torch.Tensor, *shape: int) -> torch.Tensor:
    return memory[: shape[0] * shape[1]].view(shape)


def _gather(piece: torch.Tensor, group: dist.ProcessGroup) -> torch.Tensor:
    if group.size() == 1:
        return piece
    whole = piece.new_empty(group.size() * piece.shape[0], *piece.shape[1:])
    dist.all_gather_into_tensor(whole, piece.contiguous(), group=group)
    return whole


def _reduce_scatter(whole: torch.Tensor, group: dist.ProcessGroup) -> torch.Tensor:
    if group.size() == 1:
        return whole
    piece = whole.new_empty(whole.shape[0] // group.size(), *whole.shape[1:])
    dist.reduce_scatter_tensor(piece, whole.contiguous(), group=group)
    return piece


def _all_reduce(tensor: torch.Tensor, group: dist.ProcessGroup, op: dist.ReduceOp.RedOpType) -> torch.Tensor:
    if group.size() > 1:
        dist.all_reduce(tensor, op=op, group=group)
    return tensor
