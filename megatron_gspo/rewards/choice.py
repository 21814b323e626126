r"""Multiple choice: one letter, "(B)", "B.", "\boxed{\text{B}}", or the text of its option."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

from megatron_gspo.rewards.stated import stated_answer
from megatron_gspo.rewards.thinking import after_thinking
from megatron_gspo.rewards.tidy import key, tidy
from megatron_gspo.types import Prompt, Rollout

LETTERS = "ABCDEFGHIJ"
FIELDS = ("options", "choices", "option", "choice")
"""Fields of a row that may hold its options."""
MAX_LINE = 300
"""Characters of a last line that is taken for the answer."""

_LEADING = re.compile(
    r"(?:option|choice|answer)?\s*\(?([A-Ja-j])(?![A-Za-z'\u2019])\s*(?P<end>[).:]*)\s*(?P<rest>.*)", re.DOTALL
)
_LONE = re.compile(r"(?<![A-Za-z'\u2019\\])([A-J])(?![A-Za-z'\u2019])")


def choice(prompt: Prompt, response: Rollout) -> float:
    """1 for the reference's option and no other, else 0. docs/grading.md says where it is looked for.

    Options are read from the row's ``options`` or ``choices``: a list, a mapping of letters, or the ``text`` and
    ``label`` of ARC. Raises ValueError when the reference is no letter, no option and no place of one.
    """
    labels, options = options_of(prompt.metadata)
    expected = reference_letter(labels.get(prompt.answer.strip(), prompt.answer), options)
    text = after_thinking(prompt.text, response.text)
    return float(text is not None and chosen(text, options) == expected)


choice.by_answer = False  # type: ignore[attr-defined]  # it reads the row's options


def options_of(metadata: Mapping[str, Any]) -> tuple[dict[str, str], dict[str, str]]:
    """(label -> letter of options that are numbered, letter -> text) of a row's options; empty where it has none."""
    found = next((metadata[field] for field in FIELDS if metadata.get(field)), None)
    if isinstance(found, Mapping) and "text" in found:
        pairs = list(zip(found.get("label") or LETTERS, found["text"], strict=False))
    elif isinstance(found, Mapping):
        pairs = list(found.items())
    elif isinstance(found, Sequence) and not isinstance(found, str):
        pairs = list(zip(LETTERS, found, strict=False))
    else:
        pairs = []
    labels: dict[str, str] = {}
    if pairs and all(str(label).isdigit() for label, _ in pairs):  # some rows of ARC have 1 to 4
        labels = {str(label): letter for letter, (label, _) in zip(LETTERS, pairs, strict=False)}
        pairs = [(labels[str(label)], text) for label, text in pairs[: len(LETTERS)]]
    letters = [(str(label).strip("(). ").upper(), str(text)) for label, text in pairs]
    return labels, {letter: _without_letter(text, letter) for letter, text in letters}


def reference_letter(answer: str, options: Mapping[str, str]) -> str:
    """The letter of a reference: itself, "(B)", an option's text, or its place counted from 0.

    Raises ValueError.
    """
    text = (stated_answer(answer) if r"\boxed" in answer or "####" in answer else None) or answer
    if letter := _read(text, options):
        return letter
    if text.strip().isdigit() and int(text) < len(options):
        return list(options)[int(text)]
    known = f" ({', '.join(options)})" if options else " and the row has no options"
    raise ValueError(f"the reference answer {answer[-80:]!r} is no letter from A to J and no option{known}")


def chosen(text: str, options: Mapping[str, str]) -> str | None:
    """The letter that a response names as its answer; None when it names none, or more than one."""
    stated = stated_answer(text)
    if stated is not None:
        return _read(stated, options)
    lines = text.strip().rsplit("\n", 1)
    return _read(lines[-1], options) if len(lines[-1]) <= MAX_LINE else None


def _read(text: str, options: Mapping[str, str]) -> str | None:
    """The one letter of a short text, or that of the option whose text it is."""
    plain = re.sub(r"\\(?:text|textbf|mathrm|mathbf|textit|boxed)\s*\{([^{}]*)\}", r"\1", text)
    plain = re.sub(r"\*\*|__|[`$\"]|\\[()\[\]]", "", plain).strip(" \t.,;{}")
    same_text = [letter for letter, option in options.items() if key(tidy(option)) == key(tidy(plain))]
    if len(same_text) == 1:
        return same_text[0]
    match = _LEADING.fullmatch(plain)
    if match is None:
        return None
    letter, rest = match[1].upper(), match["rest"].strip(" .")
    if match[1].islower() and rest and not match["end"]:
        return None  # an article
    if options and letter not in options:
        return None
    if not rest:
        return letter
    if _LONE.search(rest.replace("I ", "")) or not (match["end"] or rest.lower().startswith(("because", "since"))):
        return None  # two letters, or a word that begins with one
    if letter in options and match["end"] and not _is_reason(rest) and key(tidy(options[letter])) != key(tidy(rest)):
        return None  # "(B) 42", where 42 is another option's
    return letter


def _is_reason(text: str) -> bool:
    return text.lower().startswith(("because", "since", ",", "-"))


def _without_letter(text: str, letter: str) -> str:
    """An option that begins with its own letter, "A) 42", as its text."""
    return re.sub(rf"\A\s*\(?{letter}[).:]\s*", "", text)
