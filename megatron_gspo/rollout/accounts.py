"""Every prompt of a draw is answered, and once: held before anything is learned from it. Pure functions."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Mapping, Sequence

from megatron_gspo.errors import RolloutError
from megatron_gspo.types import Prompt, Rollout


def check_complete(prompts: Mapping[int, Prompt], groups: Mapping[int, Sequence[Rollout]], group_size: int) -> None:
    """Raises RolloutError, naming the first prompt that does not have each of its responses, and each once."""
    for place, prompt in prompts.items():
        samples = [rollout.sample for rollout in groups.get(place, ()) if rollout.prompt == prompt]
        if len(groups.get(place, ())) != group_size or sorted(samples) != list(range(group_size)):
            raise RolloutError(
                f"prompt {prompt.id!r} has responses {sorted(samples)}, and each of {group_size} was to come once"
            )


def check_answered(prompts: Mapping[int, Prompt], places: Sequence[Collection[int]]) -> None:
    """Raises RolloutError, naming the first prompt that no leader has responses to, or several have.

    ``places``: of each leader, the places of the outer step that it has responses to.
    """
    times = Counter(place for each in places for place in each)
    for place, prompt in prompts.items():
        if times[place] != 1:
            many = "no leader has" if not times[place] else f"{times[place]} leaders have"
            raise RolloutError(f"prompt {prompt.id!r} (place {place} of the outer step): {many} responses to it")
