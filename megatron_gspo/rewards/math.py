r"""Answers of mathematics: numbers, expressions, intervals, sets, tuples, matrices, equations and words."""

from __future__ import annotations

import functools
from dataclasses import dataclass

from megatron_gspo.rewards.answers import final_answer
from megatron_gspo.rewards.equivalence import same
from megatron_gspo.rewards.interface import Stopped
from megatron_gspo.rewards.stated import MAX_STATED, is_cut_off, stated_answer
from megatron_gspo.rewards.structure import Leaf, Node, UnreadableError, read
from megatron_gspo.rewards.thinking import after_thinking
from megatron_gspo.rewards.tidy import key, tidy
from megatron_gspo.rewards.verifier import StoppedError
from megatron_gspo.types import Prompt, Rollout


@dataclass(frozen=True)
class Reference:
    """A reference answer, read."""

    key: str
    """Its spelling, but for what TeX has several forms of."""
    node: Node

    @property
    def is_number(self) -> bool:
        """Whether it is a number, or an expression of numbers."""
        return isinstance(self.node, Leaf) and self.node.value is not None


def math(prompt: Prompt, response: Rollout) -> float:
    """1 for an answer that is the reference's, else 0. docs/grading.md says where the answer is looked for, and when
    two are the same.

    ``Stopped``, a 0, when the answer took math-verify too long. Raises ValueError when the reference cannot be read.
    """
    expected = reference(prompt.answer)
    text = after_thinking(prompt.text, response.text)
    if text is None:
        return 0.0
    try:
        return float(is_answered(expected, text))
    except StoppedError:
        return Stopped()


def is_answered(expected: Reference, text: str) -> bool:
    """Whether the answer of ``text`` is the expected one. Raises StoppedError."""
    whole = text.strip() if len(text) <= MAX_STATED and not is_cut_off(text) else ""
    if whole and key(tidy(whole)) == expected.key:
        return True
    stated = stated_answer(text)
    if stated is None and not expected.is_number:
        stated = whole  # nothing but the answer, perhaps
    if stated and key(tidy(stated)) == expected.key:
        return True
    try:
        found = read(stated) if stated else None
    except UnreadableError:
        return False
    has_no_value = found is None or (isinstance(found, Leaf) and found.words)
    if expected.is_number and has_no_value and not is_cut_off(text):
        last = final_answer(text)  # the last number of the text, where it stands for itself
        found = None if last is None else Leaf(last.latex, last)
    return found is not None and same(expected.node, found)


@functools.lru_cache(maxsize=4096)
def reference(answer: str) -> Reference:
    """A reference answer: what a solution states in a box, behind "####" or behind "the answer is", else all of it.

    Raises ValueError where it is empty, longer than ``MAX_STATED`` characters, or has too many parts.
    """
    is_solution = len(answer) > MAX_STATED or any(mark in answer for mark in (r"\boxed", r"\fbox", "####"))
    text = ((stated_answer(answer) if is_solution else None) or answer).strip()
    if not text:
        raise ValueError("the reference answer is empty")
    if len(text) > MAX_STATED:
        raise ValueError(f"the reference answer has {len(text)} characters, more than {MAX_STATED}: {text[-80:]!r}")
    try:
        return Reference(key(tidy(text)), read(text))
    except UnreadableError as error:
        raise ValueError(f"the reference answer {text[-80:]!r} has {error}") from None
