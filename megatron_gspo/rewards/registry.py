"""Reward functions by name: the built-in table, import paths and files."""

from __future__ import annotations

import contextlib
import functools
import inspect
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_gspo.config import RewardConfig
from megatron_gspo.errors import ConfigError
from megatron_gspo.named import module_of
from megatron_gspo.rewards.guard import GUARD, end_a_forked_child
from megatron_gspo.rewards.interface import RewardFunction
from megatron_gspo.supervise import was_interrupted

BUILTIN_REWARDS: dict[str, str] = {
    "exact": "megatron_gspo.rewards.exact:exact",
    "arithmetic": "megatron_gspo.rewards.arithmetic:arithmetic",
    "gsm8k": "megatron_gspo.rewards.gsm8k:gsm8k",
}
"""Name -> ``module:function``. Adding a reward is one file here and one entry."""


@dataclass(frozen=True)
class Reward:
    """A reward function, ready to be called, and how it is called."""

    name: str
    """As the configuration names it; what errors show."""
    function: RewardFunction
    timeout_s: float = 30.0
    concurrency: int = 64
    built_in: bool = False
    """A grader of ours that takes too long gives that response 0 and is counted; a user's ends the scoring."""


def resolve_reward(config: RewardConfig) -> Reward:
    """Finds ``config.function`` and binds ``config.options`` to it as keyword arguments.

    A built-in name, ``package.module:function``, or ``path/to/file.py:function`` (relative to the working directory;
    the way that needs nothing on the import path, so it works the same under torchrun).
    Raises ConfigError when it cannot be found or imported, is not callable, or does not take the options.
    """
    name = config.function
    with contextlib.nullcontext() if name in BUILTIN_REWARDS else GUARD.around(name):
        function = _find(name)
    try:
        inspect.signature(function).bind(None, None, **config.options)
    except TypeError as error:
        options = ", ".join(f"{key}={value!r}" for key, value in config.options.items()) or "none"
        raise ConfigError(
            f"reward.function = {name!r} cannot be called with (prompt, response) and the options {options}: {error}"
        ) from None
    except ValueError:
        pass  # a callable written in C may have no signature to look at
    bound = functools.partial(function, **config.options) if config.options else function
    return Reward(name, bound, config.timeout_s, config.concurrency, built_in=name in BUILTIN_REWARDS)


def check_reward(config: RewardConfig) -> None:
    """What can be said of a reward without running any of the user's code. Raises ConfigError."""
    if config.function in BUILTIN_REWARDS:
        resolve_reward(config)
    check_name(config.function)


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
    if not callable(function):
        raise ConfigError(f"reward.function = {name!r} is a {type(function).__name__}, not a function")
    return function
