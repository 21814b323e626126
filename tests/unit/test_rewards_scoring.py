"""Finding reward functions, and scoring with them."""

from __future__ import annotations

import asyncio
import importlib
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from megatron_gspo.config import RewardConfig
from megatron_gspo.errors import ConfigError, RewardError
from megatron_gspo.rewards import (
    BUILTIN_REWARDS,
    GroupRewards,
    Reward,
    Stopped,
    TokenRewards,
    resolve_reward,
    score_groups,
)
from megatron_gspo.rewards.scoring import SYNC_THREADS
from megatron_gspo.types import Prompt, Rollout

NEEDED: dict[str, dict[str, Any]] = {
    "weighted": {"parts": [{"function": "exact"}]},
    "length": {"relative": True},
    "language": {"scripts": ["latin"]},
    "judge": {"url": "http://h:1", "model": "m"},
    "judge_ranking": {"url": "http://h:1", "model": "m"},
    "remote": {"url": "http://h:1"},
}
"""Options without which a built-in reward cannot be made."""
QUICKSTART = Path(__file__).parents[2] / "examples" / "quickstart" / "reward.py"


def group(name: str, *lengths: int) -> list[Rollout]:
    prompt = Prompt(name, "?", (1,), "42")
    return [
        Rollout(prompt, i, np.ones(n, np.int32), np.zeros(n, np.float32), "stop", (0,), f"text {i}")
        for i, n in enumerate(lengths)
    ]


def score(function: Callable[..., Any], groups: Sequence[list[Rollout]], **settings: Any) -> list[GroupRewards]:
    return asyncio.run(score_groups(Reward("test", function, **settings), groups))


GROUPS = [group("a", 3, 1), group("b", 2, 5, 4)]


def by_length(prompt: Prompt, response: Rollout) -> float:
    return len(response.response_ids) / 10


async def by_length_async(prompt: Prompt, response: Rollout) -> float:
    await asyncio.sleep(0.001 * (5 - len(response.response_ids)))  # finishes in another order than it started
    return len(response.response_ids) / 10


class Judge:
    async def __call__(self, prompt: Prompt, response: Rollout) -> float:
        return by_length(prompt, response)


@pytest.mark.parametrize("function", [by_length, by_length_async, Judge()])
def test_every_response_gets_its_own_reward(function: Callable[..., Any]) -> None:
    first, second = score(function, GROUPS)
    np.testing.assert_array_equal(first.rewards_G, [0.3, 0.1])
    np.testing.assert_array_equal(second.rewards_G, [0.2, 0.5, 0.4])
    assert first.rewards_G.dtype == np.float64
    assert first.token_rewards_G is None


def test_token_rewards_are_kept_and_their_mean_is_the_reward() -> None:
    def half(prompt: Prompt, response: Rollout) -> float | TokenRewards:
        n = len(response.response_ids)
        return TokenRewards.from_turns([1.0, 0.25], [1, n - 1]) if n > 1 else 0.5

    (result,) = score(half, [group("a", 4, 1)])
    np.testing.assert_allclose(result.rewards_G, [(1 + 3 * 0.25) / 4, 0.5], rtol=0, atol=1e-15)
    assert result.token_rewards_G is not None
    np.testing.assert_array_equal(result.token_rewards_G[0], [1, 0.25, 0.25, 0.25])
    np.testing.assert_array_equal(result.token_rewards_G[1], [0.5])


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (float("nan"), r"returned nan, outside \[0, 1\]"),
        (1.5, r"returned 1.5, outside \[0, 1\]"),
        (-0.1, r"returned -0.1, outside \[0, 1\]"),
        (float("inf"), "returned inf, outside"),
        (None, "returned None, not a number"),
        ("0.5", "returned '0.5', not a number"),
        ([1.0, 0.0], r"returned \[1.0, 0.0\], not a number .*wrap them in TokenRewards"),
        (np.ones(3), r"returned array.*wrap them in TokenRewards"),
        (TokenRewards(np.array([1.0, 0.0])), r"returned token rewards of shape \[2\], not one a token"),
        (TokenRewards(np.array([1.0, 0.0, 2.0])), "returned 2.0, outside"),
    ],
)
def test_an_unusable_value_names_prompt_sample_and_value(value: Any, message: str) -> None:
    with pytest.raises(RewardError, match=rf"reward 'test' ({message}).*prompt 'a', sample 0"):
        score(lambda prompt, response: value, [group("a", 3)])


