"""How the command line is read, and how its help is laid out: one parser class for every command and sub-command.

A help text is written as it should be read: a ``%`` in it is a percent sign (``%(default)s`` stays argparse's).
"""

from __future__ import annotations

import argparse
import difflib
import re
import shutil
import sys
import textwrap
from collections.abc import Iterable, Mapping
from types import ModuleType
from typing import Any, NoReturn

from megatron_gspo import __version__

DOCS = "docs/first-hour.md"
"""Where a reader of the help goes on, unless a command's module names a page of its own."""
SHORT_LIST = 24
"""Characters of ``{a,b,c}`` that stand behind an option; a longer list of choices goes into its help."""
NARROWEST = 20
"""Columns that help is laid out for where a terminal claims to have fewer."""
EXAMPLE = "example: "
Groups = Mapping[str, tuple[str, ...]]
"""Title -> names of the commands under it."""


class Help(argparse.HelpFormatter):
    """Paragraphs and options wrapped at the terminal's width, an example as lines that a shell takes."""

    def __init__(self, prog: str, **settings: Any) -> None:
        columns = shutil.get_terminal_size().columns
        super().__init__(prog, **{"width": max(columns - 2, NARROWEST), **settings})

    def _get_help_string(self, action: argparse.Action) -> str:
        text = action.help or ""
        if action.choices is not None and action.metavar is None and not self._is_short(action):
            text = f"{text} (one of {', '.join(map(str, action.choices))})".strip()
        return re.sub(r"%%|%(?!\(\w+\)s)", "%%", text)  # the one place where percent signs are escaped

    def _metavar_formatter(self, action: argparse.Action, default_metavar: str) -> Any:
        if action.choices is not None and action.metavar is None and not self._is_short(action):
            return lambda size: (default_metavar,) * size
        return super()._metavar_formatter(action, default_metavar)

    def _format_text(self, text: str) -> str:
        """Without argparse's ``%(prog)s``: a text is what it says."""
        return self._fill_text(text, max(self._width - self._current_indent, 11), " " * self._current_indent) + "\n\n"

    def _split_lines(self, text: str, width: int) -> list[str]:
        return textwrap.wrap(" ".join(text.split()), width, break_on_hyphens=False)

    def _fill_text(self, text: str, width: int, indent: str) -> str:
        paragraphs = (part for part in re.split(r"\n\s*\n", text.strip()) if part.strip())
        return "\n\n".join(_filled(part, width, indent) for part in paragraphs)

    def _format_usage(self, usage: Any, actions: Iterable[Any], groups: Any, prefix: str | None) -> str:
        """``usage: megatron-gspo eval [options] CONFIG [section.key=value ...]``; the list of options is below it."""
        actions = list(actions)
        words = self._prog.split()
        words += ["[options]"] if any(action.option_strings for action in actions) else []
        for action in actions:
            if not action.option_strings:
                words.append(self._format_args(action, action.metavar or action.dest))
        whole = " ".join(word.replace(" ", "\0") for word in words)  # a word of ours may have spaces in it
        start = "usage: " if prefix is None else prefix  # "" where argparse makes a sub-command's name of it
        text = textwrap.fill(whole, self._width, initial_indent=start, subsequent_indent=" " * len(start))
        return text.replace("\0", " ") + "\n\n"

    def _is_short(self, action: argparse.Action) -> bool:
        return len(",".join(map(str, action.choices or ()))) + 2 <= SHORT_LIST


