"""The output layer on one rank, in either form: softmax sums of its columns, and the gradient of its logits."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Protocol

import torch

from megatron_gspo.errors import ConfigError
from megatron_gspo.kernels.sums import Sums
from megatron_gspo.kernels.tiles import Tiles


class HeadShard(Protocol):
    """One rank's rows of the head, of which logits are z = h W^T / temperature."""

    dtype: torch.dtype
    """Of logits and of sums over them."""

    def sums(self, h: torch.Tensor, labels: torch.Tensor) -> Sums:
        """Over all columns, for h [tokens, H] and labels [tokens]."""
        ...

    def gradients(
        self, h: torch.Tensor, labels: torch.Tensor, lse: torch.Tensor, grad: torch.Tensor
    ) -> Iterator[tuple[slice, torch.Tensor, torch.Tensor]]:
        """(columns, their rows W_c of the head, grad (1[column = label] - softmax) [tokens, columns]).

        softmax is exp(z - lse). The last is in the head's dtype and valid until the next is asked for.
        """
        ...


def head_shard(kernel: str, weight_VH: torch.Tensor, first: int, temperature: float, tokens: int) -> HeadShard:
    """The vocabulary's rows ``weight_VH`` from row ``first`` on, for at most ``tokens`` tokens a call.

    ``kernel``: "tiles" or "triton". Raises ConfigError for another, and for float64 in Triton.
    """
    if kernel not in ("tiles", "triton") or (kernel == "triton" and weight_VH.dtype == torch.float64):
        raise ConfigError(f'no kernel "{kernel}" of the head in {weight_VH.dtype}: "tiles", or "triton" below float64')
    if kernel == "triton":
        from megatron_gspo.kernels.triton_head import TritonHead

        return TritonHead(weight_VH, first, temperature, tokens)
    return Tiles(weight_VH, first, temperature, tokens)
