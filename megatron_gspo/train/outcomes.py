"""What the groups of an outer step came to: by source, for the report, and for the curriculum."""

from __future__ import annotations

import math
from collections.abc import Mapping

import numpy as np

from megatron_gspo.algorithm.advantages import is_zero_variance
from megatron_gspo.data.curriculum import Curriculum, Outcome
from megatron_gspo.megatron.groups import Groups
from megatron_gspo.parallel.exchange import gather_objects
from megatron_gspo.rewards.registry import Reward
from megatron_gspo.train.assembly import Run
from megatron_gspo.types import RolloutGroup

Row = tuple[str, np.ndarray, np.ndarray, float]
"""Of a group: its source, its rewards [G_p], its response tokens [G_p], and the top of the reward's range."""


def source_metrics(run: Run, groups: Mapping[int, RolloutGroup]) -> dict[str, float]:
    """``source/NAME/*`` of the outer step over all leaders; nothing where there is one set of prompts. Collective."""
    if not run.source_rewards:
        return {}
    mine: list[Row] = [
        (
            group.prompt.source,
            group.rewards_G,
            np.array([len(rollout.response_ids) for rollout in group.rollouts]),
            run.reward_of(group.prompt).range[1],
        )
        for _, group in sorted(groups.items())
    ]
    rows = [row for part in gather_objects(mine, run.groups.world) for row in part]
    return by_source(rows, list(run.source_rewards))


def by_source(rows: list[Row], names: list[str]) -> dict[str, float]:
    """The numbers of each source: its groups, and where it has any, mean reward, accuracy (the share of responses with
    the most that its reward gives; none where there is no most), response length, and the share of its groups without
    variance."""
    metrics: dict[str, float] = {}
    for name in names:
        own = [row for row in rows if row[0] == name]
        metrics[f"source/{name}/groups"] = float(len(own))
        if not own:
            continue
        rewards, lengths = np.concatenate([row[1] for row in own]), np.concatenate([row[2] for row in own])
        metrics[f"source/{name}/reward"] = float(rewards.mean())
        if math.isfinite(own[0][3]):
            metrics[f"source/{name}/accuracy"] = float((rewards == own[0][3]).mean())
        metrics[f"source/{name}/length"] = float(lengths.mean())
        metrics[f"source/{name}/zero_std_groups"] = sum(is_zero_variance(row[1]) for row in own) / len(own)
    return metrics


def outcome_of(group: RolloutGroup, reward: Reward) -> Outcome:
    """Whether a group's rewards differ, and if not, in which half of the reward's range they are; without a range,
    hard."""
    if not is_zero_variance(group.rewards_G):
        return "varied"
    low, high = reward.range
    return "easy" if math.isfinite(low + high) and group.rewards_G[0] > (low + high) / 2 else "hard"


def tell_curriculum(run: Run, groups: Mapping[int, RolloutGroup], indices: Mapping[int, int]) -> None:
    """Tells the curriculum, if there is one, of the groups of these places; on every rank the same. Collective.

    Args:
        groups: this leader's, by place in the outer step.
        indices: place -> index among the prompts, of all places that were drawn.
    """
    if not isinstance(run.cursor, Curriculum):
        return
    mine = {
        place: outcome_of(group, run.reward_of(group.prompt)) for place, group in groups.items() if place in indices
    }
    found = _merged(mine, run.groups)
    run.cursor.record({indices[place]: found[place] for place in sorted(found)})


def _merged(mine: Mapping[int, Outcome], ranks: Groups) -> dict[int, Outcome]:
    return {place: outcome for part in gather_objects(dict(mine), ranks.world) for place, outcome in part.items()}


def curriculum_metrics(run: Run, before: int) -> dict[str, float]:
    """``curriculum/*``: what was passed over since ``before``, and what is known of all prompts."""
    if not isinstance(run.cursor, Curriculum):
        return {}
    easy, hard = run.cursor.shares()
    skipped = float(run.cursor.passed_over - before)
    return {"curriculum/skipped": skipped, "curriculum/easy": easy, "curriculum/hard": hard}


def passed_over(run: Run) -> int:
    """Turns that the curriculum has passed over so far; 0 without one."""
    return run.cursor.passed_over if isinstance(run.cursor, Curriculum) else 0
