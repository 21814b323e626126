"""Sums of rewards, and penalties for length, repetition, form and language."""

from __future__ import annotations

import asyncio
import tomllib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from report_runs import make_config

from megatron_gspo.config import RewardConfig, dump, parse
from megatron_gspo.errors import ConfigError, RewardError
from megatron_gspo.rewards import GroupRewards, Reward, RewardContext, resolve_reward, score_groups
from megatron_gspo.rewards.registry import check_reward, named_functions
from megatron_gspo.rewards.scoring import guarded
from megatron_gspo.types import Prompt, Rollout

PROMPT = Prompt("a", "<user>6*7=", (1,), "42")


def group(*texts: str, prompt: Prompt = PROMPT) -> list[Rollout]:
    return [
        Rollout(prompt, i, np.arange(len(text), dtype=np.int32), np.zeros(len(text), np.float32), "stop", (0,), text)
        for i, text in enumerate(texts)
    ]


def made(function: str, timeout_s: float = 60.0, **options: Any) -> Reward:
    return resolve_reward(RewardConfig(function=function, options=options, timeout_s=timeout_s))


def score(reward: Reward, *groups: Sequence[Rollout]) -> list[GroupRewards]:
    with guarded(reward):
        return asyncio.run(score_groups(reward, groups))


def rewards(reward: Reward, *texts: str, prompt: Prompt = PROMPT) -> list[float]:
    return score(reward, group(*texts, prompt=prompt))[0].rewards_G.tolist()


# Penalties


def test_length_is_0_up_to_its_start_linear_and_1_from_its_end() -> None:
    lengths = ("", "x" * 10, "x" * 12, "x" * 15, "x" * 18, "x" * 19)
    assert rewards(made("length", start=10, end=18), *lengths) == [0, 0, 0.25, 0.625, 1, 1]
    assert rewards(made("length", end=4), "xxx") == [0.75]


def test_relative_length_is_among_the_responses_of_a_group() -> None:
    first, second = score(made("length", relative=True), group("x" * 2, "x" * 5, "x" * 12), group("xx", "xx"))
    assert first.rewards_G.tolist() == [0, 0.3, 1] and second.rewards_G.tolist() == [0, 0]


@pytest.mark.parametrize(
    "options", [{}, {"start": 5}, {"start": 5, "end": 5}, {"start": -1, "end": 5}, {"end": 5, "relative": True}]
)
def test_a_length_that_is_none_is_refused(options: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match="either 0 <= start < end, in tokens, or relative = true"):
        made("length", **options)


def test_repetition_is_the_share_of_n_grams_that_have_been_there() -> None:
    def of(ids: list[int], **options: Any) -> float:
        response = Rollout(PROMPT, 0, np.array(ids, np.int32), np.zeros(len(ids), np.float32), "stop", (0,), "")
        return float(score(made("repetition", **options), [response])[0].rewards_G[0])

    assert of([1, 2, 3, 1, 2, 3, 1, 2], n=3) == 3 / 6  # 123 231 312 | 123 231 312
    assert of([1, 2, 3, 4], n=2) == 0 and of([1, 2], n=3) == 0 and of([], n=1) == 0
    assert of([1, 2, 1, 2], n=4) == 0 and of([5, 5], n=2) == 0 and of([5, 5, 5], n=2) == 0.5
    assert of([7] * 10, n=4) == 6 / 7 and of([1, 1, 2, 2], n=1) == 0.5
    words = made("repetition", n=2, of="words")
    assert rewards(words, "a b A  b a", "one two", "one") == [0.5, 0, 0]


@pytest.mark.parametrize(
    ("text", "sound"),
    [
        ("<think>so</think> 42", 1),
        ("  <think>so</think>\n42", 1),
        ("<think>so</think>", 0),
        ("<think>so</think>  ", 0),
        ("<think> </think>42", 0),
        ("well <think>so</think> 42", 0),
        ("<think>so</think> 42 </think>", 0),
        ("<think>a</think> 42 <think>b</think>", 0),
        ("<think>so 42", 0),
        ("so</think> 42", 0),
        ("42", 0),
        ("", 0),
    ],
)
def test_thinking_stands_once_before_an_answer(text: str, sound: int) -> None:
    assert rewards(made("format"), text) == [sound]


def test_sections_have_their_order_and_the_prompt_may_open_the_first() -> None:
    two = made("format", sections=["think", "answer"], answer=False)
    texts = ("<think>a</think><answer>42</answer>", "<answer>42</answer><think>a</think>", "<think>a</think> b")
    assert rewards(two, *texts) == [1, 0, 0]
    assert rewards(two, "<think>a</think> x <answer>4</answer>", "<think>a</think><answer>4</answer> x") == [0, 0]
    opened = Prompt("b", "<user>?<think>\n", (1,), "42")
    assert rewards(made("format"), "so</think> 42", "<think>so</think> 42", "42", prompt=opened) == [1, 1, 0]


