"""Rewards by name: the built-in table, import paths and files."""

from __future__ import annotations

import contextlib
import functools
import inspect
import json
import math
import os
import re
import sys
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, get_args, get_type_hints

from pydantic import TypeAdapter, ValidationError

from megatron_gspo.config import RewardConfig
from megatron_gspo.errors import ConfigError
from megatron_gspo.named import module_of
from megatron_gspo.rewards.guard import GUARD, end_a_forked_child
from megatron_gspo.rewards.interface import GroupReward, RewardContext, RewardFunction
from megatron_gspo.supervise import was_interrupted

BUILTIN_REWARDS: dict[str, str] = {
    "exact": "megatron_gspo.rewards.exact:exact",
    "arithmetic": "megatron_gspo.rewards.arithmetic:arithmetic",
    "gsm8k": "megatron_gspo.rewards.gsm8k:gsm8k",
    "math": "megatron_gspo.rewards.math:math",
    "choice": "megatron_gspo.rewards.choice:choice",
    "code": "megatron_gspo.rewards.code:Code",
    "weighted": "megatron_gspo.rewards.weighted:Weighted",
    "length": "megatron_gspo.rewards.length:Length",
    "repetition": "megatron_gspo.rewards.repetition:Repetition",
    "format": "megatron_gspo.rewards.format:Format",
    "language": "megatron_gspo.rewards.language:Language",
    "judge": "megatron_gspo.rewards.judge:Judge",
    "judge_ranking": "megatron_gspo.rewards.judge_ranking:JudgeRanking",
    "reward_model": "megatron_gspo.rewards.reward_model:RewardModel",
    "remote": "megatron_gspo.rewards.remote:Remote",
}
"""Name -> ``module:function`` or ``module:Class``. Adding a reward is one file here and one entry."""

Late = Literal["zero", "ungraded", "error"]
"""What a response gets whose grading takes longer than ``reward.timeout_s``: 0, counted; ``Ungraded``; or the scoring
ends with a RewardError."""
UNIT = (0.0, 1.0)
PLAIN = re.compile(r"[\w.+-]{0,24}")
"""A value that is shown in an error."""
NO_CONTEXT = RewardContext()


@dataclass(frozen=True)
class Reward:
    """A reward, ready to be called, and how it is called.

    A class, or a function, says more of itself by attributes: ``range``, ``on_timeout``, ``limits_itself``,
    ``sparing`` and ``by_answer``, which the properties explain; ``__aenter__`` and ``__aexit__``, entered in the
    event loop of each scoring, around it; and ``close()``, called when the run ends.
    """

    name: str
    """As the configuration names it; what errors show."""
    function: RewardFunction | GroupReward
    timeout_s: float = 30.0
    concurrency: int = 64
    built_in: bool = False
    """A grader of ours that takes too long gives that response 0 and is counted; a user's ends the scoring."""
    max_ungraded: float = 0.1
    """Share of an outer step's responses that may be ``Ungraded``."""

    @property
    def range(self) -> tuple[float, float]:
        """The least and the most that it returns, [0, 1] unless it says otherwise. Either may be infinite."""
        low, high = getattr(self._plain, "range", UNIT)
        return float(low), float(high)

    @property
    def worst(self) -> float:
        """What a response gets that is no answer: the bottom of the range; NaN, which is left out, where it has
        none."""
        low, _ = self.range
        return low if math.isfinite(low) else math.nan

    @property
    def on_timeout(self) -> Late:
        """What becomes of a response that is not graded in time."""
        late: Late = getattr(self._plain, "on_timeout", "zero" if self.built_in else "error")
        return "ungraded" if late == "zero" and self.range[0] != 0 else late  # 0 would be praise

    @property
    def takes_groups(self) -> bool:
        """Whether it sees all responses to a prompt at a time."""
        return callable(getattr(self.function, "score_group", None))

    @property
    def is_async(self) -> bool:
        """Whether a call makes a coroutine: ``async`` functions, partials of them, and objects with such a method."""
        called = getattr(self.function, "score_group") if self.takes_groups else self._plain  # noqa: B009
        method = getattr(called, "__call__", None)  # noqa: B004  the method itself is wanted
        return inspect.iscoroutinefunction(called) or inspect.iscoroutinefunction(method)

    @property
    def composite(self) -> bool:
        """Whether it is made of others, each of which is timed by itself."""
        return bool(getattr(self._plain, "composite", False))

    @property
    def untimed(self) -> bool:
        """Whether ``timeout_s`` is not for a call of it: a composite, or one that says ``limits_itself`` because it
        limits what it starts, and may wait for its turn, which must not count."""
        return self.composite or bool(getattr(self._plain, "limits_itself", False))

    @property
    def ours(self) -> bool:
        """Whether no code of the user's is in it, which has to be looked after."""
        return self.built_in and bool(getattr(self._plain, "ours", True))

    @property
    def sparing(self) -> bool:
        """Whether it is asked few times before training: each of its calls may be paid for. ``async`` ones are."""
        return bool(getattr(self._plain, "sparing", self.is_async))

    @property
    def by_answer(self) -> bool:
        """Whether all that it reads of a prompt is the reference answer, which it gives more than 0."""
        known = self.name in BUILTIN_REWARDS and inspect.isfunction(self._plain)
        return bool(getattr(self._plain, "by_answer", known))

    @property
    def _plain(self) -> Any:
        return getattr(self.function, "func", self.function)  # of a partial

    def close(self) -> None:
        """Gives back what a class keeps: once, at the end. What it raises is said on the terminal."""
        close = getattr(self.function, "close", None)
        if not callable(close):
            return
        try:
            with contextlib.nullcontext() if self.ours else GUARD.around(self.name):
                close()
        except BaseException as error:
            if was_interrupted():
                raise
            print(f"warning: reward {self.name!r}: close() raised {_named(error)}", file=sys.stderr, flush=True)


