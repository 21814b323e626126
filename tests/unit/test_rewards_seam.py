"""What a reward may be and return beyond a number: classes, groups, components, ranges, and no grade at all."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import pytest

from megatron_gspo.config import RewardConfig
from megatron_gspo.errors import ConfigError, RewardError
from megatron_gspo.rewards import (
    Reward,
    RewardContext,
    Score,
    TokenRewards,
    Ungraded,
    resolve_reward,
    score_groups,
)
from megatron_gspo.rewards.references import ReferenceCheck
from megatron_gspo.types import Prompt, Rollout
from tests.unit.reward_cases import by_length, group, score

# What is returned


def test_a_score_has_its_reward_and_its_components() -> None:
    (found,) = score(by_length, group("x", "four"))
    assert found.rewards_G.tolist() == [0.1, 0.4]
    assert found.components_G == ({"long": 1.0, "odd": 1.0}, {"long": 4.0, "odd": 0.0})
    assert found.ungraded_G == () and found.graded == [0, 1]


def test_a_score_may_have_one_reward_a_token() -> None:
    (found,) = score(lambda p, r: Score(TokenRewards(np.array([0.0, 1.0])), {"n": 2}), group("ab"))
    assert found.rewards_G.tolist() == [0.5] and found.token_rewards_G is not None
    assert found.token_rewards_G[0].tolist() == [0.0, 1.0] and found.components_G == ({"n": 2.0},)


def test_what_was_not_graded_has_no_reward_and_says_why() -> None:
    (found,) = score(by_length, group("x", "bad", "four"))
    assert np.isnan(found.rewards_G[1]) and found.graded == [0, 2]
    assert found.ungraded_G == ("", "the grader is away", "")
    kept = found.of(found.graded)
    assert kept.rewards_G.tolist() == [0.1, 0.4] and kept.ungraded_G == ()
    assert [table["long"] for table in kept.components_G] == [1.0, 4.0]


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (Score(0.5, {"Right": 1.0}), r"a component called 'Right', not \[a-z0-9_\]\+"),
        (Score(0.5, {"a/b": 1.0}), "a component called 'a/b'"),
        (Score(0.5, {"": 1.0}), "a component called ''"),
        (Score(0.5, {"part": float("nan")}), "returned nan for the component 'part', no finite number"),
        (Score(0.5, {"part": float("inf")}), "returned inf for the component 'part'"),
        (Score(0.5, cast(Any, {"part": "1"})), "returned '1' for the component 'part'"),
        (Score(0.5, {f"p{i}": 1.0 for i in range(65)}), "components that are no table of 64 \\(65 of them"),
        (Score(0.5, cast(Any, [("part", 1.0)])), "components that are no table"),
        (Score(1.5), r"returned 1.5, outside \[0, 1\]"),
        (Score(cast(Any, Ungraded("x"))), "returned Ungraded.*not a number"),
    ],
)
def test_a_score_that_is_none_names_the_response(value: Any, message: str) -> None:
    with pytest.raises(RewardError, match=rf"reward 'mine' returned .*{message.removeprefix('returned ')}.*prompt 'a'"):
        score(lambda p, r: value, group("x"))


class Ranged:
    def __init__(self, low: float, high: float) -> None:
        self.range = (low, high)

    def __call__(self, prompt: Prompt, response: Rollout) -> float:
        return float(response.text)


@pytest.mark.parametrize(
    ("span", "inside", "outside", "shown"),
    [
        ((-1.0, 2.0), "-0.5", "2.001", r"\[-1, 2\]"),
        ((float("-inf"), float("inf")), "-1234.5", "inf", r"\(-inf, inf\)"),
        ((0.0, float("inf")), "7", "-0.1", r"\[0, inf\)"),
    ],
)
def test_a_reward_may_say_another_range(span: tuple[float, float], inside: str, outside: str, shown: str) -> None:
    (found,) = score(Ranged(*span), group(inside))
    assert found.rewards_G.tolist() == [float(inside)]
    with pytest.raises(RewardError, match=f"outside {shown}"):
        score(Ranged(*span), group(outside))


@pytest.mark.parametrize("span", [(1.0, 0.0), (0.0, 0.0), (0.0, float("nan")), "01", None, (0.0, 1.0, 2.0)])
def test_a_range_that_is_none_is_refused(tmp_path: Path, span: Any) -> None:
    text = f"class Mine:\n    range = {span!r}\n    def __call__(self, prompt, response): return 0.0\n"
    with pytest.raises(ConfigError, match="has the range"):
        resolve_reward(RewardConfig(function=write(tmp_path, text.replace("nan", "float('nan')"))))


# Classes


def write(tmp_path: Path, text: str, name: str = "Mine") -> str:
    path = tmp_path / "rewards.py"
    path.write_text(text)
    return f"{path}:{name}"


CLASS = """
import asyncio
LOG = []
class Mine:
    def __init__(self, weight, context):
        LOG.append("made")
        self.weight, self.context = weight, context
    async def __aenter__(self):
        LOG.append("enter")
        self.loop = asyncio.get_running_loop()
        return self
    async def __aexit__(self, *error):
        LOG.append(f"leave {error[0].__name__ if error[0] else None}")
    async def __call__(self, prompt, response):
        assert asyncio.get_running_loop() is self.loop
        LOG.append(f"score {response.sample}")
        if response.text == "fail":
            raise KeyError("x")
        return self.weight
    def close(self):
        LOG.append("close")
