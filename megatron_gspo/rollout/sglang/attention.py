"""Attention of many sequences at a time, in torch: for servers on a CPU.

Loaded by path in a server's process, where this package is not installed: torch is all that it may import.
"""

from __future__ import annotations

from typing import Any

import torch
from torch.nn.functional import scaled_dot_product_attention


def attend_decode(
    query_NHD: torch.Tensor,
    output_NHD: torch.Tensor,
    keys_CHD: torch.Tensor,
    values_CHD: torch.Tensor,
    place_RL: torch.Tensor,
    request_N: torch.Tensor,
    length_N: torch.Tensor,
    **options: Any,
) -> torch.Tensor:
    """Attention of one new token a sequence to the whole sequence, sequences of equal length in one call.

    Args:
        query_NHD: [sequences, heads, dimension]. ``output_NHD``, of the same shape, is filled.
        keys_CHD: [cache rows, key-value heads, dimension]; ``values_CHD`` has the same shape.
        place_RL: [requests, positions], cache rows of each request's tokens.
        request_N: [sequences], the request of each.
        length_N: [sequences], tokens of each, the new one included.
    """
    for length in length_N.unique().tolist():
        rows_G = (length_N == length).nonzero().squeeze(1)
        place_GL = place_RL[request_N[rows_G], :length]
        keys, values = (cache[place_GL].transpose(1, 2).to(query_NHD.dtype) for cache in (keys_CHD, values_CHD))
        out = scaled_dot_product_attention(query_NHD[rows_G].unsqueeze(2), keys, values, **options)
        output_NHD[rows_G] = out.squeeze(2)
    return output_NHD


def attend_extend(
    query_THD: torch.Tensor,
    output_THD: torch.Tensor,
    keys_CHD: torch.Tensor,
    values_CHD: torch.Tensor,
    place_RL: torch.Tensor,
    request_N: torch.Tensor,
    length_N: torch.Tensor,
    prefix_N: torch.Tensor,
    new_N: torch.Tensor,
    **options: Any,
) -> torch.Tensor:
    """Causal attention of the last ``new_N`` tokens of each sequence, which stand one after the other in
    ``query_THD``, sequences of equal prefix and length in one call. Arguments otherwise as in ``attend_decode``."""
    start_N = new_N.cumsum(0) - new_N
    for prefix, new in torch.stack([prefix_N, new_N], dim=1).unique(dim=0).tolist():
        rows_G = ((prefix_N == prefix) & (new_N == new)).nonzero().squeeze(1)
        tokens_GE = start_N[rows_G].unsqueeze(1) + torch.arange(new)
        place_GL = place_RL[request_N[rows_G], : prefix + new]
        keys, values = (cache[place_GL].transpose(1, 2).to(query_THD.dtype) for cache in (keys_CHD, values_CHD))
        query = query_THD.new_zeros(len(rows_G), query_THD.shape[1], prefix + new, query_THD.shape[2])
        query[:, :, prefix:] = query_THD[tokens_GE].transpose(1, 2)
        out = scaled_dot_product_attention(query, keys, values, is_causal=True, **options)
        output_THD[tokens_GE] = out[:, :, prefix:].transpose(1, 2)
    return output_THD