def resolve_reward(config: RewardConfig, context: RewardContext = NO_CONTEXT) -> Reward:
    """Finds ``config.function`` and binds ``config.options`` to it as keyword arguments; a class is made with them.

    A built-in name, ``package.module:function``, or ``path/to/file.py:function`` (relative to the working directory;
    the way that needs nothing on the import path, so it works the same under torchrun).
    Raises ConfigError when it cannot be found or imported, is not callable, or does not take the options.
    """
    name = config.function
    built_in = name in BUILTIN_REWARDS
    context = replace(context, config=config)
    with contextlib.nullcontext() if built_in else GUARD.around(name):
        function = _find(name)
        _check_options(config, function)
        if inspect.isclass(function):
            bound = _made(config, function, context)
        else:
            bound = functools.partial(function, **config.options) if config.options else function
    reward = Reward(name, bound, config.timeout_s, config.concurrency, built_in, config.max_ungraded)
    _check_traits(reward)
    return reward


def check_reward(config: RewardConfig, context: RewardContext = NO_CONTEXT) -> None:
    """What can be said of a reward without running any of the user's code. Raises ConfigError.

    A built-in class is made, unless its ``check(**options)`` says as much without.
    """
    check_name(config.function)
    if config.function not in BUILTIN_REWARDS:
        return
    function: Any = _find(config.function)
    _check_options(config, function)
    if check := getattr(function, "check", None):
        takes_context = "context" in inspect.signature(check).parameters
        check(**config.options, **({"context": context} if takes_context else {}))
    else:
        resolve_reward(config, context).close()


def check_name(name: str) -> tuple[str, str]:
    """(module or file, function) that a name stands for, by its form and without running any of the user's code.

    Raises ConfigError where it has another form, or names a file that is not there.
    """
    where, colon, attribute = BUILTIN_REWARDS.get(name, name).rpartition(":")
    if not (colon and where and attribute):
        raise ConfigError(
            f"reward.function = {name!r} is unknown: use {', '.join(BUILTIN_REWARDS)}, package.module:function or "
            f"path/to/file.py:function"
        )
    if where.endswith(".py") and not Path(where).is_file():
        raise ConfigError(f"reward.function = {name!r}: FileNotFoundError: {Path(where).resolve()} does not exist")
    return where, attribute


def named_rewards(config: RewardConfig) -> list[RewardConfig]:
    """A reward, and the parts of a combination, at any depth."""
    found, parts = [config], config.options.get("parts")
    for part in parts if config.function in BUILTIN_REWARDS and isinstance(parts, list) else ():
        if isinstance(part, dict) and isinstance(part.get("function"), str):
            options = part.get("options")
            of_part = RewardConfig(function=part["function"], options=options if isinstance(options, dict) else {})
            found += named_rewards(of_part)
    return found


def named_functions(config: RewardConfig) -> list[str]:
    """What ``reward.function`` names, and what the parts of a combination do, at any depth."""
    return [reward.function for reward in named_rewards(config)]