"""


def test_a_class_is_made_once_entered_around_each_scoring_and_closed_at_the_end(tmp_path: Path) -> None:
    context = RewardContext(run_dir="runs/x", model_path="m")
    name = write(tmp_path, CLASS)
    reward = resolve_reward(RewardConfig(function=name, options={"weight": 0.25}), context)
    made: Any = reward.function
    log = type(made).__init__.__globals__["LOG"]
    assert made.context == replace(context, config=RewardConfig(function=name, options={"weight": 0.25}))
    assert log == ["made"]
    (found,) = asyncio.run(score_groups(reward, [group("a", "b")]))
    assert found.rewards_G.tolist() == [0.25, 0.25]
    assert log == ["made", "enter", "score 0", "score 1", "leave None"]
    del log[:]
    with pytest.raises(RewardError, match="raised KeyError"):
        asyncio.run(score_groups(reward, [group("fail")]))
    assert log == ["enter", "score 0", "leave RewardError"]
    reward.close()
    assert log[-1] == "close"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "cannot be made with the options none: missing a required argument: 'weight'"),
        ({"weight": 1, "height": 2}, "got an unexpected keyword argument 'height'"),
    ],
)
def test_options_that_a_class_does_not_take_are_refused(tmp_path: Path, options: Any, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        resolve_reward(RewardConfig(function=write(tmp_path, CLASS), options=options))


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ("def __init__(self): raise ValueError('no key')", "could not be made: ValueError: no key"),
        ("def __init__(self): raise SystemExit(3)", "could not be made: SystemExit: 3"),
        ("pass", "has neither __call__ nor score_group"),
        (
            "on_timeout = 'never'\n    def __call__(self, prompt, response): return 0.0",
            "on_timeout = 'never', not one of",
        ),
    ],
)
def test_a_class_that_cannot_be_had_is_refused(tmp_path: Path, body: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        resolve_reward(RewardConfig(function=write(tmp_path, f"class Mine:\n    {body}\n")))


class Lives:
    def __init__(self, enter: Any = None, leave: Any = None) -> None:
        self.enter, self.leave = enter, leave

    async def __aenter__(self) -> None:
        await self._do(self.enter)

    async def __aexit__(self, *error: object) -> bool:
        await self._do(self.leave)
        return True  # swallows nothing all the same

    async def _do(self, what: Any) -> None:
        if what == "hang":
            await asyncio.sleep(60)
        elif what:
            raise what

    def __call__(self, prompt: Prompt, response: Rollout) -> float:
        return 2.0 if response.text == "fail" else 1.0


@pytest.mark.parametrize(
    ("lives", "message"),
    [
        (Lives(enter=OSError("no")), "__aenter__ raised OSError: no"),
        (Lives(leave=OSError("no")), "__aexit__ raised OSError: no"),
        (Lives(enter=SystemExit(0)), r"__aenter__ raised RuntimeError: sys.exit\(0\)"),
        (Lives(enter="hang"), "__aenter__ did not end within 0.2 s"),
        (Lives(leave="hang"), "__aexit__ did not end within 0.2 s"),
    ],
)
def test_a_lifetime_is_held_to_the_same_limits(lives: Lives, message: str) -> None:
    with pytest.raises(RewardError, match=message):
        score(lives, group("a"), timeout_s=0.2)


@pytest.mark.parametrize("leave", [None, OSError("later")])
def test_an_error_of_the_scoring_comes_before_one_of_leaving(leave: Any) -> None:
    with pytest.raises(RewardError, match=r"returned 2\.0, outside"):
        score(Lives(leave=leave), group("fail"), timeout_s=5)


def test_what_close_raises_is_said_and_ends_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    class Mine(Lives):
        def close(self) -> None:
            raise SystemExit(1)

    Reward("mine", Mine()).close()
    assert "reward 'mine': close() raised SystemExit: 1" in capsys.readouterr().err


# Groups


class Ranked:
    """1 for the longest response, 0 for the shortest."""

    def __init__(self) -> None:
        self.seen: list[tuple[str, int]] = []

    def score_group(self, prompt: Prompt, responses: Sequence[Rollout]) -> list[float]:
        self.seen.append((prompt.id, len(responses)))
        order = sorted(range(len(responses)), key=lambda i: len(responses[i].text))
        return [order.index(i) / max(1, len(order) - 1) for i in range(len(responses))]


class RankedAsync:
    async def score_group(self, prompt: Prompt, responses: Sequence[Rollout]) -> list[float]:
        await asyncio.sleep(0)
        return Ranked().score_group(prompt, responses)


OTHER = Prompt("b", "?", (1,), "7")


@pytest.mark.parametrize("made", [Ranked, RankedAsync])
def test_a_reward_of_groups_sees_each_group_whole(made: Callable[[], Any]) -> None:
    reward = made()
    first, none, second = score(reward, group("aa", "a", "aaa"), [], group("b", "bb", prompt=OTHER))
    assert first.rewards_G.tolist() == [0.5, 0.0, 1.0] and second.rewards_G.tolist() == [0.0, 1.0]
    assert len(none.rewards_G) == 0
    if isinstance(reward, Ranked):
        assert sorted(reward.seen) == [("a", 3), ("b", 2)]


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ([0.5], r"returned \[0.5\], 1 results for the 2 responses of a group"),
        (0.5, "returned 0.5 for the 2 responses of a group, not one each"),
        (None, "returned None for the 2 responses"),
        ("01", "returned '01', 2 results"),
        ([0.5, 7.0], "returned 7.0, outside.*sample 1"),
    ],
)
def test_a_group_that_does_not_get_one_result_each_is_refused(value: Any, message: str) -> None:
    with pytest.raises(RewardError, match=message):
        score(SimpleNamespace(score_group=lambda prompt, responses: value), group("a", "b"))


@pytest.mark.parametrize(
    ("late", "low", "built_in", "found"),
    [(None, 0, True, "zero"), (None, -1, True, "ungraded"), ("ungraded", 0, False, "ungraded"), (None, 0, False, None)],
)
def test_a_group_that_is_late_gets_what_its_reward_says(late: Any, low: int, built_in: bool, found: Any) -> None:
    class Slow:
        range = (low, 1)

        async def score_group(self, prompt: Prompt, responses: Sequence[Rollout]) -> list[float]:
            await asyncio.sleep(60)
            return []

    if late:
        Slow.on_timeout = late  # type: ignore[attr-defined]
    if found is None:
        with pytest.raises(RewardError, match=r"gave no answer within 0\.1 s"):
            score(Slow(), group("a", "b"), timeout_s=0.1)
        return
    (rewards,) = score(Slow(), group("a", "b"), timeout_s=0.1, built_in=built_in)
    assert rewards.stopped == (2 if found == "zero" else 0)
    assert len(rewards.graded) == (2 if found == "zero" else 0)


# Before training


def test_references_are_looked_at_within_one_lifetime_and_a_group_of_one() -> None:
    entered: list[int] = []

    class Mine(Ranked):
        open = False

        async def __aenter__(self) -> None:
            assert not self.open
            self.open = True
            entered.append(1)

        async def __aexit__(self, *error: object) -> None:
            self.open = False

    these = [Prompt(f"p{i}", "?", (1,), str(i)) for i in range(5)]
    check = ReferenceCheck(Reward("mine", Mine()), lambda text: [ord(c) for c in text], 0)
    found = check.survey(these, range(5))
    assert len(entered) == 1 and found.graded == 5 and check.limit == 10_000


def test_a_grader_that_is_away_says_nothing_of_a_reference_but_one_that_grades_none_is_refused() -> None:
    these = [Prompt(f"p{i}", "?", (1,), str(i)) for i in range(4)]

    def check(away: Callable[[str], bool]) -> ReferenceCheck:
        def mine(prompt: Prompt, response: Rollout) -> Any:
            return Ungraded("HTTP 503") if away(prompt.answer) else 1.0

        return ReferenceCheck(Reward("mine", mine), lambda text: [ord(c) for c in text], 0)

    some = check(lambda answer: answer == "2").survey(these, range(4))
    assert some.error is None and not some.problems and not some.fatal
    none = check(lambda answer: True).survey(these, range(4))
    assert none.error is not None and "graded no reference: HTTP 503" in str(none.error)


def test_the_page_s_way_to_try_a_reward_works_as_it_stands(capsys: pytest.CaptureFixture[str]) -> None:
    page = (Path(__file__).parents[2] / "docs/rewards.md").read_text("utf-8")
    (code,) = [
        block.split("```")[0] for block in page.split("```python\n")[1:] if "asyncio.run" in block.split("```")[0]
    ]
    exec(compile(code, "docs/rewards.md", "exec"), {})
    assert "rewards_G=array([1., 0.])" in capsys.readouterr().out
