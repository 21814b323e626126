"""Ratings from contests: the formula, and that intervals hold the truth about as often as they say."""

from __future__ import annotations

import math

import numpy as np
import pytest

from megatron_gspo.algorithm.elo import (
    HIGHEST,
    LOWEST,
    Contest,
    expected_rank,
    rate,
    score_standings,
    win_probability,
)

SCALE = 400 / math.log(10)


def contest_of(rating: float, draw: np.random.Generator, people: int) -> Contest:
    """Performances are rating + a Gumbel variable of this scale: then each beats each as the logistic model says, and
    the model's one performance makes its outcomes against all hang together."""
    opponents_N = draw.normal(1400, 350, people)
    own, theirs_N = rating + draw.gumbel(scale=SCALE), opponents_N + draw.gumbel(scale=SCALE, size=people)
    return Contest(opponents_N, score_standings(own, theirs_N))


def problems_of(rating: float, draw: np.random.Generator, problems: int, samples: int) -> Contest:
    ratings_N = draw.choice(np.arange(800, 3000, 100), problems).astype(float)
    solved_N = draw.binomial(samples, win_probability(rating, ratings_N)) / samples
    return Contest(ratings_N, solved_N)


def test_400_points_more_win_ten_games_of_eleven() -> None:
    assert win_probability(1900.0, np.array([1500.0, 1900.0, 2300.0])) == pytest.approx([10 / 11, 0.5, 1 / 11])
    assert win_probability(0.0, np.array([1e6, -1e6])).tolist() == [0.0, 1.0]


def test_in_one_contest_the_rating_is_the_one_whose_expected_rank_was_reached() -> None:
    opponents_N = np.array([800.0, 1200.0, 1200.0, 1700.0, 2400.0])
    for beaten in range(1, 5):
        scores_N = np.repeat([1.0, 0.0], [beaten, 5 - beaten])
        found = rate([Contest(opponents_N, scores_N)])
        assert expected_rank(found.value, opponents_N) == pytest.approx(1 + 5 - beaten, abs=1e-6)
        assert (found.low, found.high, found.contests, found.opponents) == (LOWEST, HIGHEST, 1, 5)


def test_it_maximises_the_likelihood_written_down_directly() -> None:
    draw = np.random.default_rng(3)
    contests = [problems_of(1500.0, draw, 6, 4) for _ in range(5)]

    def log_likelihood(rating: float) -> float:
        total = 0.0
        for contest in contests:
            for opponent, score in zip(contest.opponents_N, contest.scores_N, strict=True):
                p = 1 / (1 + 10 ** ((opponent - rating) / 400))
                total += (score * math.log(p) + (1 - score) * math.log(1 - p)) / len(contest.opponents_N)
        return total

    best = rate(contests).value
    assert log_likelihood(best) > max(log_likelihood(best - 0.5), log_likelihood(best + 0.5))


def test_a_contest_counts_once_however_many_took_part() -> None:
    small = Contest(np.array([1000.0]), np.array([0.25]))
    large = Contest(np.full(5000, 2000.0), np.full(5000, 0.75))
    assert rate([small, large]).value == pytest.approx(1500.0), "halfway, where the mean of both scores is expected"


def test_who_won_everything_or_nothing_has_a_bound_for_a_rating() -> None:
    opponents_N = np.array([1000.0, 2000.0])
    lost, won = (rate([Contest(opponents_N, np.full(2, score))] * 3) for score in (0.0, 1.0))
    assert (lost.value, lost.low) == (LOWEST, LOWEST) and (won.value, won.high) == (HIGHEST, HIGHEST)
    assert lost.high < HIGHEST and won.low > LOWEST, "three contests lost do say something"


def test_points_decide_and_equal_points_are_half_a_win() -> None:
    assert score_standings(3.0, np.array([1.0, 3.0, 4.0])).tolist() == [1.0, 0.5, 0.0]


@pytest.mark.parametrize(
    "contest",
    [
        Contest(np.array([]), np.array([])),
        Contest(np.array([1.0]), np.array([1.5])),
        Contest(np.array([1.0, 2.0]), np.array([1.0])),
        Contest(np.array([np.nan]), np.array([1.0])),
    ],
)
def test_what_is_no_contest_is_refused(contest: Contest) -> None:
    with pytest.raises(ValueError, match=r"opponents with|not finite"):
        rate([contest])
    with pytest.raises(ValueError, match="no contest"):
        rate([])


def coverage(kind: str, rating: float, contests: int, trials: int) -> tuple[float, float]:
    """(share of intervals that hold the true rating, mean error of the rating)."""
    draw = np.random.default_rng(11)
    make = {"people": lambda: contest_of(rating, draw, 100), "problems": lambda: problems_of(rating, draw, 6, 8)}[kind]
    found = [rate([make() for _ in range(contests)]) for _ in range(trials)]
    held = np.mean([one.low <= rating <= one.high for one in found])
    return float(held), float(np.median([one.value for one in found]) - rating)


@pytest.mark.parametrize(("kind", "rating"), [("people", 1500.0), ("problems", 1900.0)])
def test_the_interval_holds_a_known_rating_about_as_often_as_it_says(kind: str, rating: float) -> None:
    held, error = coverage(kind, rating, contests=20, trials=250)
    assert 0.92 <= held <= 0.99 and abs(error) < 20


@pytest.mark.slow_suite
@pytest.mark.parametrize("kind", ["people", "problems"])
@pytest.mark.parametrize("rating", [900.0, 1500.0, 2100.0])
@pytest.mark.parametrize("contests", [8, 20, 50])
def test_coverage_of_ratings_over_many_simulated_evaluations(kind: str, rating: float, contests: int) -> None:
    held, error = coverage(kind, rating, contests, trials=2000)
    print(f"{kind}, rating {rating:.0f}, {contests} contests: {held:.3f} hold the truth, median error {error:+.0f}")
    assert (0.88 if contests == 8 else 0.92) <= held <= 0.97
    assert abs(error) < 40


@pytest.mark.parametrize(("score", "bound"), [(0.0, "low"), (1.0, "high")])
def test_who_solves_nothing_or_everything_in_unlike_contests_has_one_end_that_is_a_measurement(
    score: float, bound: str
) -> None:
    contests = [Contest(np.array(ratings), np.full(len(ratings), score)) for ratings in ([800.0], [900.0, 2500.0])]
    found = rate(contests)
    open_end, measured = (found.low, found.high) if bound == "low" else (found.high, found.low)
    assert open_end == (LOWEST if bound == "low" else HIGHEST) == found.value
    assert LOWEST < measured < HIGHEST
