"""Configurations as TOML and as ``section.key=value``, and one line for what is wrong in them."""

from __future__ import annotations

import tomllib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import tomli_w
from pydantic import ValidationError

from megatron_gspo.config.reference import algorithms_with, did_you_mean
from megatron_gspo.config.run import RunConfig
from megatron_gspo.errors import ConfigError

REASONS = {
    "rollout.temperature": " (at 0 all responses of a group are the same: eval.greedy, and eval --greedy, evaluate so)",
}
"""Setting -> why a value below its range cannot be, where the range does not say it."""


def load(path: str | Path, overrides: Sequence[str] = ()) -> RunConfig:
    """Reads a TOML file, applies ``section.key=value`` overrides and validates the whole.

    Relative paths are left as they are: they are relative to the working directory.
    Raises ConfigError (or LayoutError) with one line.
    """
    return parse(read(path), source=str(path), overrides=overrides)


def read(path: str | Path) -> dict[str, Any]:
    """A TOML file's tree, not validated. Raises ConfigError."""
    try:
        return tomllib.loads(Path(path).read_text(encoding="utf-8-sig"))  # Windows' editors put a mark first
    except FileNotFoundError:
        raise ConfigError(f"{path}: no such configuration file") from None
    except (OSError, ValueError, RecursionError) as error:  # not UTF-8, not TOML, brackets or digits without end
        raise ConfigError(f"{path}: {error}") from None


def parse(tree: dict[str, Any], source: str = "configuration", overrides: Sequence[str] = ()) -> RunConfig:
    """Applies ``overrides`` to a tree of plain values (in place) and validates it.

    Raises ConfigError naming ``source`` and the first setting that is wrong.
    """
    for override in overrides:
        _apply_override(tree, override)
    if where := _nul_in(tree):
        raise ConfigError(f"{source}: {where} holds a NUL character, which no path, name or command can hold")
    try:
        return RunConfig.model_validate(tree)
    except ValidationError as error:
        cause = error.errors(include_url=False)[0].get("ctx", {}).get("error")
        kind = type(cause) if isinstance(cause, ConfigError) else ConfigError
        raise kind(f"{source}: {_first_problem(error)}") from None


def dump(config: RunConfig) -> str:
    """The resolved configuration as TOML; ``load`` reads it back to an equal one."""
    return tomli_w.dumps(config.model_dump(mode="json", exclude_none=True))


def _apply_override(tree: dict[str, Any], override: str) -> None:
    key, equals, text = override.partition("=")
    section, dot, name = key.strip().partition(".")
    if any("\ud800" <= character <= "\udfff" for character in override):  # a shell's bytes that are no UTF-8
        raise ConfigError(f"{override!a} is not UTF-8, and no file could hold it")
    if not (equals and dot and section and name):
        raise ConfigError(f"{override!r} is not an override: write section.key=value, as in train.seed=1")
    value = _override_value(override, text)
    *parents, leaf = name.split(".")
    node = tree.setdefault(section, {})
    for parent in parents:
        node = node.setdefault(parent, {}) if isinstance(node, dict) else None
    if not isinstance(node, dict):
        raise ConfigError(f"{override!r}: {section} is not a section of settings")
    node[leaf] = value


def _override_value(override: str, text: str) -> Any:
    try:
        tree = tomllib.loads(f"value = {text}")
    except tomllib.TOMLDecodeError:  # an unquoted string, rollout.engine=sglang, or a truth value as Python writes it
        return {"True": True, "False": False}.get(text.strip(), text.strip())
    except (ValueError, RecursionError) as error:  # digits or brackets without end
        raise ConfigError(f"{override[:80]!r}: {error}") from None
    if len(tree) > 1:
        raise ConfigError(f"{override[:80]!r} holds more than one value")
    return tree["value"]


def _nul_in(tree: Any) -> str:
    """The setting whose name or text has a NUL in it; empty where none has."""
    items = tree.items() if isinstance(tree, dict) else enumerate(tree) if isinstance(tree, list) else ()
    for key, value in items:
        if "\0" in str(key) or (isinstance(value, str) and "\0" in value):
            return ascii(str(key))[1:-1][:80]
        if found := _nul_in(value):
            return f"{key}.{found}"
    return ""


def _of_others(where: str) -> str:
    """Of a setting that this algorithm does not have: which ones do."""
    section, _, name = where.partition(".")
    having = algorithms_with(name) if section == "algorithm" else []
    return f" of this algorithm.name: it is one of {', '.join(having)}" if having else ""


def _first_problem(error: ValidationError) -> str:
    """One line of the first problem; the rest are counted."""
    problems = error.errors(include_url=False)
    first = problems[0]
    if first["type"] == "missing":  # perhaps since it is spelt wrong
        first = next((problem for problem in problems if problem["type"] == "extra_forbidden"), first)
    where = ".".join(str(part) for part in first["loc"])
    if first["type"] == "extra_forbidden":
        text = f"unknown setting {where}{_of_others(where) or did_you_mean(where)}"
    elif first["type"] == "model_type":
        text = f"{where} = {first['input']!r:.200}: it must be a table of settings, [{where}]"
    elif first["type"] == "missing":
        text = f"{where} is missing"
    elif first["type"] == "value_error":
        text = f"{where}: {first['ctx']['error']}" if where else str(first["ctx"]["error"])
    else:
        message = first["msg"].replace("tuple", "list")  # TOML's word
        text = f"{where} = {first['input']!r:.200}: {message[0].lower()}{message[1:]}"
        text += REASONS.get(where, "") if first["type"].startswith("greater_than") else ""
    more = len(problems) - 1
    return text + (f" (and {more} more)" if more else "")
