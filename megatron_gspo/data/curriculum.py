"""Prompts whose groups teach nothing are drawn less: the difficulty as the run has seen it."""

from __future__ import annotations

import base64
import zlib
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import numpy as np

from megatron_gspo.data.cursor import PromptOrder
from megatron_gspo.errors import DataError

Outcome = Literal["varied", "easy", "hard"]
"""Of a group: its rewards differ; or they are equal, in the upper half of the reward's range; or in the lower."""
LONGEST_STREAK = 127


class Curriculum:
    """An order of prompts in which those are passed over that had no variance, the more often the longer.

    A prompt whose last k groups, in a row, had equal rewards is kept with probability max(floor, 2^-k) when its turn
    comes; else the next of the order (of its source) has its turn. The draw is a function of the seed and of how many
    were made before it, so every rank makes the same, and a resumed run too: ``state_dict`` has the streaks, a byte a
    prompt, packed.
    """

    def __init__(self, inner: PromptOrder, seed: int, floor: float) -> None:
        self.inner, self.seed, self.floor = inner, seed, floor
        self.num_prompts = inner.num_prompts
        self.passed_over = 0
        """Turns that were passed over, since the start of the run."""
        self._decided = 0
        self._streaks_N = np.zeros(inner.num_prompts, dtype=np.int8)  # > 0: easy, < 0: hard

    def take(self, n: int) -> list[int]:
        """The next ``n`` indices that are not passed over."""
        return self._settled(self.inner.take(n))

    def instead(self, indices: Sequence[int]) -> list[int]:
        """As the order's own, likewise."""
        return self._settled(self.inner.instead(indices))

    def record(self, outcomes: Mapping[int, Outcome]) -> None:
        """Takes in what the groups of prompts came to. Every rank gives the same."""
        for index, outcome in outcomes.items():
            streak = int(self._streaks_N[index])
            if outcome == "varied":
                streak = 0
            else:
                streak = min(abs(streak) + 1, LONGEST_STREAK) * (1 if outcome == "easy" else -1)
            self._streaks_N[index] = streak

    def kept(self, index: int) -> float:
        """The probability that a prompt is kept when its turn comes."""
        return float(max(self.floor, 2.0 ** -abs(int(self._streaks_N[index]))))

    def shares(self) -> tuple[float, float]:
        """(easy, hard): of all prompts, those whose last group was."""
        return float((self._streaks_N > 0).mean()), float((self._streaks_N < 0).mean())

    def order(self) -> Mapping[str, object]:
        """What the order underneath is a function of."""
        return self.inner.order()

    def state_dict(self) -> dict[str, Any]:
        """As JSON: what a checkpoint keeps."""
        packed = base64.b64encode(zlib.compress(self._streaks_N.tobytes(), 9)).decode()
        own = {"streaks": packed, "decided": self._decided, "passed_over": self.passed_over}
        return dict(self.inner.state_dict()) | {"curriculum": own}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continues where ``state`` was taken; from a run without a curriculum with nothing known. Raises DataError."""
        self.inner.load_state_dict(state)
        own = state.get("curriculum")
        if own is None:
            return
        streaks_N = np.frombuffer(zlib.decompress(base64.b64decode(own["streaks"])), dtype=np.int8)
        if len(streaks_N) != self.num_prompts:
            raise DataError(
                f"the checkpoint's curriculum knows {len(streaks_N)} prompts, and there are {self.num_prompts}"
            )
        self._streaks_N = streaks_N.copy()
        self._decided, self.passed_over = own["decided"], own["passed_over"]

    def _settled(self, indices: list[int]) -> list[int]:
        pending = [at for at, index in enumerate(indices) if not self._keeps(index)]
        while pending:
            self.passed_over += len(pending)
            for at, index in zip(pending, self.inner.instead([indices[at] for at in pending]), strict=True):
                indices[at] = index
            pending = [at for at in pending if not self._keeps(indices[at])]
        return indices

    def _keeps(self, index: int) -> bool:
        chance = self.kept(index)
        if chance == 1.0:
            return True
        self._decided += 1
        entropy = [self.seed % 2**64, 2, self._decided]
        return bool(np.random.Generator(np.random.PCG64(np.random.SeedSequence(entropy))).random() < chance)
