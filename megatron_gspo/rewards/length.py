"""How long a response is, as a number in [0, 1]: with a negative weight, a penalty."""

from __future__ import annotations

from collections.abc import Sequence

from megatron_gspo.errors import ConfigError
from megatron_gspo.types import Prompt, Rollout


class Length:
    """0 up to ``start`` tokens, 1 from ``end`` on, and linear between them. Or, ``relative``: 0 for the shortest
    response of its group, 1 for the longest, linear between them, 0 where all have one length (Kimi k1.5, arXiv
    2501.12599, section 2.3.3, has this form). Tokens are ``response_ids``, the stop token included."""

    def __init__(self, start: int = 0, end: int | None = None, relative: bool = False) -> None:
        if relative == (end is not None) or (end is not None and not 0 <= start < end) or (relative and start):
            raise ConfigError(
                f"reward 'length' takes either 0 <= start < end, in tokens, or relative = true, and has start = "
                f"{start}, end = {end}, relative = {relative}"
            )
        self._start, self._end = start, end

    def score_group(self, prompt: Prompt, responses: Sequence[Rollout]) -> list[float]:
        """One number a response."""
        lengths = [len(response.response_ids) for response in responses]
        start, end = (self._start, self._end) if self._end is not None else (min(lengths), max(lengths))
        if start == end:
            return [0.0] * len(lengths)
        return [min(1.0, max(0.0, (length - start) / (end - start))) for length in lengths]
