"""What becomes of responses that are truncated, aborted, empty, or of mixed weight versions. Pure functions."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import astuple, dataclass

import numpy as np

from megatron_gspo.config import RolloutConfig
from megatron_gspo.errors import RolloutError
from megatron_gspo.types import Rollout


@dataclass(frozen=True)
class Dropped:
    """Responses that left a batch, each counted once under its first reason; they add up over ranks."""

    aborted: int = 0
    """The server gave up on them, retries included."""
    empty: int = 0
    """They have no token."""
    mixed_version: int = 0
    truncated: int = 0
    ungraded: int = 0
    """Their grader failed, which says nothing of them."""
    lonely: int = 0
    """Sound ones whose group had fewer survivors than ``least``: one alone leaves nothing to compare with."""
    groups: int = 0
    """Groups (prompts) that left the batch, not responses."""

    def __add__(self, other: Dropped) -> Dropped:
        return Dropped(*(mine + theirs for mine, theirs in zip(astuple(self), astuple(other), strict=True)))

    @property
    def responses(self) -> int:
        """All of them, whatever the reason."""
        return self.aborted + self.empty + self.mixed_version + self.truncated + self.ungraded + self.lonely


def apply_policies(
    groups: Sequence[Sequence[Rollout]], config: RolloutConfig, *, least: int = 2
) -> tuple[list[list[Rollout]], Dropped]:
    """Groups of at least ``least`` survivors, in order, and the counts of what was dropped.

    ``on_truncated = "zero"`` keeps a response here; ``zero_truncated`` takes its reward.
    Raises RolloutError for a mixed-version response under ``on_mixed_version = "error"``.
    """
    counts = dict.fromkeys(("aborted", "empty", "mixed_version", "truncated", "lonely", "groups"), 0)
    kept = []
    for group in groups:
        survivors = []
        for rollout in group:
            reason = _reason_to_drop(rollout, config)
            if reason is None:
                survivors.append(rollout)
            else:
                counts[reason] += 1
        if len(survivors) >= least:
            kept.append(survivors)
        else:
            counts["lonely"] += len(survivors)
            counts["groups"] += 1
    return kept, Dropped(**counts)


def without_ungraded(graded: int, of: int, *, least: int = 2) -> Dropped:
    """What leaves the batch of a group of which ``graded`` responses of ``of`` have a reward."""
    stays = graded >= least
    return Dropped(ungraded=of - graded, lonely=0 if stays else graded, groups=0 if stays else 1)


def zero_truncated(
    rollouts: Sequence[Rollout], rewards_G: Iterable[np.ndarray], config: RolloutConfig
) -> tuple[np.ndarray, ...]:
    """Rewards by response (a number, or one a token), with zeros for truncated ones when ``on_truncated`` is "zero"."""
    zero = config.on_truncated == "zero"
    return tuple(
        np.zeros_like(reward) if zero and rollout.truncated else reward
        for rollout, reward in zip(rollouts, rewards_G, strict=True)
    )


def shape_overlong(
    rollouts: Sequence[Rollout], rewards_G: Iterable[np.ndarray], config: RolloutConfig
) -> tuple[np.ndarray, ...]:
    """Rewards by response less what their length costs: min((L_max - buffer - |y|) / buffer * penalty, 0) is added, to
    each token of a reward per token (arXiv 2503.14476, eq. 13)."""
    buffer = config.overlong_buffer
    if not buffer:
        return tuple(rewards_G)
    left = [config.max_response_tokens - buffer - len(rollout.response_ids) for rollout in rollouts]
    return tuple(
        reward + min(over / buffer * config.overlong_penalty, 0.0) for reward, over in zip(rewards_G, left, strict=True)
    )


def _reason_to_drop(rollout: Rollout, config: RolloutConfig) -> str | None:
    if rollout.finish_reason == "abort":
        return "aborted"
    if len(rollout.response_ids) == 0:
        return "empty"
    if len(rollout.weight_versions) > 1 and config.on_mixed_version != "keep":
        if config.on_mixed_version == "error":
            raise RolloutError(
                f"prompt {rollout.prompt.id!r}, sample {rollout.sample}: tokens from weight versions "
                f"{list(rollout.weight_versions)}; weights changed while it was generated "
                f'(rollout.on_mixed_version = "drop" would drop it)'
            )
        return "mixed_version"
    if rollout.truncated and config.on_truncated == "drop":
        return "truncated"
    return None
