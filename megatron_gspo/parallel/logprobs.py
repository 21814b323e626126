"""Vocabulary-parallel logprobs and entropy, fused with the output layer, a chunk of tokens at a time.

The logits of a whole batch never exist. Notation for one chunk: n tensor ranks; h [n*c, H] the chunk's hidden states,
gathered from the ranks' sequence-parallel slices; W_r [V_r, H] rank r's rows of the head, of which only those below
``vocab_size`` take part; z = h W^T / temperature; l the label.

    forward     logprob = z_l - lse,    lse = log sum_v exp z_v,    entropy = lse - sum_v softmax(z)_v z_v

Each rank computes its columns of z. Their maximum m is all-reduced over the tensor ranks, then three sums over columns
(of exp(z - m), of exp(z - m) (z - m), of z - m at the label), so the result is complete everywhere; each rank keeps its
own slice of tokens. Both outputs are formed relative to m: lse, of the size of the logits, would round them.

    backward    dz_v = g (1[v = l] - softmax(z)_v),    dh = dz W / temperature,    dW = dz^T h / temperature

g is the gradient of one token's logprob, and it lives on the one rank that kept the token. But *every* vocabulary
shard W_r needs every token's g. So the backward of "keep the own slice" is an all-gather of g over the tensor ranks
(a local slice leaves all but 1/n of the head's gradient out), done chunk by chunk when g is needed. dh is a partial
sum over vocabulary shards on each rank: its reduce-scatter completes it and returns each rank's slice. dW is complete
on its rank. z is computed again in backward from h and the stored lse.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist


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
        weight_VH: [V_padded / n, H] this tensor rank's rows of the output layer.
        labels_T: [T] int64 in [0, vocab_size), the same on every tensor rank: the whole micro-batch's labels, or those
            of this context rank's share of it (T then counts that share).
        group: the n tensor ranks. T is a multiple of n.
        vocab_size: rows of the Hugging Face embedding; rows at or above it take no probability.
        temperature: logits are divided by it, as the engine does.
        chunk: tokens, over all tensor ranks, whose logits exist at one time.

    Returns:
        (logprobs [T / n], entropy [T / n] without gradient), float32, or float64 for a float64 model.
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
        ranks, rank = group.size(), group.rank()
        rows = hidden_TH.shape[0]
        first = rank * weight_VH.shape[0]
        valid = max(0, min(weight_VH.shape[0], vocab_size - first))
        dtype = _accumulation_dtype(hidden_TH)
        labels = labels_T.view(ranks, rows)
        lse = hidden_TH.new_empty(ranks, rows, dtype=dtype)
        logprobs, entropy = (hidden_TH.new_empty(rows, dtype=dtype) for _ in range(2))
        for start, stop in _chunks(rows, chunk // ranks):
            h = _gather(hidden_TH[start:stop], group)
            z = _logits(h, weight_VH[:valid], temperature, dtype)
            maximum = z.amax(dim=1) if valid else z.new_full((len(h),), -torch.inf)
            _all_reduce(maximum, group, dist.ReduceOp.MAX)
            z -= maximum[:, None]
            exp = z.exp()
            local, here = _local_labels(labels[:, start:stop].reshape(-1), first, valid)
            target = z.gather(1, local[:, None])[:, 0].where(here, 0) if valid else torch.zeros_like(maximum)
            sums = torch.stack([exp.sum(dim=1), (exp * z).sum(dim=1), target])
            _all_reduce(sums, group, dist.ReduceOp.SUM)
            log_sum = sums[0].log()
            lse[:, start:stop] = (maximum + log_sum).view(ranks, -1)
            logprobs[start:stop] = (sums[2] - log_sum).view(ranks, -1)[rank]
            entropy[start:stop] = (log_sum - sums[1] / sums[0]).view(ranks, -1)[rank]
        ctx.save_for_backward(hidden_TH, weight_VH, labels_T, lse)
        ctx.settings = (group, first, valid, temperature, chunk)
        ctx.mark_non_differentiable(entropy)
        return logprobs, entropy

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        hidden_TH, weight_VH, labels_T, lse = ctx.saved_tensors
        group, first, valid, temperature, chunk = ctx.settings
        ranks, rows = group.size(), hidden_TH.shape[0]
        grad_logprobs = grads[0].contiguous()
        labels = labels_T.view(ranks, rows)
        grad_hidden = torch.empty_like(hidden_TH)
        grad_weight = torch.zeros_like(weight_VH, dtype=lse.dtype)
        for start, stop in _chunks(rows, chunk // ranks):
            h = _gather(hidden_TH[start:stop], group)
            g = _gather(grad_logprobs[start:stop], group) / temperature
            softmax = (_logits(h, weight_VH[:valid], temperature, lse.dtype) - lse[:, start:stop].reshape(-1, 1)).exp()
            local, here = _local_labels(labels[:, start:stop].reshape(-1), first, valid)
            dz = softmax.mul_(-g[:, None])
            if valid:
                dz.scatter_add_(1, local[:, None], g.where(here, 0)[:, None])
            dz = dz.to(weight_VH.dtype)
            grad_hidden[start:stop] = _reduce_scatter(dz @ weight_VH[:valid], group)
            grad_weight[:valid] += dz.t() @ h
        return grad_hidden, grad_weight.to(weight_VH.dtype), None, None, None, None, None


def _accumulation_dtype(tensor: torch.Tensor) -> torch.dtype:
    return torch.float64 if tensor.dtype == torch.float64 else torch.float32


def _chunks(rows: int, size: int) -> list[tuple[int, int]]:
    size = max(1, size)
    return [(start, min(start + size, rows)) for start in range(0, rows, size)]


def _logits(h: torch.Tensor, weight: torch.Tensor, temperature: float, dtype: torch.dtype) -> torch.Tensor:
    """The product in the model's dtype, as the engine computes it; what follows in ``dtype``."""
    return (h @ weight.t()).to(dtype) / temperature


def _local_labels(labels: torch.Tensor, first: int, valid: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Labels as columns of this shard (clamped into it), and whether each is in the shard at all."""
    local = labels - first
    here = (local >= 0) & (local < valid)
    return local.where(here, 0), here


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


def _all_reduce(tensor: torch.Tensor, group: dist.ProcessGroup, op: dist.ReduceOp.RedOpType) -> None:
    if group.size() > 1:
        dist.all_reduce(tensor, op=op, group=group)
