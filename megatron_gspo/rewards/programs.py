"""The program in a response: its last fenced block, after any thinking. docs/code-rewards.md has the rules.

Fences are CommonMark's (section 4.5), with two differences: one may be indented by any number of spaces, as in a list,
and a line of a Python string that looks like a fence closes nothing.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from typing import Literal

from megatron_gspo.rewards.thinking import after_thinking

Extraction = Literal["fence", "whole", "fence_or_whole"]
"""Where a program is looked for: in a fenced block; the whole answer; in a block and else the whole answer."""

TAGS: dict[str, tuple[str, ...]] = {
    "python": ("python", "python3", "py", "py3", "python2", "ipython", "pypy", "pypy3"),
    "cpp": ("cpp", "c++", "cc", "cxx", "c++11", "c++14", "c++17", "c++20", "cpp17", "cpp20"),
}
"""Language -> what a fence calls it, in lower case."""
WRAPPERS = ("markdown", "md")
"""Tags of blocks that hold an answer with blocks of its own."""
MAX_NESTING = 4
MAX_FENCES = 20
"""Closing fences of one block that are looked at: each is one reading of the lines above it."""

_LINE_BREAK = re.compile(r"\r\n|\r|\n")
"""CommonMark's, and Python's: ``splitlines`` would cut a text at a form feed too, and at six others."""
_OPENING = re.compile(r"[ \t]*(?P<fence>`{3,}(?=[^`\n]*$)|~{3,})[ \t]*(?P<info>[^\n]*)")
_STRINGS = re.compile(
    r"""#[^\n]*|\"\"\"(?:[^\\]|\\.)*?(?:\"\"\"|(?P<open>\Z))|'''(?:[^\\]|\\.)*?(?:'''|(?P<open2>\Z))"""
    r"""|"(?:[^"\\\n]|\\.)*(?:"|$)|'(?:[^'\\\n]|\\.)*(?:'|$)""",
    re.DOTALL | re.MULTILINE,
)


@dataclass(frozen=True)
class Block:
    """A fenced block of a text."""

    tag: str
    """The first word behind the opening fence, in lower case; empty when there is none."""
    text: str
    """What stands between the fences, without the indentation of the opening one."""


def program_of(
    prompt: str, response: str, language: str = "python", extraction: Extraction = "fence"
) -> tuple[str, str] | None:
    """(language, source) of the program that ``response`` gives as its answer; None when it gives none.

    ``language`` "auto" takes it from the block's tag; "python" where the whole answer is the program.
    """
    answer = after_thinking(prompt, response)
    if answer is None:
        return None
    if extraction != "whole":
        found = _last_program(answer, language)
        if found or extraction == "fence":
            return found
    return (_default(language), answer) if answer.strip() else None


def blocks(text: str) -> Iterator[Block]:
    """The fenced blocks of a text, in order. One without an end goes to the end of the text."""
    lines = _LINE_BREAK.split(text)
    if not lines[-1]:
        lines.pop()
    at = 0
    while at < len(lines):
        opening = _OPENING.fullmatch(lines[at])
        if opening is None:
            at += 1
            continue
        end = _end(lines, at + 1, opening["fence"])
        indent = len(lines[at]) - len(lines[at].lstrip())
        inside = "\n".join(_dedented(line, indent) for line in lines[at + 1 : end])
        yield Block(_tag(opening["info"]), inside + "\n" if inside else "")
        at = end + 1


def _last_program(text: str, language: str, depth: int = 0) -> tuple[str, str] | None:
    """The last block that is tagged as a program of the language; where there is none, the last without a tag."""
    tagged: tuple[str, str] | None = None
    plain: tuple[str, str] | None = None
    for block in blocks(text):
        if not block.text.strip():
            continue
        known = next((name for name, tags in TAGS.items() if block.tag in tags), "")
        if block.tag in WRAPPERS and depth < MAX_NESTING:
            tagged = _last_program(block.text, language, depth + 1) or tagged
        elif known and language in (known, "auto"):
            tagged = (known, block.text)
        elif not block.tag:
            plain = (_default(language), block.text)
    return tagged or plain


def _default(language: str) -> str:
    return "python" if language == "auto" else language


def _tag(info: str) -> str:
    """ "python", of "Python", "{.python .numberLines}", "python title=x" and "python:main.py"."""
    word = info.strip().strip("{}").strip().removeprefix(".").lower()
    return re.split(r"[\s,;:{}]", word, maxsplit=1)[0]


def _end(lines: list[str], start: int, fence: str) -> int:
    """The line that closes a block which starts at ``start``; ``len(lines)`` when none does.

    The first closing fence that is not inside of a triple-quoted string; the first one, when all of them are.
    """
    closing = re.compile(rf"[ \t]*{re.escape(fence[0])}{{{len(fence)},}}[ \t]*")
    fences = list(islice((at for at in range(start, len(lines)) if closing.fullmatch(lines[at])), MAX_FENCES))
    for at in fences:
        if not ends_in_a_string("\n".join(lines[start:at])):
            return at
    return fences[0] if fences else len(lines)


def ends_in_a_string(source: str) -> bool:
    """Whether a Python source ends inside of a triple-quoted string."""
    return any(found["open"] is not None or found["open2"] is not None for found in _STRINGS.finditer(source))


def _dedented(line: str, indent: int) -> str:
    """Without up to ``indent`` leading white characters."""
    return line[min(indent, len(line) - len(line.lstrip())) :]
