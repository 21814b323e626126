"""Prompt files to tokenized prompts, every error with its file and row."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TypeVar

from megatron_gspo.data.messages import check_prompt
from megatron_gspo.data.rows import read_rows
from megatron_gspo.data.tokenizer import Tokenizer
from megatron_gspo.errors import DataError
from megatron_gspo.types import Prompt

PromptFormat = Literal["prompts", "gsm8k"]

T = TypeVar("T")


@dataclass(frozen=True)
class PromptSet:
    """The usable prompts of a file, in its order."""

    prompts: tuple[Prompt, ...]
    """Never empty; ids are unique."""
    skipped: int = 0
    """Rows left out, malformed or over-long; 0 unless ``skip_bad``."""
    problems: tuple[str, ...] = ()
    """What was wrong with each skipped row, in order."""

    def __len__(self) -> int:
        return len(self.prompts)


@dataclass(frozen=True)
class Completion:
    """One example of supervised fine-tuning."""

    prompt: Prompt
    completion_ids: tuple[int, ...]
    """[R], R >= 1; the last one is the tokenizer's ``eos_id``. Encoded apart from the prompt, as a rollout's tokens
    follow the prompt's."""


@dataclass(frozen=True)
class CompletionSet:
    """The usable examples of a file, in its order."""

    completions: tuple[Completion, ...]
    """Never empty; their prompts' ids are unique."""
    skipped: int = 0
    problems: tuple[str, ...] = ()

    def __len__(self) -> int:
        return len(self.completions)


def load_prompts(
    path: str | Path,
    *,
    tokenizer: Tokenizer,
    format: PromptFormat = "prompts",
    chat_template: bool = True,
    max_prompt_tokens: int | None = None,
    skip_bad: bool = False,
    limit: int | None = None,
) -> PromptSet:
    """Reads, renders and tokenizes prompts from JSONL (one object a line, blank lines ignored) or Parquet.

    Format "prompts": ``prompt`` (text or chat messages), optional ``answer`` and ``id``; every other field is
    metadata. Format "gsm8k": ``question``, and ``answer`` whose whole text is the reference; without a chat template
    a newline ends the question. A row without an id gets "line-7" ("row-7" in Parquet), counted from 1.

    Reads on until ``limit`` usable prompts. Raises DataError with file and row; with ``skip_bad`` a bad row (malformed,
    over ``max_prompt_tokens``, an id seen before) is skipped and counted, but a file without one usable row is an
    error all the same.
    """
    reader = _Reader(tokenizer, format, chat_template, max_prompt_tokens)
    prompts, problems = _load(Path(path), reader.prompt, lambda prompt: prompt.id, skip_bad, limit)
    return PromptSet(prompts, len(problems), problems)


def load_completions(
    path: str | Path,
    *,
    tokenizer: Tokenizer,
    format: PromptFormat = "prompts",
    chat_template: bool = True,
    max_prompt_tokens: int | None = None,
    max_response_tokens: int | None = None,
    skip_bad: bool = False,
    limit: int | None = None,
) -> CompletionSet:
    """Reads examples for supervised fine-tuning: prompts as ``load_prompts`` does, and the text that follows them.

    That text is ``completion`` in format "prompts" and ``answer`` in "gsm8k"; the end-of-sequence token is appended.
    More than ``max_response_tokens`` of them, that one counted, is a bad row like an over-long prompt.
    """
    reader = _Reader(tokenizer, format, chat_template, max_prompt_tokens, max_response_tokens)
    completions, problems = _load(Path(path), reader.completion, lambda example: example.prompt.id, skip_bad, limit)
    return CompletionSet(completions, len(problems), problems)


def _load(
    path: Path,
    convert: Callable[[dict[str, Any], str], T],
    id_of: Callable[[T], str],
    skip_bad: bool,
    limit: int | None,
) -> tuple[tuple[T, ...], tuple[str, ...]]:
    """Converts rows until ``limit`` are usable: (items, problems)."""
    items: list[T] = []
    problems: list[str] = []
    first_seen: dict[str, str] = {}
    for row in read_rows(path):
        place = f"{row.unit} {row.number}"
        try:
            if row.problem:
                raise DataError(row.problem)
            item = convert(dict(row.fields), f"{row.unit}-{row.number}")
            if id_of(item) in first_seen:
                raise DataError(f"id {id_of(item)!r} was seen before, at {first_seen[id_of(item)]}: ids must be unique")
        except DataError as error:
            if not skip_bad:
                raise DataError(f"{path}, {place}: {error}") from error
            problems.append(f"{place}: {error}")
            continue
        first_seen[id_of(item)] = place
        items.append(item)
        if len(items) == limit:
            break
    if not items:
        bad = f"; {len(problems)} bad rows were skipped, the first: {problems[0]}" if problems else ""
        raise DataError(f"{path}: holds no usable rows{bad}")
    return tuple(items), tuple(problems)


@dataclass(frozen=True)
class _Reader:
    """Turns a row's fields into a prompt or an example. Raises DataError without the place, which ``_load`` adds."""

    tokenizer: Tokenizer
    format: PromptFormat
    chat_template: bool
    max_prompt_tokens: int | None
    max_response_tokens: int | None = None

    def prompt(self, fields: dict[str, Any], default_id: str) -> Prompt:
        if self.format == "gsm8k":
            text = self._render_question(_text(fields.pop("question", None), "question"))
            answer = _text(fields.pop("answer", None), "answer")
        else:
            text = self.tokenizer.render(check_prompt(fields.pop("prompt", None)), self.chat_template)
            answer = _optional_text(fields.pop("answer", None), "answer")
        identity = _optional_text(fields.pop("id", None), "id") or default_id
        ids = tuple(self.tokenizer.encode(text))
        if not ids:
            raise DataError("the prompt has no tokens")
        _check_length("prompt", len(ids), self.max_prompt_tokens, "rollout.max_prompt_tokens")
        return Prompt(identity, text, ids, answer, metadata=fields)

    def completion(self, fields: dict[str, Any], default_id: str) -> Completion:
        key = "answer" if self.format == "gsm8k" else "completion"
        text = _text(fields.get(key), key)
        ids = (*self.tokenizer.encode(text), self.tokenizer.eos_id)
        _check_length("completion", len(ids), self.max_response_tokens, "rollout.max_response_tokens")
        return Completion(self.prompt(fields, default_id), ids)

    def _render_question(self, question: str) -> str:
        rendered = self.tokenizer.render(question, self.chat_template)
        untouched = self.tokenizer.render(question, False)
        return f"{rendered}\n" if rendered == untouched else rendered


def _text(value: object, name: str) -> str:
    """A text with something in it."""
    if value is None:
        raise DataError(f"the field {name!r} is missing")
    if not isinstance(value, str) or not value:
        raise DataError(f"the field {name!r} must be a non-empty string, got {value!r:.80}")
    return value


def _optional_text(value: object, name: str) -> str:
    """A text, or a number as text; empty when absent."""
    if value is None:
        return ""
    if isinstance(value, bool) or not isinstance(value, str | int | float):
        raise DataError(f"the field {name!r} must be a string or a number, got {value!r:.80}")
    if isinstance(value, float) and not math.isfinite(value):
        raise DataError(f"the field {name!r} is {value}, which is no number")
    return str(value)


def _check_length(what: str, length: int, limit: int | None, setting: str) -> None:
    if limit is not None and length > limit:
        raise DataError(f"the {what} has {length} tokens, {setting} is {limit}: raise it, or set data.skip_bad = true")
