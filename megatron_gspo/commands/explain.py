"""``megatron-gspo explain``: what docs/configuration.md says of a setting, in the terminal."""

from __future__ import annotations

import argparse
import shutil
import textwrap
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from megatron_gspo.config.reference import Setting

SUMMARY = "say what a setting means: type, allowed values, default"
EXAMPLE = "megatron-gspo explain optimizer.lr"
MORE = """Without a name it lists the sections; of a section it says every setting. A key that
only one section has may stand alone (explain lr)."""
DOCS = "docs/configuration.md"
INDENT = " " * 4
NARROWEST = 20


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of the command."""
    parser.add_argument("names", nargs="*", metavar="SECTION[.KEY]", help="setting, or section of settings")


def run(options: argparse.Namespace) -> int:
    """Runs the command; returns the exit status."""
    from megatron_gspo.config.reference import find

    width = max(shutil.get_terminal_size().columns, NARROWEST)
    found = [(name, find(name)) for name in options.names]  # all of them, before anything is said
    texts = [explained(name, settings, width) for name, settings in found] or [listed(width)]
    print("\n\n".join(texts))
    return 0


def listed(width: int) -> str:
    """Every section, and what to write to see its settings."""
    from megatron_gspo.config.reference import sections

    about = sections()
    column = max(map(len, about)) + 2
    lines = [wrapped(f"{name:{column}}{text}", width, " " * column) for name, text in about.items()]
    return "\n".join([*lines, "", wrapped("megatron-gspo explain SECTION says every setting of one.", width)])


def explained(word: str, settings: tuple[Setting, ...], width: int) -> str:
    """The settings, under their section's heading when ``word`` names a section."""
    from megatron_gspo.config.reference import sections, with_name

    texts = [setting_text(setting, width) for setting in settings]
    section = settings[0].section
    if word.strip("[]") != section:
        return "\n\n".join(texts)
    head = f"[{section}]\n{wrapped(sections()[section], width)}"
    others = [setting.key for setting in with_name(section)]
    also = [wrapped(f"See also {', '.join(others)}.", width)] if others else []
    return "\n\n".join([head, *texts, *also])


def setting_text(setting: Setting, width: int) -> str:
    """Its name, then what it takes and what it means, wrapped at ``width``."""
    default = setting.default if setting.default == "required" else f"default {setting.default}"
    lines = (f"{setting.value}, {default}", setting.meaning)
    return "\n".join([setting.key, *(wrapped(line, width, INDENT, INDENT) for line in lines)])


def wrapped(text: str, width: int, indent: str = "", first: str = "") -> str:
    """Plain text: what stands between backticks in Markdown stands alone here."""
    return textwrap.fill(
        text.replace("`", ""),
        width,
        initial_indent=first,
        subsequent_indent=indent,
        break_on_hyphens=False,
    )
