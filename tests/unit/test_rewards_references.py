"""References graded as responses: what is found, how often a reward is called, and what is left alone."""

from __future__ import annotations

import random
import threading
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

from megatron_gspo.config import RewardConfig
from megatron_gspo.rewards import references
from megatron_gspo.rewards.references import ReferenceCheck, Survey
from megatron_gspo.rewards.registry import Reward, resolve_reward
from megatron_gspo.types import Prompt, Rollout

EOS = 0


def prompt(number: int, answer: str, **metadata: Any) -> Prompt:
    return Prompt(f"line-{number}", f"{number}?", (1,), answer, metadata)


def prompts(*answers: str) -> list[Prompt]:
    return [prompt(number, answer) for number, answer in enumerate(answers, start=1)]


def check(reward: str | Callable[..., Any], **settings: Any) -> ReferenceCheck:
    found = (
        resolve_reward(RewardConfig(function=reward))
        if isinstance(reward, str)
        else Reward("mine.py:f", reward, timeout_s=settings.pop("timeout_s", 5.0))
    )
    return ReferenceCheck(found, lambda text: [ord(c) for c in text], EOS, **settings)


def survey(reward: str | Callable[..., Any], these: list[Prompt], **settings: Any) -> Survey:
    return check(reward, **settings).survey(these, range(len(these)))


@pytest.mark.parametrize("reward", ["gsm8k", "arithmetic"])
def test_a_reference_that_a_built_in_reward_cannot_grade_is_found_wherever_it_stands(reward: str) -> None:
    found = survey(reward, prompts(*map(str, range(20)), "no solution", "3"))
    assert (set(found.problems), found.fatal, found.error) == ({20}, {20}, None)
    assert "the reference answer cannot be graded" in found.problems[20] and "'no solution'" in found.problems[20]
    assert (found.graded, found.distinct, found.looked_at, found.bad_prompts) == (21, 21, 22, 1)


@pytest.mark.parametrize(("reward", "fatal"), [("gsm8k", True), ("arithmetic", True), ("exact", False)])
def test_an_absent_reference_is_found_where_the_reward_needs_one(reward: str, fatal: bool) -> None:
    found = survey(reward, prompts("1", "", "2", "", " "))
    assert set(found.problems) == {1, 4}
    assert f"there is no reference answer, and '{reward}' needs one" in found.problems[1]
    assert bool(found.fatal) is fatal and found.bad_prompts == 3


def test_a_reference_that_a_built_in_reward_gives_0_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    one = check("exact")
    monkeypatch.setattr(one, "_reward", Reward("exact", lambda p, r: float(p.answer != "unlucky")))
    found = one.survey(prompts("a", "unlucky"), [0, 1])
    assert (found.problems, found.fatal) == ({1: "the reward gives the reference answer 0"}, frozenset())


def test_of_a_users_reward_a_0_is_found_only_where_others_score() -> None:
    assert survey(lambda p, r: float(r.text == "a"), prompts("a", "b")).problems.keys() == {1}
    assert not survey(lambda p, r: 0.0, prompts("a", "b")).problems


def test_a_users_reward_may_do_without_references() -> None:
    """It is called once, on something: raising would end the run, what it returns says nothing."""
    seen: list[str] = []

    def judge(prompt: Prompt, response: Rollout) -> float:
        seen.append(response.text)
        return 0.0 if prompt.metadata else 1.0

    assert not survey(judge, [*prompts("", ""), prompt(3, "", gold="7")]).problems
    assert seen == ["0", "0"]

    def needs_gold(prompt: Prompt, response: Rollout) -> float:
        return float(response.text == prompt.metadata["gold"])

    found = survey(needs_gold, [prompt(1, "", gold="7"), prompt(2, "")])
    assert set(found.problems) == found.fatal == {1} and "KeyError: 'gold'" in found.problems[1]


def test_a_users_reward_that_raises_on_everything_is_at_fault_itself() -> None:
    def broken(prompt: Prompt, response: Rollout) -> float:
        raise RuntimeError("paper jam")

    found = survey(broken, prompts("1", "2"))
    assert found.error is not None and "raised RuntimeError: paper jam" in str(found.error)


def test_a_reward_that_hangs_is_given_up_after_a_few(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(references, "FAILING_S", 0.1)
    over, begin = threading.Event(), time.monotonic()
    found = survey(lambda p, r: over.wait(60), prompts(*map(str, range(500))), timeout_s=0.2)
    over.set()
    assert time.monotonic() - begin < 30
    assert found.error is not None and "gave no answer within 0.2 s" in str(found.error)
    assert found.graded == references.FIRST_BATCH


def test_grading_stops_when_its_time_is_over_and_says_how_far_it_came() -> None:
    these = prompts(*map(str, range(500)))
    slow = check(lambda p, r: time.sleep(0.02) or 1.0)
    found = slow.survey(these, range(500), budget_s=0.05)
    assert references.FIRST_BATCH <= found.graded < 500 and not found.problems
    assert found.describe() == f"{found.graded} of 500 distinct references of 500 prompts graded, 0 unusable"


def test_equal_references_are_graded_once_and_of_too_many_a_sample_is() -> None:
    calls: list[str] = []

    def reward(prompt: Prompt, response: Rollout) -> float:
        calls.append(prompt.answer)
        return 1.0

    survey(reward, prompts("1", "2", "1", "2"))
    assert sorted(calls) == ["1", "2"]
    samples = []
    for seed in (0, 0, 1):
        calls.clear()
        assert survey(reward, prompts(*map(str, range(100))), limit=10, seed=seed).graded == 10
        samples.append(sorted(calls))
    assert samples[0] == samples[1] != samples[2]


def test_an_async_reward_is_called_few_times_and_not_when_prompts_are_drawn() -> None:
    calls: list[str] = []

    async def judge(prompt: Prompt, response: Rollout) -> float:
        calls.append(prompt.answer)
        return 1.0

    these = prompts(*map(str, range(50)))
    one = check(judge)
    one.survey(these, range(50))
    assert len(calls) == references.SPARING_LIMIT
    one.judge({0: these[-1], 1: these[-2]})
    assert len(calls) == references.SPARING_LIMIT


def test_a_reference_that_was_not_graded_before_is_when_it_is_drawn() -> None:
    one = check("gsm8k", limit=2)
    one.survey(prompts("1", "2"), [0, 1])
    later = {0: prompt(7, "3"), 4: prompt(8, "none")}
    assert set(one.judge(later)) == {4} and one.is_fatal(later[4]) and not one.is_fatal(later[0])
    assert check("gsm8k", limit=0).judge(later) == {} == check("gsm8k", limit=0).survey([later[4]], [0]).problems


def test_grading_leaves_every_generator_as_it_was() -> None:
    def chance(prompt: Prompt, response: Rollout) -> float:
        return (random.random() + float(np.random.rand()) + float(torch.rand(()))) / 3

    random.seed(1), np.random.seed(1), torch.manual_seed(1)
    expected = random.random(), np.random.rand(), float(torch.rand(()))
    random.seed(1), np.random.seed(1), torch.manual_seed(1)
    survey(chance, prompts("a", "b"))
    assert (random.random(), np.random.rand(), float(torch.rand(()))) == expected
