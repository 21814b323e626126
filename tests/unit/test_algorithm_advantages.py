"""Group-relative advantages and the weights of responses."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from megatron_gspo.algorithm.advantages import (
    batch_advantages,
    centred_advantages,
    group_advantages,
    is_zero_variance,
    leave_one_out_advantages,
    token_group_advantages,
)
from megatron_gspo.algorithm.weights import response_weights
from megatron_gspo.errors import BatchError

REWARDS = st.lists(st.sampled_from([0.0, 0.1, 0.25, 0.7, 1.0]), min_size=2, max_size=16)


def test_advantages_are_deviations_in_population_standard_deviations() -> None:
    # mean 0.5, population std 0.5 (the sample std would be 0.577).
    assert group_advantages(np.array([1, 0, 0, 1])).tolist() == [1.0, -1.0, -1.0, 1.0]
    # mean 0.25, population variance 3/16.
    expected = [0.75 / np.sqrt(3 / 16), *[-0.25 / np.sqrt(3 / 16)] * 3]
    assert group_advantages(np.array([1.0, 0, 0, 0])).tolist() == pytest.approx(expected, rel=1e-15)


def test_a_zero_variance_group_gets_zero_advantages() -> None:
    rewards = torch.full((8,), 0.1)
    assert rewards.std(correction=0) > 0, "rounding no longer makes a deviation here: choose another value"
    assert group_advantages(rewards.numpy()).tolist() == [0.0] * 8
    assert is_zero_variance(rewards.numpy())
    assert not is_zero_variance(np.array([0.1, 0.1, 0.2]))


def test_a_tiny_but_real_difference_is_not_flattened_by_an_epsilon() -> None:
    assert group_advantages(np.array([0.5, 0.5 + 1e-9])).tolist() == pytest.approx([-1.0, 1.0], rel=1e-6)


@pytest.mark.parametrize("size", range(2, 33))
def test_equal_float64_rewards_get_zeros_even_where_their_mean_is_rounded(size: int) -> None:
    assert group_advantages(np.full(size, 0.1)).tolist() == [0.0] * size


@given(rewards=REWARDS)
def test_advantages_have_mean_zero_and_variance_one(rewards: list[float]) -> None:
    advantages = group_advantages(np.array(rewards))
    assert advantages.dtype == np.float64
    assert advantages.mean() == pytest.approx(0.0, abs=1e-13)
    assert (advantages**2).mean() == pytest.approx(0.0 if is_zero_variance(np.array(rewards)) else 1.0, rel=1e-12)


@given(data=st.data(), rewards=REWARDS)
def test_token_rewards_that_are_constant_in_a_response_give_exactly_the_group_advantages(
    data: st.DataObject, rewards: list[float]
) -> None:
    lengths = [data.draw(st.integers(1, 9)) for _ in rewards]
    advantages = token_group_advantages([np.full(n, r) for n, r in zip(lengths, rewards, strict=True)])
    for expected, length, values in zip(group_advantages(np.array(rewards)), lengths, advantages, strict=True):
        assert values.tolist() == [expected] * length


def test_token_statistics_weigh_every_response_alike_whatever_its_length() -> None:
    # Response means 1/2 and 0: mean 1/4. Variance: (1/2 (9/16 + 1/16) + 1/16) / 2 = 3/16. A token mean would be 1/5.
    long, short = token_group_advantages([np.array([1.0, 0.0]), np.zeros(3)])
    std = np.sqrt(3 / 16)
    assert long.tolist() == pytest.approx([0.75 / std, -0.25 / std], rel=1e-14)
    assert short.tolist() == pytest.approx([-0.25 / std] * 3, rel=1e-14)


def test_token_rewards_without_variance_get_zeros() -> None:
    rewards = [np.full(3, 0.1, np.float32), np.full(5, 0.1, np.float32)]
    assert [values.tolist() for values in token_group_advantages(rewards)] == [[0.0] * 3, [0.0] * 5]


@pytest.mark.parametrize("rewards", [[0.5], [], [0.1, float("nan")], [float("inf"), 0.0]])
def test_a_group_that_has_no_advantage_is_refused(rewards: list[float]) -> None:
    with pytest.raises(BatchError):
        group_advantages(np.array(rewards))
    with pytest.raises(BatchError):
        token_group_advantages([np.array([reward]) for reward in rewards])


def test_an_empty_response_is_refused() -> None:
    with pytest.raises(BatchError, match=r"responses \[1\]"):
        token_group_advantages([np.ones(2), np.array([])])


LENGTHS = [[2, 4], [1, 1, 6]]


@pytest.mark.parametrize(
    ("aggregation", "expected"),
    [
        ("paper", [[1 / 4, 1 / 4], [1 / 6, 1 / 6, 1 / 6]]),
        ("token-mean", [[2 / 14, 4 / 14], [1 / 14, 1 / 14, 6 / 14]]),
        ("group-token-mean", [[2 / 12, 4 / 12], [1 / 16, 1 / 16, 6 / 16]]),
        ("token-sum", [[2 / 40, 4 / 40], [1 / 60, 1 / 60, 6 / 60]]),
    ],
)
def test_response_weights(aggregation: str, expected: list[list[float]]) -> None:
    weights = response_weights(aggregation, LENGTHS, max_response_tokens=10)
    assert [w.tolist() for w in weights] == [pytest.approx(row, rel=1e-15) for row in expected]


def test_a_token_weighs_its_responses_weight_over_its_length() -> None:
    per_token = {
        name: [w / n for w, n in zip(response_weights(name, LENGTHS, max_response_tokens=10), LENGTHS, strict=True)]
        for name in ("token-mean", "token-sum")
    }
    assert np.concatenate(per_token["token-mean"]).tolist() == pytest.approx([1 / 14] * 5)
    assert np.concatenate(per_token["token-sum"]).tolist() == pytest.approx([1 / 40] * 2 + [1 / 60] * 3)


def test_weights_refuse_what_has_no_tokens() -> None:
    with pytest.raises(BatchError, match=r"group 1 has response lengths \[3, 0\]"):
        response_weights("paper", [[1, 2], [3, 0]], max_response_tokens=10)
    with pytest.raises(BatchError, match="unknown aggregation"):
        response_weights("mean", LENGTHS, max_response_tokens=10)


REWARDS = [np.array([1.0, 0.0, 1.0]), np.array([0.5, 0.5]), np.array([0.0, 2.0])]
TOKENS = [np.array([3, 1, 2]), np.array([4, 4]), np.array([1, 7])]


def test_centred_and_leave_one_out_advantages_are_their_formulas() -> None:
    assert centred_advantages(REWARDS[0]).tolist() == pytest.approx([1 / 3, -2 / 3, 1 / 3])
    assert leave_one_out_advantages(REWARDS[0]).tolist() == pytest.approx([1 - 1 / 2, 0 - 1, 1 - 1 / 2])
    for advantages in (centred_advantages, leave_one_out_advantages):
        assert advantages(np.full(8, np.float32(0.1))).tolist() == [0.0] * 8
        with pytest.raises(BatchError, match="a group of 1"):
            advantages(np.array([1.0]))


@pytest.mark.parametrize("baseline", [False, True])
def test_batch_advantages_are_whitened_over_all_tokens(baseline: bool) -> None:
    """As a vector with each response's reward repeated for each of its tokens."""
    rewards = [r - r.mean() if baseline else r for r in REWARDS]
    tokens = np.repeat(np.concatenate(rewards), np.concatenate(TOKENS))
    expected = [(r - tokens.mean()) / tokens.std() for r in rewards]
    found = batch_advantages(REWARDS, TOKENS, baseline=baseline)
    for a, b in zip(found, expected, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-13, atol=1e-15)
    repeated = np.repeat(np.concatenate(found), np.concatenate(TOKENS))
    assert repeated.mean() == pytest.approx(0, abs=1e-15) and repeated.std() == pytest.approx(1)


def test_a_batch_of_equal_rewards_has_no_advantage_and_one_that_is_not_finite_is_refused() -> None:
    equal = batch_advantages([np.full(2, 0.1)] * 3, [np.array([1, 2])] * 3, baseline=False)
    assert [a.tolist() for a in equal] == [[0.0, 0.0]] * 3
    with pytest.raises(BatchError, match="not finite"):
        batch_advantages([np.array([1.0, np.nan])], [np.array([1, 2])], baseline=False)
