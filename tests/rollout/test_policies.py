"""What is dropped, what is kept, and what is counted."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from megatron_gspo.config import RolloutConfig
from megatron_gspo.errors import RolloutError
from megatron_gspo.rollout.survivors import Dropped, apply_policies, shape_overlong, zero_truncated
from tests.rollout.cases import rollout


def config(**settings: Any) -> RolloutConfig:
    return RolloutConfig(**settings)


def test_sound_groups_pass_unchanged() -> None:
    groups = [[rollout(sample=0), rollout(sample=1)], [rollout(sample=0), rollout("length", sample=1)]]
    assert apply_policies(groups, config()) == (groups, Dropped())


def test_each_response_is_counted_once_under_its_first_reason() -> None:
    group = [
        rollout(),
        rollout(),
        rollout("abort", versions=(6, 7), tokens=0),
        rollout(tokens=0),
        rollout("length", versions=(6, 7)),
        rollout("length"),
    ]
    kept, dropped = apply_policies([group], config(on_truncated="drop"))
    assert kept == [group[:2]]
    assert dropped == Dropped(aborted=1, empty=1, mixed_version=1, truncated=1)
    assert dropped.responses == 4


def test_a_group_with_fewer_than_two_survivors_leaves_with_its_lonely_response() -> None:
    groups = [[rollout(), rollout("abort")], [rollout("abort"), rollout("abort")], [rollout(), rollout()]]
    kept, dropped = apply_policies(groups, config())
    assert kept == [groups[2]]
    assert dropped == Dropped(aborted=3, lonely=1, groups=2)
    assert dropped.responses == 4


def test_mixed_versions_are_dropped_kept_or_an_error() -> None:
    group = [rollout(), rollout(), rollout(versions=(6, 7))]
    assert apply_policies([group], config())[1].mixed_version == 1
    assert apply_policies([group], config(on_mixed_version="keep")) == ([group], Dropped())
    with pytest.raises(RolloutError, match=r"weight versions \[6, 7\]"):
        apply_policies([group], config(on_mixed_version="error"))


def test_truncated_responses_are_kept_dropped_or_kept_with_reward_zero() -> None:
    group = [rollout(), rollout("length"), rollout()]
    rewards_G = np.array([0.5, 0.75, 1.0])
    assert apply_policies([group], config(on_truncated="zero")) == ([group], Dropped())
    assert zero_truncated(group, rewards_G, config(on_truncated="zero")) == (0.5, 0.0, 1.0)
    assert zero_truncated(group, rewards_G, config(on_truncated="keep")) == (0.5, 0.75, 1.0)
    by_token = [np.array([0.5, 1.0]), np.array([0.75, 0.75]), np.array([1.0])]
    zeroed = zero_truncated(group, by_token, config(on_truncated="zero"))
    assert [tokens.tolist() for tokens in zeroed] == [[0.5, 1.0], [0.0, 0.0], [1.0]]
    assert apply_policies([group], config(on_truncated="drop"))[1] == Dropped(truncated=1)


def test_length_near_the_limit_costs_reward_linearly() -> None:
    """arXiv 2503.14476, eq. 13, with a limit of 8, a buffer of 4 and a penalty of 2: 0 up to 4 tokens, -2 at 8."""
    config = RolloutConfig(max_response_tokens=8, overlong_buffer=4, overlong_penalty=2.0)
    rollouts = [rollout(tokens=length) for length in (1, 4, 5, 8)]
    shaped = shape_overlong(rollouts, [np.float64(1.0)] * 4, config)
    assert [float(reward) for reward in shaped] == [1.0, 1.0, 0.5, -1.0]
    per_token = shape_overlong(rollouts[3:], [np.full(8, 0.5)], config)
    assert per_token[0].tolist() == [-1.5] * 8
    assert shape_overlong(rollouts, [0.5] * 4, RolloutConfig()) == (0.5,) * 4