class Parser(argparse.ArgumentParser):
    """A command's parser. Its sub-commands, if any, are of this class too."""

    def __init__(self, **settings: Any) -> None:
        super().__init__(**{"formatter_class": Help, "allow_abbrev": False, **settings})
        self.add_argument(
            "--version",
            action="version",
            version=__version__,
            help=argparse.SUPPRESS if " " in self.prog else "print the version",
        )
        self.groups: Groups = {}
        self.commands: Any = None

    def error(self, message: str) -> NoReturn:
        """The usage, one line, and exit status 2."""
        self.exit(2, f"{self.format_usage()}error: {' '.join(message.split())}\n")

    def add_commands(self, word: str, groups: Groups, modules: Mapping[str, ModuleType]) -> None:
        """A sub-command for each module, listed under the titles of ``groups``.

        A module has ``SUMMARY``, ``EXAMPLE``, ``add_arguments`` and ``run``; perhaps ``MORE`` and ``DOCS``.
        """
        self.groups = groups
        self.commands = self.add_subparsers(metavar=word)
        for name in (name for names in groups.values() for name in names):
            module = modules[name]
            summary: str = module.SUMMARY
            more = getattr(module, "MORE", "")
            example = f"{EXAMPLE}{module.EXAMPLE}"
            command = self.commands.add_parser(
                name,
                help=summary,
                description=f"{summary[0].upper()}{summary[1:]}. {more.strip()}",
                epilog=f"{example}\n\nThe docs: {getattr(module, 'DOCS', DOCS)}",
            )
            command.set_defaults(run=module.run, parser=command)
            module.add_arguments(command)

    def format_help(self) -> str:
        """The help; commands stand in their groups."""
        if self.commands is None:
            return super().format_help()
        formatter = self._get_formatter()
        formatter.add_usage(None, self._actions, [])
        formatter.add_text(self.description)
        listed = {action.dest: action for action in self.commands._get_subactions()}
        for title, names in self.groups.items():
            formatter.start_section(title)
            formatter.add_arguments([listed[name] for name in names])
            formatter.end_section()
        formatter.start_section("options")
        formatter.add_arguments([action for action in self._actions if action.option_strings])
        formatter.end_section()
        formatter.add_text(self.epilog)
        return formatter.format_help()

    def say_commands(self) -> int:
        """What to write behind this word, on stderr, for somebody who wrote nothing; returns the exit status."""
        formatter = self._get_formatter()
        formatter.add_usage(None, self._actions, [])
        for title, names in self.groups.items():
            formatter.add_text(f"{title}: {', '.join(names)}")
        formatter.add_text(f"{self.prog} --help says what each is for.")
        print(re.sub(r"\n\n(?!\n)", "\n", formatter.format_help()), end="", file=sys.stderr)
        return 2

    def refuse(self, words: Iterable[str]) -> NoReturn:
        """Ends with the words that nobody takes, and the option that the first one may have been meant to be."""
        words = list(words)
        name = words[0].partition("=")[0]
        known = {option for option in self._option_string_actions if option.startswith("--")} - {"--help", "--version"}
        self.error(f"unrecognized arguments: {' '.join(words)}{did_you_mean(name, known)}")

    def _get_values(self, action: argparse.Action, arg_strings: list[str]) -> Any:
        if arg_strings == ["--"] and action.option_strings and action.nargs is None:  # argparse makes a list of it
            raise argparse.ArgumentError(action, "expected one argument")
        return super()._get_values(action, arg_strings)

    def _check_value(self, action: argparse.Action, value: Any) -> None:
        if action.choices is None or value in action.choices:
            return
        known = list(map(str, action.choices))
        meant = did_you_mean(str(value), known) or f" (choose from {', '.join(known)})"
        if action is self.commands:
            self.error(f"no {str(action.metavar).lower()} {value!r}{meant}")
        raise argparse.ArgumentError(action, f"invalid choice: {value!r}{meant}")


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """`` (did you mean train?)`` for ``trian``; empty where nothing is close."""
    close = difflib.get_close_matches(word, list(known), n=1)
    return f" (did you mean {close[0]}?)" if close else ""


def _filled(paragraph: str, width: int, indent: str) -> str:
    if not paragraph.startswith(EXAMPLE):
        text = " ".join(paragraph.split())
        return textwrap.fill(text, width, initial_indent=indent, subsequent_indent=indent, break_on_hyphens=False)
    lines = textwrap.wrap(
        " ".join(paragraph.split()), width - 2, subsequent_indent=f"{indent}    ", break_on_hyphens=False
    )
    return " \\\n".join(lines)  # a shell puts the lines together again