@pytest.mark.parametrize("is_async", [False, True])
def test_a_raising_function_names_the_response_and_keeps_its_error(is_async: bool) -> None:
    def fail(prompt: Prompt, response: Rollout) -> float:
        if response.sample == 1:
            raise KeyError("solution")
        return 1.0

    async def fail_async(prompt: Prompt, response: Rollout) -> float:
        return fail(prompt, response)

    with pytest.raises(RewardError, match=r"raised KeyError: 'solution'.*prompt 'a', sample 1") as caught:
        score(fail_async if is_async else fail, GROUPS)
    assert isinstance(caught.value.__cause__, KeyError)


def leave(prompt: Prompt, response: Rollout) -> float:
    raise SystemExit(0)


async def leave_async(prompt: Prompt, response: Rollout) -> float:
    raise SystemExit(0)


@pytest.mark.parametrize("function", [leave, leave_async])
def test_a_function_that_exits_fails_and_does_not_end_the_process(function: Callable[..., Any]) -> None:
    with pytest.raises(RewardError, match=r"raised RuntimeError: sys.exit\(0\) \(prompt 'a', sample 0"):
        score(function, GROUPS)


@pytest.mark.parametrize("is_async", [False, True])
def test_a_hanging_function_is_given_up_in_time(is_async: bool) -> None:
    over = threading.Event()

    def hang(prompt: Prompt, response: Rollout) -> float:
        return float(over.wait(60))

    async def hang_async(prompt: Prompt, response: Rollout) -> float:
        await asyncio.sleep(60)
        return 1.0

    start = time.monotonic()
    with pytest.raises(RewardError, match=r"gave no answer within 0.1 s .*prompt 'a'"):
        score(hang_async if is_async else hang, GROUPS, timeout_s=0.1)
    over.set()
    assert time.monotonic() - start < 30


def test_a_built_in_reward_that_takes_too_long_gives_0_and_is_counted() -> None:
    def hang(prompt: Prompt, response: Rollout) -> float:
        return float(response.sample != 1 or over.wait(60))

    over = threading.Event()
    first, second = score(hang, GROUPS, timeout_s=1.5, built_in=True)
    over.set()
    np.testing.assert_array_equal(first.rewards_G, [1, 0])
    np.testing.assert_array_equal(second.rewards_G, [1, 0, 1])
    assert (first.stopped, second.stopped) == (1, 1)


def test_a_reward_that_says_it_was_stopped_is_0_and_counted() -> None:
    def stop(prompt: Prompt, response: Rollout) -> float | TokenRewards:
        n = len(response.response_ids)
        return {0: Stopped(), 1: 0.5, 2: TokenRewards(np.ones(n))}[response.sample]

    first, second = score(stop, GROUPS)
    np.testing.assert_array_equal(first.rewards_G, [0, 0.5])
    np.testing.assert_array_equal(second.rewards_G, [0, 0.5, 1])
    assert (first.stopped, second.stopped) == (1, 1)
    assert second.token_rewards_G is not None
    np.testing.assert_array_equal(second.token_rewards_G[0], [0, 0])


def test_only_built_in_names_are_built_in() -> None:
    for name in set(BUILTIN_REWARDS) - {"reward_model"}:  # which asks its server when it is made
        reward = resolve_reward(RewardConfig(function=name, options=NEEDED.get(name, {})))
        assert reward.built_in and reward.name == name
        reward.close()
    assert not resolve_reward(RewardConfig(function=f"{QUICKSTART}:running_sum")).built_in
    assert not resolve_reward(RewardConfig(function="megatron_gspo.rewards.gsm8k:gsm8k")).built_in


