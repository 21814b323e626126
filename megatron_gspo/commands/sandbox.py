"""``megatron-gspo sandbox``: an action a file beside this one, ``sandbox_NAME.py``, each written like a command."""

from __future__ import annotations

import argparse
from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from megatron_gspo.commands.parsing import Parser
    from megatron_gspo.config.sandbox import SandboxConfig

SUMMARY = "say whether programs of a model can be run here, or run them for other machines"
EXAMPLE = "megatron-gspo sandbox check"
DOCS = "docs/sandbox.md"

ACTIONS = ("check", "serve")


def add_arguments(parser: Parser) -> None:
    """The options of the command."""
    modules = {name: import_module(f"megatron_gspo.commands.sandbox_{name}") for name in ACTIONS}
    parser.add_commands("ACTION", {"actions": ACTIONS}, modules)
    for action in parser.commands.choices.values():
        action.add_argument(
            "settings", nargs="*", default=[], metavar="sandbox.key=value", help="settings, as a TOML file has them"
        )


def run(options: argparse.Namespace) -> int:
    """Without the name of an action: says which there are."""
    return int(options.parser.say_commands())


def configured(settings: list[str]) -> SandboxConfig:
    """``[sandbox]`` from words like ``sandbox.disk_mb=16``. Raises ConfigError."""
    from megatron_gspo.config import parse
    from megatron_gspo.errors import ConfigError

    if wrong := [word for word in settings if not word.startswith("sandbox.")]:
        raise ConfigError(f"{wrong[0]} is no setting of [sandbox]: write sandbox.key=value")
    needed = {"model": {"path": "unused"}, "data": {"path": "unused"}, "train": {"run_dir": "unused-run"}}
    return parse(dict(needed), "the command line", settings).sandbox