def test_a_pattern_matches_the_whole_response_over_line_breaks() -> None:
    assert rewards(made("format", pattern=r"Answer: .*\d"), "Answer: a\n4", "Answer: 4.", "so Answer: 4") == [1, 0, 0]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"pattern": "("}, "pattern = '\\('"),
        ({"pattern": "x", "sections": ["a"]}, "not both"),
        ({"sections": ["<think>"]}, "are not names of tags"),
        ({"sections": [3]}, "sections = a list: Input should be a valid string"),
    ],
)
def test_a_form_that_is_none_is_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        made("format", **options)


def test_language_is_the_share_of_letters_of_a_script() -> None:
    latin, han = made("language", scripts=["latin"]), made("language", scripts=["han"])
    texts = ("abc 中", "答案是42。", "42!", "\uff21b", "ébc д")
    assert rewards(latin, *texts) == [0.75, 0, 1, 1, 0.75]
    assert rewards(han, *texts) == [0.25, 1, 1, 0, 0]
    assert rewards(made("language", scripts=["japanese"]), "日本のカタカナ") == [1]
    assert rewards(made("language", scripts=["latin", "cyrillic"]), "ab дж 中") == [0.8]
    for scripts in ("latin", [], ["english"]):
        with pytest.raises(ConfigError, match=r"a list of arabic|'latin': .*Sequence|valid array"):
            made("language", scripts=scripts)


# Sums

MINE = """
import asyncio
from megatron_gspo.rewards import Score, Stopped, TokenRewards, Ungraded
import numpy as np
LOG = []
def plain(prompt, response):
    return float(response.text == "good")
async def away(prompt, response):
    return Ungraded("HTTP 503") if response.text == "bad" else 1.0
def by_token(prompt, response):
    return TokenRewards(np.linspace(0, 1, len(response.response_ids)))
def scored(prompt, response):
    return Score(0.5, {"depth": 3})
def stopped(prompt, response):
    return Stopped()
def too_much(prompt, response):
    return 2.0
async def slow(prompt, response):
    await asyncio.sleep(60)
class Open:
    range = (float("-inf"), float("inf"))
    def __init__(self, context): self.context = context
    async def __aenter__(self): LOG.append("enter")
    async def __aexit__(self, *error): LOG.append("leave")
    def score_group(self, prompt, responses):
        LOG.append(len(responses))
        return [-2.0 + len(responses)] * len(responses)
    def close(self): LOG.append("close")
"""


@pytest.fixture
def mine(tmp_path: Path) -> str:
    path = tmp_path / "mine.py"
    path.write_text(MINE)
    return str(path)


def weighted(*parts: tuple[str, float] | dict[str, Any], timeout_s: float = 60.0) -> Reward:
    tables = [part if isinstance(part, dict) else {"function": part[0], "weight": part[1]} for part in parts]
    return made("weighted", timeout_s, parts=tables)


def test_a_sum_has_its_weights_its_components_and_its_range(mine: str) -> None:
    long = {"function": "length", "weight": -0.5, "options": {"start": 0, "end": 8}, "name": "too_long"}
    reward = weighted((f"{mine}:plain", 2.0), long, (f"{mine}:scored", 0.25))
    assert reward.range == (-0.5, 2.25)
    (found,) = score(reward, group("good", "bad", "x" * 9))
    assert found.rewards_G.tolist() == [2 - 0.25 + 0.125, -0.1875 + 0.125, -0.5 + 0.125]
    assert found.components_G[0] == {"plain": 1.0, "too_long": 0.5, "scored": 0.5, "scored_depth": 3.0}


def test_a_sum_of_ends_is_the_end_of_the_range_to_the_bit() -> None:
    reward = weighted(
        *[{"function": "exact", "weight": w, "name": f"p{i}"} for i, w in enumerate((0.1, 0.2, 0.3, 0.7))]
    )
    assert rewards(reward, "42", "41") == [reward.range[1], 0.0]


def test_what_one_part_cannot_grade_is_ungraded_unless_it_has_no_weight(mine: str) -> None:
    (found,) = score(weighted((f"{mine}:plain", 1.0), (f"{mine}:away", 0.1)), group("good", "bad"))
    assert found.ungraded_G == ("", "away: HTTP 503") and found.rewards_G[0] == 1.1
    (found,) = score(weighted((f"{mine}:plain", 1.0), (f"{mine}:away", 0.0)), group("good", "bad"))
    assert found.rewards_G.tolist() == [1.0, 0.0] and found.ungraded_G == ()
    assert [dict(table) for table in found.components_G] == [{"plain": 1.0, "away": 1.0}, {"plain": 0.0}]


def test_token_rewards_in_a_sum_stay_by_token(mine: str) -> None:
    (found,) = score(weighted((f"{mine}:by_token", 0.5), (f"{mine}:plain", 0.5)), group("good", "x"))
    assert found.token_rewards_G is not None
    np.testing.assert_allclose(found.token_rewards_G[0], 0.5 + np.linspace(0, 0.5, 4), rtol=0, atol=1e-15)
    assert found.components_G[0] == {"by_token": 0.5, "plain": 1.0}


