"""What an evaluation says of a policy: pass@k, intervals, and what is done with the responses."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest

from megatron_gspo.algorithm.evaluation import (
    estimates,
    ks_up_to,
    majority,
    mean_with_interval,
    pass_at_k,
    student_quantile,
)


def test_pass_at_k_is_the_share_of_all_draws_of_k_that_hold_a_right_response() -> None:
    for samples in range(1, 7):
        for correct, k in itertools.product(range(samples + 1), range(1, samples + 1)):
            draws = list(itertools.combinations([1] * correct + [0] * (samples - correct), k))
            expected = sum(any(draw) for draw in draws) / len(draws)
            assert pass_at_k(np.array([correct]), samples, k)[0] == pytest.approx(expected, abs=1e-15)


def test_pass_at_k_of_thousands_of_responses_does_not_overflow() -> None:
    expected = 1 - math.comb(9_000, 2_000) / math.comb(10_000, 2_000)
    assert pass_at_k(np.array([1_000, 0, 10_000]), 10_000, 2_000) == pytest.approx([expected, 0.0, 1.0])
    assert pass_at_k(np.array([1]), 10_000, 2_000)[0] == pytest.approx(0.2)


@pytest.mark.parametrize(("correct", "k"), [(5, 1), (-1, 1), (2, 5), (2, 0)])
def test_pass_at_k_refuses_what_was_not_drawn(correct: int, k: int) -> None:
    with pytest.raises(ValueError, match=f"pass@{k} of 4"):
        pass_at_k(np.array([correct]), 4, k)


def test_k_doubles_up_to_the_samples() -> None:
    assert [ks_up_to(n) for n in (1, 2, 6, 8)] == [(1,), (1, 2), (1, 2, 4, 6), (1, 2, 4, 8)]


def test_a_response_is_right_when_its_reward_is_one() -> None:
    found = estimates(np.array([[1.0, 0.5, 0.0, 0.0], [1.0, 1.0, 1.0, 0.25]]))
    assert {name: estimate.value for name, estimate in found.items()} == {
        "accuracy": 0.5,
        "pass@1": pytest.approx(0.5),
        "pass@2": pytest.approx((0.5 + 1.0) / 2),
        "pass@4": 1.0,
        "reward": pytest.approx((0.375 + 0.8125) / 2),
        "rewarded": 0.75,
    }


@pytest.mark.parametrize(
    ("freedom", "quantile"), [(1, 12.7062), (2, 4.3027), (4, 2.7764), (9, 2.2622), (30, 2.0423), (10**6, 1.95997)]
)
def test_students_quantiles_are_those_of_the_tables(freedom: int, quantile: float) -> None:
    assert student_quantile(0.975, freedom) == pytest.approx(quantile, abs=6e-5)


def test_for_right_and_wrong_the_interval_is_wilsons() -> None:
    values, t = np.repeat([0.0, 1.0], [30, 70]), student_quantile(0.975, 99)
    center, n = 0.7, 99  # p (1 - p) / (s^2 / P) with s^2 = P / (P - 1) p (1 - p)
    root = t * math.sqrt(center * (1 - center) / n + t**2 / (4 * n**2))
    expected = [(center + t**2 / (2 * n) + sign * root) / (1 + t**2 / n) for sign in (-1, 1)]
    found = mean_with_interval(values)
    assert [found.value, found.low, found.high] == pytest.approx([0.7, *expected], rel=1e-12)


def test_prompts_that_agree_leave_a_doubt_and_one_prompt_says_nothing() -> None:
    all_right = mean_with_interval(np.ones(20))
    assert all_right.high == all_right.value == 1.0
    t = student_quantile(0.975, 19)
    assert all_right.low == pytest.approx(20 / (20 + t**2))
    one = mean_with_interval(np.array([1.0]))
    assert (one.value, one.low, one.high) == (1.0, 0.0, 1.0)


def test_more_responses_to_the_same_prompts_do_not_stand_for_more_prompts() -> None:
    chances = np.random.default_rng(0).random(40) < 0.5
    one, many = (estimates(np.tile(chances[:, None].astype(float), (1, k)))["accuracy"] for k in (1, 64))
    assert one == many


@pytest.mark.parametrize(
    ("prompts", "samples", "a", "b"), [(5, 1, 8.0, 1.0), (10, 8, 0.5, 0.5), (20, 1, 1.0, 20.0), (50, 8, 8.0, 1.0)]
)
def test_the_interval_holds_the_truth_about_as_often_as_it_says(prompts: int, samples: int, a: float, b: float) -> None:
    draw, trials, truth = np.random.default_rng(1), 1000, a / (a + b)
    chances = draw.beta(a, b, (trials, prompts))
    shares = draw.binomial(samples, chances) / samples
    found = [mean_with_interval(row) for row in shares]
    coverage = np.mean([estimate.low <= truth <= estimate.high for estimate in found])
    assert 0.92 < coverage < 0.995


def test_the_majority_is_right_when_its_answer_is() -> None:
    assert majority(["7", "8", "7"], [True, False, True]) == 1.0
    assert majority(["7", "8", "8"], [True, False, False]) == 0.0


def test_a_tie_counts_each_leading_answer_by_its_share_and_no_answer_does_not_vote() -> None:
    assert majority(
        ["1", "2", "3", "3", "2", None, None, None], [False, True, False, False, True, False, False, False]
    ) == (pytest.approx(1 / 2))
    assert majority([None, None], [False, False]) == 0.0
    assert majority(["7", "7", "7", "8"], [True, True, False, False]) == pytest.approx(2 / 3)
