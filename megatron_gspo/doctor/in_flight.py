"""How much of what forwards keep a pipeline stage holds at one time."""

from __future__ import annotations

from collections.abc import Sequence

from megatron_gspo.config import ParallelConfig

ROUNDS = 4
"""Of as many micro-batches as there are stages: after these everything has been as full as it gets."""


def most_in_flight(kept: Sequence[float], parallel: ParallelConfig, stage: int, microbatches: int) -> float:
    """The most that is kept at one time, where a micro-batch keeps ``kept[c]`` of a stage's virtual stage c.

    1F1B (arXiv 2104.04473, 2.2): as many forwards as there are later stages, then a forward and a backward in turns.
    Virtual stages take turns of as many micro-batches as there are stages, backward in the other direction, and warm up
    by twice the later stages and a turn of each virtual stage but the last. Where they have unlike layers, it matters
    which ones are kept: of (7, 7, 6, 1) layers on the last of two stages 49 are, seven times the largest.
    """
    size, parts = parallel.pipeline, parallel.virtual_pipeline
    later = size - stage - 1
    warm = later if parts == 1 else 2 * later + (parts - 1) * size
    now = most = 0.0
    forwards = _turns(min(microbatches, ROUNDS * size), size, parts)
    for step, part in enumerate(forwards):
        now += kept[part]
        most = max(most, now)
        if step >= warm:
            now -= kept[parts - 1 - forwards[step - warm]]
    return most


def _turns(microbatches: int, size: int, parts: int) -> list[int]:
    """The virtual stage of each forward, in order."""
    return [
        part
        for first in range(0, microbatches, size)
        for part in range(parts)
        for _ in range(min(size, microbatches - first))
    ]