def test_a_grading_that_was_stopped_counts_in_a_sum(mine: str) -> None:
    (found,) = score(weighted((f"{mine}:plain", 1.0), (f"{mine}:stopped", 1.0)), group("good", "x"))
    assert found.stopped == 2 and found.rewards_G.tolist() == [1.0, 0.0]


def test_lifetimes_groups_and_ends_of_parts_are_theirs(mine: str) -> None:
    reward = resolve_reward(
        RewardConfig(function="weighted", options={"parts": [{"function": f"{mine}:Open"}, {"function": "exact"}]}),
        RewardContext(run_dir="here"),
    )
    part: Any = reward.function.parts[0].reward.function  # type: ignore[union-attr]
    log = type(part).close.__globals__["LOG"]
    assert part.context.run_dir == "here" and reward.range == (-np.inf, np.inf) and np.isnan(reward.worst)
    assert score(reward, group("42", "41", "1"))[0].rewards_G.tolist() == [2.0, 1.0, 1.0]
    assert log == ["enter", 3, "leave"]
    reward.close()
    assert log[-1] == "close"


def test_an_error_of_a_part_names_it_and_each_is_timed_by_itself(mine: str) -> None:
    with pytest.raises(RewardError, match=r"^reward '.*mine.py:too_much' returned 2\.0, outside \[0, 1\]"):
        score(weighted((f"{mine}:plain", 1.0), (f"{mine}:too_much", 1.0)), group("good"))
    with pytest.raises(RewardError, match=r"^reward '.*mine.py:slow' gave no answer within 1\.5 s"):
        score(weighted((f"{mine}:plain", 1.0), (f"{mine}:slow", 1.0), timeout_s=1.5), group("good"))


def test_a_sum_with_an_async_part_is_asked_few_times_before_training(mine: str) -> None:
    assert weighted((f"{mine}:plain", 1.0), (f"{mine}:away", 1.0)).sparing
    assert not weighted((f"{mine}:plain", 1.0), ("gsm8k", 1.0)).sparing
    assert not weighted((f"{mine}:plain", 1.0)).ours and weighted(("gsm8k", 1.0)).ours


@pytest.mark.parametrize(
    ("parts", "message"),
    [
        ([], "is a list of 1 to 32"),
        ("gsm8k", "parts = 'gsm8k': Input should be a valid array"),
        ([{"weight": 1.0}], "number 1: function: Field required"),
        ([{"function": "exact", "wieght": 1.0}], "number 1: wieght: Extra inputs"),
        ([{"function": "exact", "weight": "heavy"}], "number 1: weight"),
        ([{"function": "exact", "name": "Right!"}], "number 1: name"),
        ([{"function": "exact"}, {"function": "exact"}], "two parts called 'exact'"),
        ([{"function": "exacto"}], "'exacto' is unknown"),
        ([{"function": "length", "options": {"ends": 3}}], "unexpected keyword argument 'ends'"),
    ],
)
def test_parts_that_are_none_are_refused_before_anything_starts(parts: Any, message: str) -> None:
    config = RewardConfig(function="weighted", options={"parts": parts})
    for look in (check_reward, resolve_reward):
        with pytest.raises(ConfigError, match=message):
            look(config)


def test_a_check_runs_none_of_the_users_code(tmp_path: Path) -> None:
    path = tmp_path / "ends.py"
    path.write_text("raise SystemExit(1)")
    inner = {"function": "weighted", "options": {"parts": [{"function": f"{path}:f"}, {"function": "gsm8k"}]}}
    config = RewardConfig(function="weighted", options={"parts": [inner]})
    check_reward(config)
    assert named_functions(config) == ["weighted", "weighted", f"{path}:f", "gsm8k"]


def test_a_configuration_with_parts_is_stored_and_read_as_it_was(tmp_path: Path) -> None:
    parts = [
        {"function": "gsm8k", "weight": 1.0},
        {"function": "remote", "weight": 0, "options": {"url": ["http://h:1"], "low": "-inf", "high": "inf"}},
        {"function": "judge", "options": {"url": "http://h:1", "model": "m", "extra": {"a": {"b": False}}}},
    ]
    config = make_config(tmp_path, reward={"function": "weighted", "options": {"parts": parts}})
    again = parse(tomllib.loads(dump(config)), source="x")
    assert again.reward == config.reward and again.reward.options["parts"] == parts
    made: Any = resolve_reward(again.reward)
    assert made.range == (0.0, 2.0) and [part.reward.range[1] for part in made.function.parts] == [1, np.inf, 1]
    for number in (float("inf"), float("nan")):
        with pytest.raises(ConfigError, match=r"reward.options.*write them as text"):
            make_config(tmp_path, reward={"options": {"parts": [{"options": {"low": number}}]}})
