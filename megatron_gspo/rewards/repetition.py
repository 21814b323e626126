"""How much a response repeats itself, as a number in [0, 1]: with a negative weight, a penalty."""

from __future__ import annotations

from typing import Literal

import numpy as np

from megatron_gspo.errors import ConfigError
from megatron_gspo.types import Prompt, Rollout

MOST_WORDS = 1_000_000


class Repetition:
    """The share of a response's n-grams that have been there before: 1 - distinct / all, of ``n`` tokens in a row, or
    of ``n`` words; 0 for one that is shorter."""

    def __init__(self, n: int = 4, of: Literal["tokens", "words"] = "tokens") -> None:
        if n < 1 or of not in ("tokens", "words"):
            raise ConfigError(f"reward 'repetition' takes n >= 1 and of = tokens or words; it has n = {n}, of = {of!r}")
        self._n, self._words = n, of == "words"

    def __call__(self, prompt: Prompt, response: Rollout) -> float:
        if self._words:
            _, ids = np.unique(np.array(response.text.lower().split()[:MOST_WORDS] or [""]), return_inverse=True)
        else:
            ids = response.response_ids
        if len(ids) < self._n:
            return 0.0
        grams = np.lib.stride_tricks.sliding_window_view(ids, self._n)
        return (len(grams) - len(np.unique(grams, axis=0))) / len(grams)
