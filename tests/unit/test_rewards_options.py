"""Options of built-in rewards: nonsense is one line, said before anything starts."""

from __future__ import annotations

import inspect
import math
from typing import Any

import pytest
from pydantic import ValidationError

from megatron_gspo.config import RewardConfig
from megatron_gspo.errors import ConfigError
from megatron_gspo.rewards.registry import BUILTIN_REWARDS, _find, check_reward

NONSENSE = [
    None,
    True,
    -1,
    0.5,
    math.nan,
    "",
    "x",
    "\ud800",
    "(",
    "http://[",
    "http://h:99999",
    "http://h/\n",
    [],
    ["x"],
    {},
]
SOUND: dict[str, dict[str, Any]] = {
    "judge": {"url": "http://h/v1", "model": "m"},
    "judge_ranking": {"url": "http://h/v1", "model": "m"},
    "remote": {"url": "http://h/"},
    "reward_model": {"url": "http://h", "model": ".", "check": False},
    "language": {"scripts": ["latin"]},
    "weighted": {"parts": [{"function": "exact"}]},
}


@pytest.mark.parametrize("name", BUILTIN_REWARDS)
def test_nonsense_in_an_option_of_a_built_in_reward_is_one_line_that_names_it(name: str) -> None:
    for option in inspect.signature(_find(name)).parameters:
        for value in NONSENSE:
            given = {**SOUND.get(name, {}), option: value}
            try:
                check_reward(RewardConfig(function=name, options=given))
            except (ConfigError, ValidationError) as error:
                said = str(error) if isinstance(error, ConfigError) else "one of pydantic's"
                assert "\n" not in said and "could not be made" not in said, (option, value)


@pytest.mark.parametrize(
    ("name", "options", "why"),
    [
        ("code", {"stop": "no"}, "'code': stop = 'no': Input should be a valid boolean"),
        ("code", {"memory_mb": 10**30}, "memory_mb = 1.* at most 1,000,000"),
        ("length", {"end": "100"}, "'length': end = '100': .* integer"),
        ("reward_model", SOUND["reward_model"] | {"timeout_s": "5"}, "timeout_s = '5'"),
        ("remote", {"url": "http://h:99999/"}, "a url is"),
        ("judge", SOUND["judge"] | {"max_tokens": 0}, "max_tokens = 0 1 or more"),
        ("judge", SOUND["judge"] | {"cache": -1}, "cache = -1 is 0 or more"),
    ],
)
def test_an_option_of_another_type_is_not_taken_for_what_it_resembles(name: str, options: Any, why: str) -> None:
    with pytest.raises(ConfigError, match=why):
        check_reward(RewardConfig(function=name, options=options))