def test_waiting_for_a_turn_does_not_count_as_hanging() -> None:
    def slow(prompt: Prompt, response: Rollout) -> float:
        time.sleep(0.5)
        return 1.0

    (result,) = score(slow, [group("a", *[1] * (3 * SYNC_THREADS))], timeout_s=1.25)
    assert result.rewards_G.sum() == 3 * SYNC_THREADS


def test_calls_in_flight_are_bounded() -> None:
    in_flight, most = 0, 0

    async def count(prompt: Prompt, response: Rollout) -> float:
        nonlocal in_flight, most
        in_flight += 1
        most = max(most, in_flight)
        await asyncio.sleep(0.001)
        in_flight -= 1
        return 0.0

    score(count, [group("a", *[1] * 20)], concurrency=3)
    assert most == 3


def test_a_failure_leaves_no_call_running() -> None:
    finished = []

    async def work(prompt: Prompt, response: Rollout) -> float:
        if response.sample == 0:
            raise ValueError("no")
        await asyncio.sleep(0.05)
        finished.append(response.sample)
        return 0.0

    async def run() -> None:
        with pytest.raises(RewardError):
            await score_groups(Reward("test", work), [group("a", 1, 1)])
        await asyncio.sleep(0.1)

    asyncio.run(run())
    assert finished == []


def test_every_built_in_name_resolves() -> None:
    page = (Path(__file__).parents[2] / "docs" / "rewards.md").read_text()
    for name, where in BUILTIN_REWARDS.items():
        module, _, attribute = where.partition(":")
        assert callable(getattr(importlib.import_module(module), attribute)) and f"`{name}`" in page


def test_options_are_bound_and_settings_carried() -> None:
    reward = resolve_reward(RewardConfig(function="gsm8k", options={"format_reward": 0.2}, timeout_s=7, concurrency=5))
    prompt, rollout = group("a", 1)[0].prompt, group("a", 1)[0]
    wrong = Rollout(prompt, 0, rollout.response_ids, rollout.rollout_logprobs, "stop", (0,), "#### 43")
    assert reward.function(prompt, wrong) == 0.2
    assert (reward.timeout_s, reward.concurrency) == (7, 5)


def test_a_file_is_a_reward_and_is_imported_once() -> None:
    name = f"{QUICKSTART}:running_sum"
    reward = resolve_reward(RewardConfig(function=name))
    prompt = Prompt("p", "27=", (2, 7, 10), "29")

    def rate(text: str, finish: Any = "stop") -> Any:
        ids = np.zeros(3, np.int32)
        return reward.function(prompt, Rollout(prompt, 0, ids, ids.astype(np.float32), finish, (0,), text))

    assert [rate("29"), rate("59"), rate("28"), rate("9"), rate(""), rate("29", "length")] == [1, 1, 0, 0, 0, 0]
    assert resolve_reward(RewardConfig(function=name)).function is reward.function


@pytest.mark.parametrize(
    ("function", "message"),
    [
        ("exakt", "is unknown: use exact, arithmetic, gsm8k, .* package.module:function or"),
        ("no.such.module:f", "ModuleNotFoundError: No module named 'no'.*a file works too"),
        ("no/such/file.py:f", "FileNotFoundError: .*no/such/file.py does not exist"),
        ("math:no_such", "math has no 'no_such'"),
        ("math:pi", "is a float, not a function"),
        ("exact:", "is unknown"),
    ],
)
def test_a_path_that_leads_nowhere_is_a_clear_error(function: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        resolve_reward(RewardConfig(function=function))


def test_a_file_that_fails_on_import_is_a_clear_error(tmp_path: Path) -> None:
    (tmp_path / "broken.py").write_text("1 / 0")
    for _ in range(2):  # the failed module is not left behind half made
        with pytest.raises(ConfigError, match="ZeroDivisionError: division by zero"):
            resolve_reward(RewardConfig(function=f"{tmp_path}/broken.py:f"))


def test_an_option_that_the_function_does_not_take_is_a_clear_error() -> None:
    with pytest.raises(ConfigError, match=r"options formt_reward: got an unexpected keyword argument"):
        resolve_reward(RewardConfig(function="gsm8k", options={"formt_reward": 0.1}))
