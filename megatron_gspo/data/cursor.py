"""The order in which prompts are visited: deterministic, and resumable from a few numbers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Protocol, TypedDict

import numpy as np

from megatron_gspo.errors import DataError


class PromptOrder(Protocol):
    """An order in which prompts are visited: the same on every rank, and resumable from its state."""

    num_prompts: int

    def take(self, n: int) -> list[int]:
        """The next ``n`` indices."""

    def instead(self, indices: Sequence[int]) -> list[int]:
        """For each index that cannot be used, the one that stands in for it."""

    def order(self) -> Mapping[str, object]:
        """What the order is a function of: part of its state."""

    def state_dict(self) -> Mapping[str, object]:
        """As JSON: what a checkpoint keeps."""

    def load_state_dict(self, state: Any) -> None:
        """Continues where ``state`` was taken. Raises DataError when it is another order's."""


class CursorState(TypedDict):
    """A position, as JSON: what a checkpoint keeps."""

    num_prompts: int
    seed: int
    shuffle: bool
    epoch: int
    position: int


class PromptCursor:
    """Walks over ``num_prompts`` prompts epoch after epoch, each epoch a permutation drawn from (seed, epoch).

    The order is a function of the three arguments alone, so it does not change with the number of ranks: every rank
    makes the same calls, and a data-parallel leader slices its share out of what ``take`` returns. An epoch visits
    each prompt exactly once; a batch that reaches over the end of an epoch may see a prompt of both.
    """

    def __init__(self, num_prompts: int, seed: int, shuffle: bool = True) -> None:
        if num_prompts < 1:
            raise DataError(f"num_prompts = {num_prompts}: a cursor needs at least one prompt")
        self.num_prompts, self.seed, self.shuffle = num_prompts, seed, shuffle
        self.epoch = 0
        self.position = 0
        self._order = self._permutation(0)

    def take(self, n: int) -> list[int]:
        """The next ``n`` indices, each in [0, num_prompts)."""
        indices: list[int] = []
        while len(indices) < n:
            if self.position == self.num_prompts:
                self._seek(self.epoch + 1, 0)
            step = min(n - len(indices), self.num_prompts - self.position)
            indices += self._order[self.position : self.position + step].tolist()
            self.position += step
        return indices

    def instead(self, indices: Sequence[int]) -> list[int]:
        """The next of the order, for as many as cannot be used."""
        return self.take(len(indices))

    def order(self) -> dict[str, int]:
        """What the order is a function of: fields of ``CursorState``."""
        return {"num_prompts": self.num_prompts, "seed": self.seed, "shuffle": self.shuffle}

    def state_dict(self) -> CursorState:
        """As JSON: what a checkpoint keeps."""
        return CursorState(
            num_prompts=self.num_prompts,
            seed=self.seed,
            shuffle=self.shuffle,
            epoch=self.epoch,
            position=self.position,
        )

    def load_state_dict(self, state: CursorState) -> None:
        """Continues where ``state`` was taken. Raises DataError when the prompts or the seed are not the same."""
        if "sources" in state:
            raise DataError("the checkpoint's cursor is of data.sources, and this run has one set of prompts")
        for name, own in self.order().items():
            saved = state[name]  # type: ignore[literal-required]
            if saved != own:
                raise DataError(
                    f"the checkpoint's cursor has {name} = {saved}, this run has {own}: the order of the prompts "
                    f"would not continue; resume with the same prompt file, seed and shuffle"
                )
        epoch, position = state["epoch"], state["position"]
        if epoch < 0 or not 0 <= position <= self.num_prompts:
            raise DataError(f"epoch = {epoch}, position = {position} is no place among {self.num_prompts} prompts")
        self._seek(epoch, position)

    def _seek(self, epoch: int, position: int) -> None:
        self.epoch, self.position = epoch, position
        self._order = self._permutation(epoch)

    def _permutation(self, epoch: int) -> np.ndarray:
        if not self.shuffle:
            return np.arange(self.num_prompts)
        entropy = [self.seed % 2**64, epoch]  # a seed may be negative, SeedSequence's entropy may not
        return np.random.Generator(np.random.PCG64(np.random.SeedSequence(entropy))).permutation(self.num_prompts)
