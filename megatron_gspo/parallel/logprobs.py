"""Vocabulary-parallel logprobs and entropy, fused with the output layer, a tile of logits at a time.

The logits of a whole batch never exist, and neither do those of a whole chunk of tokens: at any time there is one tile
[chunk, COLUMNS] of them, small enough for a cache, so that what is done to it costs little beside the matrix products;
on a GPU in a half type there is not even that (``kernels.head`` has both forms). Logits are float32 or better.
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
from typing import Any

import torch
import torch.distributed as dist

from megatron_gspo.kernels.head import head_shard
from megatron_gspo.kernels.products import add_product
from megatron_gspo.parallel.gradients import gradient_was_added, where_gradients_add


def vocab_parallel_logprobs(
    hidden_TH: torch.Tensor,
    weight_VH: torch.Tensor,
    labels_T: torch.Tensor,
    *,
    group: dist.ProcessGroup,
    vocab_size: int,
    temperature: float,
    chunk: int,
    kernel: str = "tiles",
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
        kernel: "tiles" of logits in torch, or "triton" on CUDA, where no logit is written (not run on a GPU yet).

    Returns:
        (logprobs [T / n], entropy [T / n] without gradient), float32, or float64 for a float64 model. The logprob of a
        label outside the vocabulary is NaN, which stops a step: no rank holds its logit.
    """
    return _VocabParallelLogprobs.apply(hidden_TH, weight_VH, labels_T, group, vocab_size, temperature, chunk, kernel)


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
        kernel: str,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        ranks, rank, rows = group.size(), group.rank(), hidden_TH.shape[0]
        first = rank * weight_VH.shape[0]
        valid = max(0, min(weight_VH.shape[0], vocab_size - first))
        chunk = min(max(1, chunk // ranks), rows)  # from here on, of each rank's tokens
        shard = head_shard(kernel, weight_VH[:valid], first, temperature, ranks * chunk)
        labels = labels_T.view(ranks, rows)
        lse = hidden_TH.new_empty(ranks, rows, dtype=shard.dtype)
        logprobs, entropy = (hidden_TH.new_empty(rows, dtype=shard.dtype) for _ in range(2))
        for start in range(0, rows, chunk):
            own = slice(start, start + chunk)
            sums = shard.sums(_gather(hidden_TH[own], group), labels[:, own].reshape(-1))
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
        ctx.settings = (group, first, valid, temperature, chunk, kernel)
        ctx.mark_non_differentiable(entropy)
        return logprobs, entropy

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        hidden_TH, weight_VH, labels_T, lse = ctx.saved_tensors
        group, first, valid, temperature, chunk, kernel = ctx.settings
        ranks, rows = group.size(), hidden_TH.shape[0]
        shard = head_shard(kernel, weight_VH[:valid], first, temperature, ranks * chunk)
        grad_logprobs, labels = grads[0].contiguous(), labels_T.view(ranks, rows)
        grad_hidden = torch.empty_like(hidden_TH)
        grad_weight, returned = _weight_gradient(weight_VH) if ctx.needs_input_grad[1] else (None, None)
        for start in range(0, rows, chunk):
            own = slice(start, start + chunk)
            h, g = _gather(hidden_TH[own], group), _gather(grad_logprobs[own], group) / temperature
            lse_c, labels_c = lse[:, own].reshape(-1), labels[:, own].reshape(-1)
            gradients = shard.gradients(h, labels_c, lse_c, g)
            grad_hidden[own] = _reduce_scatter(_through_logits(gradients, h, lse.dtype, grad_weight), group)
        if grad_weight is not None and returned is None:
            gradient_was_added(weight_VH)
        grad_weight = None if returned is None else returned.to(weight_VH.dtype)
        return grad_hidden, grad_weight, None, None, None, None, None, None


def _through_logits(
    gradients: Iterator[tuple[slice, torch.Tensor, torch.Tensor]],
    h: torch.Tensor,
    dtype: torch.dtype,
    grad_weight: torch.Tensor | None,
) -> torch.Tensor:
    """dh = dz W in ``dtype``, of a chunk's gradients of logits; adds dz^T h to ``grad_weight`` where there is one.

    A function of its own, so that a chunk's tile is let go before the next one's is made.
    """
    dh = torch.zeros_like(h, dtype=dtype)
    for columns, weight, dz in gradients:
        add_product(dh, dz, weight)
        if grad_weight is not None:
            add_product(grad_weight[columns], dz.t(), h)
    return dh


def _weight_gradient(weight_VH: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None]:
    """(where to add the head's gradient, what backward returns for it: nothing of one that is added)."""
    added = where_gradients_add(weight_VH)
    if added is not None:
        return added, None
    grad = torch.zeros_like(weight_VH, dtype=torch.promote_types(weight_VH.dtype, torch.float32))
    return grad, grad


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