def answers_are_responses(config: RewardConfig) -> bool:
    """Whether a reference answer is what a response should be, and not something to hold it against (tests of a
    program). A built-in reward says so by an attribute of this name; of yours it is not known, and assumed."""
    built_in = [name for name in named_functions(config) if name in BUILTIN_REWARDS]
    return all(getattr(_find(name), "answers_are_responses", True) for name in built_in)


def _find(name: str) -> Callable[..., Any]:
    where, attribute = check_name(name)
    owner = os.getpid()
    try:
        module = module_of(where)
    except BaseException as error:  # importing runs the user's code, which may raise anything
        if was_interrupted():
            raise
        hint = "" if where.endswith(".py") else " (a file works too: path/to/file.py:function)"
        raise ConfigError(f"reward.function = {name!r}: {type(error).__name__}: {error}{hint}") from error
    finally:
        end_a_forked_child(owner, name)
    function: Any = module
    for part in attribute.split("."):
        if not hasattr(function, part):
            raise ConfigError(f"reward.function = {name!r}: {where} has no {attribute!r}")
        function = getattr(function, part)
    if not callable(function) and not hasattr(function, "score_group"):
        raise ConfigError(f"reward.function = {name!r} is a {type(function).__name__}, not a function")
    return function


def _check_options(config: RewardConfig, function: Any) -> None:
    """Raises ConfigError unless it takes the options."""
    is_class = inspect.isclass(function)
    try:
        signature = inspect.signature(function.score_group if _is_group(function) else function)
        given = {"context": None} if is_class and "context" in signature.parameters else {}
        signature.bind(*(() if is_class else (None, None)), **config.options, **given)
    except TypeError as error:
        options = ", ".join(config.options) or "none"  # names alone: a value may be a key
        how = "made with" if is_class else "called with (prompt, response) and"
        raise ConfigError(
            f"reward.function = {config.function!r} cannot be {how} the options {options}: {error}"
        ) from None
    except ValueError:
        pass  # a callable written in C may have no signature to look at
    if config.function in BUILTIN_REWARDS:
        _check_types(config, function)


def _check_types(config: RewardConfig, function: Any) -> None:
    """Raises ConfigError for an option that is not of the type that a built-in reward's parameter has; as in JSON,
    where a text is no number, a number no truth, and a list may be a tuple."""
    hints = get_type_hints(function.__init__ if inspect.isclass(function) else function)
    for name, value in config.options.items():
        try:
            TypeAdapter(hints.get(name, Any)).validate_json(json.dumps(value, default=str), strict=True)
        except ValidationError as error:
            what = " or ".join(dict.fromkeys(each["msg"] for each in error.errors()))
            shown = repr(value) if PLAIN.fullmatch(str(value)) else f"a {type(value).__name__}"  # a URL may hold a key
            raise ConfigError(f"reward {config.function!r}: {name} = {shown}: {' '.join(what.split())}") from None


def _is_group(function: Any) -> bool:
    return not inspect.isclass(function) and hasattr(function, "score_group")


def _made(config: RewardConfig, made: type, context: RewardContext) -> Any:
    """An object of a reward class. Raises ConfigError for whatever its constructor raises."""
    name, owner = config.function, os.getpid()
    try:
        takes_context = "context" in inspect.signature(made).parameters
        found = made(**config.options, **({"context": context} if takes_context else {}))
    except ConfigError:
        raise
    except BaseException as error:
        if was_interrupted():
            raise
        raise ConfigError(f"reward.function = {name!r} could not be made: {_named(error)}") from error
    finally:
        end_a_forked_child(owner, name)
    if not callable(found) and not callable(getattr(found, "score_group", None)):
        raise ConfigError(f"reward.function = {name!r} has neither __call__ nor score_group")
    return found


def _check_traits(reward: Reward) -> None:
    """Raises ConfigError for what a reward says of itself and cannot mean."""
    try:
        low, high = reward.range
        sound = low < high and not isinstance(getattr(reward._plain, "range", UNIT), str)
    except (TypeError, ValueError):
        sound = False
    if not sound:
        said = getattr(reward._plain, "range", None)
        raise ConfigError(f"reward {reward.name!r} has the range {said!r}: it is two numbers, the least and the most")
    if reward.on_timeout not in get_args(Late):
        raise ConfigError(f"reward {reward.name!r} has on_timeout = {reward.on_timeout!r}, not one of {get_args(Late)}")


def _named(error: BaseException) -> str:
    return f"{type(error).__name__}: {error}"
