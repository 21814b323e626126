"""How much of the mini-batch's loss each response carries.

A token's weight is ``weight / |y|`` of its response, whatever the aggregation, so one number per response is enough.
With P surviving groups, G_p survivors of prompt p, and |y| response tokens:

    aggregation         weight of a response      weight of a token      source
    "paper"             1 / (P G_p)               1 / (P G_p |y|)        GSPO, arXiv 2507.18071; GRPO, 2402.03300
    "token-mean"        |y| / sum |y|             1 / sum |y|            DAPO, as it is implemented
    "group-token-mean"  |y| / (P sum_G |y|)       1 / (P sum_G |y|)      DAPO, 2503.14476, eq. 8; CISPO, 2506.13585
    "token-sum"         |y| / (P G_p max|y|)      1 / (P G_p max|y|)     Dr.GRPO, arXiv 2503.20783

``max|y|`` is the response limit, a constant of the run.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from megatron_gspo.errors import BatchError


def response_weights(
    aggregation: str, lengths_per_group: Sequence[Sequence[int]], *, max_response_tokens: int
) -> tuple[np.ndarray, ...]:
    """Weights of the responses of one mini-batch.

    Args:
        aggregation: "paper", "token-mean", "group-token-mean" or "token-sum".
        lengths_per_group: response tokens |y| of every survivor of every surviving group of the mini-batch, over all
            data-parallel ranks; groups of zero variance included. Their number is P.
        max_response_tokens: the rollout's response limit; "token-sum" divides by it.
    Returns:
        P arrays, each [G_p] float64.
    Raises:
        BatchError: an unknown aggregation, an empty group, or a response without tokens.
    """
    lengths_P = [np.asarray(lengths_G, dtype=np.int64) for lengths_G in lengths_per_group]
    for group, lengths_G in enumerate(lengths_P):
        if lengths_G.size == 0 or lengths_G.min() < 1:
            raise BatchError(f"group {group} has response lengths {lengths_G.tolist()}: drop what is empty")
    if aggregation == "token-mean":
        total = sum(int(lengths_G.sum()) for lengths_G in lengths_P)
        return tuple(lengths_G / total for lengths_G in lengths_P)
    if aggregation == "group-token-mean":
        return tuple(lengths_G / (len(lengths_P) * int(lengths_G.sum())) for lengths_G in lengths_P)
    share_P = [1.0 / (len(lengths_P) * lengths_G.size) for lengths_G in lengths_P]
    if aggregation == "paper":
        return tuple(np.full(lengths_G.size, share) for lengths_G, share in zip(lengths_P, share_P, strict=True))
    if aggregation == "token-sum":
        return tuple(
            lengths_G * (share / max_response_tokens) for lengths_G, share in zip(lengths_P, share_P, strict=True)
        )
    raise BatchError(f'unknown aggregation "{aggregation}": use one of paper, token-mean, group-token-mean, token-sum')
