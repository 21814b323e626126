"""The output layer's softmax and its gradient in torch: logits are written, a tile of them at a time."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from megatron_gspo.kernels.products import wide_product
from megatron_gspo.kernels.sums import Sums

COLUMNS = 8192
"""Vocabulary rows of a tile. Wide enough for the matrix products to run at full speed."""


class Tiles:
    """One rank's rows of the head. Its logits are [tokens, COLUMNS] at a time, each tile where the one before it lay.

    Logits are float32 (float64 of a float64 head) and never rounded to a half type: see docs/numerics.md.
    """

    def __init__(self, weight_VH: torch.Tensor, first: int, temperature: float, tokens: int) -> None:
        """``weight_VH`` holds the vocabulary's rows from ``first`` on; ``tokens`` is the most that a call is for."""
        self.weight_VH, self.first, self.temperature = weight_VH, first, temperature
        self.dtype = torch.promote_types(weight_VH.dtype, torch.float32)
        self._size = tokens * min(COLUMNS, len(weight_VH))
        self._logits = weight_VH.new_empty(self._size, dtype=self.dtype)

    def sums(self, h: torch.Tensor, labels: torch.Tensor) -> Sums:
        """Of all columns, for hidden states [tokens, H] and their labels [tokens]."""
        zeros = h.new_zeros(len(h), dtype=self.dtype)
        lowest = torch.full_like(zeros, torch.finfo(self.dtype).min)
        sums = Sums(lowest, zeros, zeros, zeros, torch.zeros_like(labels, dtype=torch.bool))
        scratch = torch.empty_like(self._logits)
        for columns, _, z in self._tiles(h):
            local, here = self._columns_of(labels, columns)
            sums.label = z.gather(1, local[:, None])[:, 0].where(here, sums.label)
            sums.found = sums.found | here
            sums.move_to(torch.maximum(sums.maximum, z.amax(dim=1)))
            z.sub_(sums.maximum[:, None])
            exp = torch.exp(z, out=_shaped(scratch, *z.shape))
            sums.exp = sums.exp + exp.sum(dim=1)
            sums.weighted = sums.weighted + exp.mul_(z).sum(dim=1)
        return sums

    def gradients(
        self, h: torch.Tensor, labels: torch.Tensor, lse: torch.Tensor, grad: torch.Tensor
    ) -> Iterator[tuple[slice, torch.Tensor, torch.Tensor]]:
        """(columns, their rows of the head, grad (1[column = label] - softmax)), each until the next is asked for.

        The gradient is rounded to the head's dtype: it goes into two matrix products.
        """
        half = self.weight_VH.dtype != self.dtype
        memory = torch.empty_like(self._logits, dtype=self.weight_VH.dtype) if half else self._logits
        for columns, weight, z in self._tiles(h):
            softmax = z.sub_(lse[:, None]).exp_()
            local, here = self._columns_of(labels, columns)
            softmax.scatter_add_(1, local[:, None], -here.to(softmax.dtype)[:, None])
            yield columns, weight, torch.mul(softmax, -grad[:, None], out=_shaped(memory, *softmax.shape))

    def _tiles(self, h: torch.Tensor) -> Iterator[tuple[slice, torch.Tensor, torch.Tensor]]:
        for start in range(0, len(self.weight_VH), COLUMNS):
            weight = self.weight_VH[start : start + COLUMNS]
            z = wide_product(h, weight.t(), out=_shaped(self._logits, len(h), len(weight)))
            if self.temperature != 1:
                z.div_(self.temperature)
            yield slice(start, start + len(weight)), weight, z

    def _columns_of(self, labels: torch.Tensor, columns: slice) -> tuple[torch.Tensor, torch.Tensor]:
        """Labels as columns of a tile (clamped into it), and whether each is in the tile at all."""
        local = labels - (self.first + columns.start)
        here = (local >= 0) & (local < columns.stop - columns.start)
        return local.where(here, 0), here


def _shaped(memory: torch.Tensor, *shape: int) -> torch.Tensor:
    return memory[: shape[0] * shape[1]].view(shape)
