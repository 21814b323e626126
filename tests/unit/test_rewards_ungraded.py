"""What becomes of responses without a grade, of components and of other ranges: in training, evaluations and pages."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from megatron_gspo.algorithm.advantages import credit_by_response, token_group_advantages
from megatron_gspo.algorithm.base import make_algorithm
from megatron_gspo.algorithm.evaluation import estimates, mean_with_interval, student_quantile
from megatron_gspo.config import RolloutConfig
from megatron_gspo.errors import RewardError
from megatron_gspo.report.charts import CHARTS
from megatron_gspo.report.comparison.charts import REWARD, curve_chart
from megatron_gspo.report.drawing import for_families
from megatron_gspo.report.evaluation import statistics
from megatron_gspo.report.metrics import METRICS, row_of
from megatron_gspo.report.payload import idle_components
from megatron_gspo.report.prometheus import series_name
from megatron_gspo.report.samples import sample
from megatron_gspo.rewards import (
    Reward,
    TokenRewards,
    Ungraded,
)
from megatron_gspo.rollout.survivors import Dropped
from megatron_gspo.train import collect
from megatron_gspo.train.collect import Collected, check_ungraded, component_means, keep_graded, samples_of, sums_of
from megatron_gspo.train.grade import Graded, check_graded
from megatron_gspo.types import Prompt, Rollout
from tests.unit.reward_cases import PROMPT, by_length, group, score

# In training


def run(algorithm: str = "gspo", share: float = 0.5, rollout: RolloutConfig | None = None) -> Any:
    return SimpleNamespace(
        reward=Reward("mine", by_length, max_ungraded=share),
        reward_names="'mine'",
        groups=SimpleNamespace(world=None),
        config=SimpleNamespace(rollout=rollout or RolloutConfig(), algorithm=make_algorithm(algorithm)),
    )


def advantages(rollouts: list[Rollout]) -> dict[int, tuple[float, list[float], float]]:
    """Sample -> (advantage, by token, reward) of a group scored with ``by_length``."""
    (scored,) = score(by_length, rollouts)
    found = Collected()
    keep_graded(run(), 3, rollouts, scored, found)
    one = found.groups[3]
    values = credit_by_response("group", {3: one.rewards_G}, {3: np.array([len(r.response_ids) for r in one.rollouts])})
    return {s.sample: (s.advantage, s.token_advantages.tolist(), s.reward) for s in samples_of(3, one, values[3])}


def test_an_ungraded_response_leaves_the_others_what_they_are_without_it_to_the_bit() -> None:
    texts = ["x", "bad", "seven77", "abc", "bad", "four"]
    drawn = group(*texts)
    with_it = advantages(drawn)
    without = advantages([rollout for rollout in drawn if rollout.text != "bad"])
    assert with_it == without and set(with_it) == {0, 2, 3, 5}
    zeroed = np.array([0.1, 0.0, 0.7, 0.3, 0.0, 0.4])
    assert with_it[0][0] != ((zeroed - zeroed.mean()) / zeroed.std())[0]  # a 0 in its place would have counted


def test_token_advantages_are_those_of_the_graded_responses() -> None:
    def by_token(prompt: Prompt, response: Rollout) -> Any:
        values = np.arange(len(response.text)) / 10
        return Ungraded("away") if response.text == "bad" else TokenRewards(values)

    drawn = group("abcd", "bad", "ef")
    (scored,) = score(by_token, drawn)
    found = Collected()
    keep_graded(run("gspo-token"), 0, drawn, scored, found)
    rewards = found.groups[0].token_rewards_G
    assert rewards is not None
    expected = token_group_advantages([np.arange(4) / 10, np.arange(2) / 10])
    made = token_group_advantages(rewards)
    assert [a.tolist() for a in made] == [a.tolist() for a in expected]


@pytest.mark.parametrize(
    ("texts", "algorithm", "kept", "dropped"),
    [
        (("x", "bad", "four"), "gspo", 2, Dropped(ungraded=1)),
        (("x", "bad", "bad"), "gspo", 0, Dropped(ungraded=2, lonely=1, groups=1)),
        (("bad", "bad"), "gspo", 0, Dropped(ungraded=2, groups=1)),
        (("x", "four"), "gspo", 2, Dropped()),
    ],
)
def test_a_group_with_too_few_graded_responses_leaves(
    texts: tuple[str, ...], algorithm: str, kept: int, dropped: Dropped
) -> None:
    rollouts = group(*texts)
    (scored,) = score(by_length, rollouts)
    found = Collected()
    keep_graded(run(algorithm), 0, rollouts, scored, found)
    assert (len(found.groups[0].rollouts) if found.groups else 0) == kept
    assert found.dropped == dropped and found.dropped.responses == len(texts) - kept
    assert found.asked == len(texts)
    assert found.reason == ("the grader is away" if "bad" in texts else "")


def test_more_ungraded_responses_than_allowed_end_the_run(monkeypatch: pytest.MonkeyPatch) -> None:
    away = Collected(dropped=Dropped(ungraded=3), asked=10, reason="HTTP 503")
    others = (0, 20, "")
    monkeypatch.setattr(collect, "gather_objects", lambda mine, group: [others, mine])
    check_ungraded(run(share=0.1), away)  # 3 of 30 are allowed
    with pytest.raises(RewardError, match=r"left 3 of 30 responses ungraded, .* 0.09 .*the first: HTTP 503"):
        check_ungraded(run(share=0.09), away)
    nothing = Collected()
    monkeypatch.setattr(collect, "gather_objects", lambda mine, group: [mine])
    check_ungraded(run(share=0.0), nothing)


def test_components_are_means_over_the_responses_that_have_them_and_over_all_leaders() -> None:
    first = sums_of([{"a": 1.0, "b": 2.0}, {"a": 0.0}])
    second = sums_of([{"a": 0.5}])
    assert component_means([first, second, {}]) == {"reward/component/a": 0.5, "reward/component/b": 2.0}
    assert row_of("reward/component/a") in METRICS


# In evaluations


def test_a_response_that_was_not_graded_counts_nowhere() -> None:
    nan = np.nan
    found = estimates(np.array([[1.0, 0.0, nan, 1.0], [nan, 0.5, nan, nan], [nan] * 4]))
    assert found["accuracy"].value == pytest.approx((2 / 3 + 0) / 2)
    assert found["reward"].value == pytest.approx((2 / 3 + 0.5) / 2)
    assert found["rewarded"].value == pytest.approx((2 / 3 + 1) / 2)
    assert found["pass@2"].value == 1.0 and "pass@4" not in found  # of the first prompt, 3 graded and 2 right
    with pytest.raises(ValueError, match="no response"):
        estimates(np.full((2, 2), nan))


def test_accuracy_is_the_top_of_the_range_and_undefined_without_one() -> None:
    rewards = np.array([[1.5, -0.5], [1.5, 1.5], [1.0, 0.0]])
    found = estimates(rewards, (-0.5, 1.5))
    assert found["accuracy"].value == 0.5
    unit = estimates((rewards + 0.5) / 2)["reward"]
    moved = found["reward"]
    assert [moved.value, moved.low, moved.high] == pytest.approx(
        [2 * x - 0.5 for x in (unit.value, unit.low, unit.high)]
    )
    free = estimates(rewards, (-np.inf, np.inf))
    assert "accuracy" not in free and "pass@1" not in free
    means = rewards.mean(axis=1)
    half = student_quantile(0.975, 2) * means.std(ddof=1) / np.sqrt(3)
    assert free["reward"].high == pytest.approx(means.mean() + half)
    assert mean_with_interval(np.array([3.0]), (0, np.inf)).low == -np.inf


def test_an_evaluation_says_what_was_not_graded_and_what_rewards_are_made_of() -> None:
    rollouts = tuple(group("x", "bad"))
    one = Graded(PROMPT, rollouts, np.array([1.0, np.nan]), ("", "away"), ({"part": 0.25}, {}))
    other = Graded(PROMPT, rollouts, np.array([0.0, 1.0]), (), ({"part": 0.75}, {}))
    found = statistics([one, other])
    assert found["ungraded"] == 1 and found["components"] == {"part": 0.5}
    assert found["estimates"]["accuracy"]["value"] == 0.75
    alone = statistics([one], (-np.inf, np.inf))["estimates"]
    assert alone["reward"] == {"value": 1.0, "low": None, "high": None}


def test_an_evaluation_of_which_nothing_was_graded_is_an_error() -> None:
    reward = Reward("mine", by_length)
    check_graded(reward, np.array([[np.nan, 0.0]]), ["away"])
    with pytest.raises(RewardError, match="'mine' graded none of 2 responses: away"):
        check_graded(reward, np.full((2, 1), np.nan), ["", "away"])
    with pytest.raises(RewardError, match="every response was empty"):
        check_graded(reward, np.full((2, 1), np.nan), [])


# On the page and for those who watch


def test_a_chart_has_a_line_a_component_and_the_reader_has_its_numbers() -> None:
    (chart,) = [chart for chart in CHARTS if chart.title == "Components of the reward"]
    recorded = ["reward/mean", "reward/component/style", "reward/component/right", "route/drift/layer_00"]
    drawn = for_families(chart, recorded)
    assert [(curve.metric, curve.label) for curve in drawn.curves] == [
        ("reward/component/right", "right"),
        ("reward/component/style", "style"),
    ]
    many = [f"reward/component/{letter}" for letter in "abcdefghijkl"]
    assert [curve.label for curve in for_families(chart, many).curves] == list("abcdefghijkl"), "none is left out"
    shown = sample({"reward": 0.5, "components": {"right": 1, "style": float("nan")}, "tokens": ["a"]})
    assert shown["components"] == {"right": 1, "style": None} and sample({"tokens": []})["components"] is None
    assert sample({"components": [1]})["components"] is None
    assert series_name("reward/component/right") == ("reward_component", {"component": "right"})


def test_a_component_that_is_0_at_every_step_of_every_run_is_not_drawn() -> None:
    def run(**values: list[float]) -> dict[str, Any]:
        return {"steps": {"series": {f"reward/component/{name}": {"y": of} for name, of in values.items()}}}

    runs = [run(crashed=[0.0, 0.0], passed=[0.0, 0.5], time=[0.0]), run(crashed=[0.0], time=[0.0, 0.1])]
    assert idle_components(runs) == {"reward/component/crashed"}
    assert idle_components([run(crashed=[0.0], time=[0.0])]) == set(), "then the chart as a whole is folded away"


def test_a_comparison_of_rewards_outside_of_0_and_1_is_not_cut_there() -> None:
    def chart(*values: float) -> Any:
        def of(metric: str) -> list[float]:
            return list(values)

        cell = SimpleNamespace(cold_start="", outer_step=[0, 1], series=of, values=of)
        arm = SimpleNamespace(name="a")
        comparison: Any = SimpleNamespace(arms=[arm], cells=(cell,), of=lambda arm: {0: cell})
        return curve_chart(comparison, REWARD[0])

    assert (chart(0.0, 1.0)["share"], chart(0.0, 1.0)["signed"]) == (True, False)
    assert (chart(-0.5, 1.0)["share"], chart(-0.5, 1.0)["signed"]) == (False, True)
