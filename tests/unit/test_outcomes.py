"""What the groups of a step came to, by source and for the curriculum; and which reward grades which group."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import pytest

from megatron_gspo.config import RewardConfig
from megatron_gspo.report.charts import CHARTS
from megatron_gspo.report.drawing import for_families
from megatron_gspo.report.metrics import METRICS, row_of
from megatron_gspo.report.prometheus import series_name
from megatron_gspo.rewards.references import ReferenceCheck
from megatron_gspo.rewards.registry import Reward, resolve_reward
from megatron_gspo.train.assembly import Run
from megatron_gspo.train.collect import by_reward
from megatron_gspo.train.outcomes import by_source, outcome_of
from megatron_gspo.train.survey import judge_drawn
from megatron_gspo.types import Prompt, Rollout, RolloutGroup


def rollout(prompt: Prompt, sample: int = 0, tokens: int = 2) -> Rollout:
    ids, logprobs = np.ones(tokens, np.int32), np.zeros(tokens, np.float32)
    return Rollout(prompt, sample, ids, logprobs, "stop", (0,), "42")


def group(*rewards: float, source: str = "") -> RolloutGroup:
    prompt = Prompt("p", "?", (1,), "42", source=source)
    return RolloutGroup(prompt, tuple(rollout(prompt, i) for i in range(len(rewards))), np.array(rewards))


def test_each_source_has_its_own_numbers() -> None:
    rows = [
        ("math", np.array([1.0, 0.0]), np.array([4, 6]), 1.0),
        ("math", np.array([1.0, 1.0]), np.array([2, 2]), 1.0),
        ("judged", np.array([-3.0, 5.0, 5.0]), np.array([1, 2, 3]), float("inf")),
    ]
    assert by_source(rows, ["math", "judged", "idle"]) == {
        "source/math/groups": 2.0,
        "source/math/reward": 0.75,
        "source/math/accuracy": 0.75,
        "source/math/length": 3.5,
        "source/math/zero_std_groups": 0.5,
        "source/judged/groups": 1.0,
        "source/judged/reward": pytest.approx(7 / 3),
        "source/judged/length": 2.0,
        "source/judged/zero_std_groups": 0.0,
        "source/idle/groups": 0.0,
    }


def test_metrics_of_sources_have_rows_charts_and_labels() -> None:
    names = [f"source/{name}/{kind}" for name in ("math", "a-b") for kind in ("reward", "accuracy", "groups")]
    assert {row_of(name) for name in names} <= set(METRICS)
    (chart,) = (chart for chart in CHARTS if chart.title == "Reward by source")
    assert {curve.label for curve in for_families(chart, names).curves} == {"a-b", "math"}
    assert series_name("source/a-b/zero_std_groups") == ("source_zero_std_groups", {"source": "a-b"})


class Ranged(Reward):
    @property
    def range(self) -> tuple[float, float]:
        return -1.0, 3.0


@pytest.mark.parametrize(
    ("rewards", "outcome"), [((1.0, 1.0), "easy"), ((0.0, 0.0), "hard"), ((0.5, 0.5), "hard"), ((0.0, 1.0), "varied")]
)
def test_a_group_of_equal_rewards_is_easy_in_the_upper_half_of_the_range(
    rewards: tuple[float, ...], outcome: str
) -> None:
    assert outcome_of(group(*rewards), resolve_reward(RewardConfig(function="exact"))) == outcome
    assert outcome_of(group(0.9, 0.9), Ranged("mine", cast(Any, len))) == "hard"
    assert outcome_of(group(1.1, 1.1), Ranged("mine", cast(Any, len))) == "easy"


def test_each_group_is_graded_by_the_reward_of_its_source_and_shared_ones_together() -> None:
    exact, math, default = (resolve_reward(RewardConfig(function=name)) for name in ("exact", "math", "gsm8k"))
    run = SimpleNamespace(source_rewards={"a": exact, "b": math, "c": exact}, reward=default)
    run.reward_of = lambda prompt: Run.reward_of(cast(Any, run), prompt)
    survivors = {at: group(1.0, source=source).rollouts for at, source in enumerate("abcb")}
    survivors[4] = group(1.0).rollouts
    found = by_reward(cast(Any, run), survivors)
    assert [(reward.name, places) for reward, places in found] == [("exact", [0, 2]), ("math", [1, 3]), ("gsm8k", [4])]


class Places:
    def place(self, index: int) -> str:
        return f"line {index}"


def test_references_of_drawn_prompts_are_judged_by_their_own_source() -> None:
    def check(name: str) -> ReferenceCheck:
        return ReferenceCheck(resolve_reward(RewardConfig(function=name)), lambda text: [1] * len(text), 0)

    checks = {"": check("exact"), "math": check("math"), "numbers": check("gsm8k")}
    words = {at: (10 + at, Prompt(f"p{at}", "?", (1,), "east", source=name)) for at, name in enumerate(checks)}
    found = judge_drawn(checks, cast(Any, Places()), words, skip_bad=True)
    assert set(found) == {2} and found[2].startswith("line 12: the reference answer cannot be graded")
    assert judge_drawn(checks, cast(Any, Places()), words, skip_bad=False) == found  # it would end the run
