"""Causal attention of packed sequences, naively in float64, and by a kernel of the product as context ranks would."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch

Arrays = dict[str, np.ndarray]
LENGTHS = (5, 1, 64, 5, 33, 20)  # two alike, one of a single token, one that fills a tile of the kernels
HEADS, GROUPS, WIDTH = 4, 2, 16


def padded(context: int) -> list[int]:
    """LENGTHS as ``context`` ranks need them."""
    multiple = 1 if context == 1 else 2 * context
    return [-(-length // multiple) * multiple for length in LENGTHS]


def attention_inputs(dtype: torch.dtype, lengths: Sequence[int] = LENGTHS) -> list[torch.Tensor]:
    """query [T, heads, d], key and value [T, groups, d], and the gradient [T, heads * d] that arrives."""
    generator = torch.Generator().manual_seed(0)
    shapes = ((HEADS, WIDTH), (GROUPS, WIDTH), (GROUPS, WIDTH), (HEADS * WIDTH,))
    return [torch.randn(sum(lengths), *shape, generator=generator, dtype=torch.float64).to(dtype) for shape in shapes]


def results(output: torch.Tensor, grad: torch.Tensor, inputs: dict[str, torch.Tensor]) -> Arrays:
    """The output and, after backward, the gradients of the named inputs, as float64 arrays."""
    gradients = torch.autograd.grad(output, list(inputs.values()), grad)
    named = {"output": output.detach()} | {f"d {name}": g for name, g in zip(inputs, gradients, strict=True)}
    return {name: value.double().cpu().numpy() for name, value in named.items()}


def naive_attention(dtype: torch.dtype, lengths: Sequence[int] = LENGTHS) -> Arrays:
    """Head by head and row by row: softmax(q k / sqrt(d)) v over what a token may see."""
    query, key, value, grad = (tensor.double() for tensor in attention_inputs(dtype, lengths))
    inputs = {"query": query.requires_grad_(), "key": key.requires_grad_(), "value": value.requires_grad_()}
    rows, start = [], 0
    for length in lengths:
        for t in range(start, start + length):
            for h in range(HEADS):
                seen, g = slice(start, t + 1), h * GROUPS // HEADS
                scores = torch.softmax(key[seen, g] @ query[t, h] / WIDTH**0.5, dim=0)
                rows.append(scores @ value[seen, g])
        start += length
    return results(torch.stack(rows).reshape(len(grad), -1), grad, inputs)


def attention_of_ranks(kernel: Callable[..., Any], dtype: torch.dtype, context: int, device: str = "cpu") -> Arrays:
    """The kernel as each of ``context`` ranks calls it, in one process, put back in order.

    The gathered keys and values are the ranks' rows end to end, so autograd sums the ranks' parts of a gradient as the
    reduce-scatter of ``parallel.context`` does.
    """
    from megatron_gspo.batching.packing import unshard_tokens, zigzag_positions
    from megatron_gspo.megatron.attention import query_runs
    from megatron_gspo.types import Shard

    lengths = padded(context)
    cu_seqlens = torch.tensor([0, *np.cumsum(lengths).tolist()], dtype=torch.int32)
    query, key, value, grad = (tensor.to(device) for tensor in attention_inputs(dtype, lengths))
    inputs = {"query": query.requires_grad_(), "key": key.requires_grad_(), "value": value.requires_grad_()}
    held = [zigzag_positions(cu_seqlens, context, rank).to(device) for rank in range(context)]
    gathered = torch.cat(held)
    outputs = []
    for rank in range(context):
        attend = kernel(query_runs(cu_seqlens, context, rank), torch.device(device))
        outputs.append(attend(query[held[rank]], key[gathered], value[gathered], None).flatten(1))
    return results(unshard_tokens(outputs, cu_seqlens, Shard(context_size=context)), grad, inputs)
