"""Data files to tokenized prompts, made when they are drawn; every error with its file and row."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from megatron_gspo.data.files import open_rows
from megatron_gspo.data.fingerprint import Fingerprint
from megatron_gspo.data.formats import Example, Paths, PromptFormat, completion_of, read_example, recognise
from megatron_gspo.data.lazy import Cache, LazyItems
from megatron_gspo.data.messages import MEDIA, ChatMessage, holds_media
from megatron_gspo.data.rows import Row, Rows
from megatron_gspo.data.tokenizer import Tokenizer, training_end
from megatron_gspo.errors import DataError
from megatron_gspo.types import Prompt

CHECKED_ROWS = 30_000
"""Rows of a file up to which every one is read, rendered and tokenized at the start, and bad ones are left out."""
FIRST_ROWS = 1_000
"""Rows of a longer file that are, from its beginning and among those that look broken; others when they are drawn."""
SAMPLED_ROWS = 64
SHORT_TOKEN = 16
"""Characters that a token is taken to hold at least: some tokenizers drop or join characters before they cut a text."""
RECOGNISED_BY = 100
"""Rows that "auto" looks at for one whose format it knows."""

OWN_FIELDS = Paths()

T = TypeVar("T", bound="Prompt | Completion")


@dataclass(frozen=True)
class Looked:
    """What was read at the start."""

    rows: int = 0
    """Rows that were read, bad ones included."""
    total: int = 0
    """Rows of the file."""
    whole: bool = True
    """Whether that was all of them. If not, the items are the file's rows as they stand: bad ones are found when they
    are drawn, and the ids of rows have their place behind them, since nobody compared them."""
    prompt_tokens: tuple[int, ...] = ()
    """Of each usable row that was read."""
    response_tokens: tuple[int, ...] = ()
    """Likewise, of completions."""
    format: str = "prompts"
    """What the rows were taken for."""
    fingerprint: Callable[[], str] = lambda: ""
    """A hash of what was read: of every row where all were looked at, wherever the file lies and however it is packed;
    else of the files' bytes, which it reads, and of ``SAMPLED_ROWS`` rows as they are understood."""


@dataclass(frozen=True)
class PromptSet:
    """The prompts of a file, in its order."""

    prompts: Sequence[Prompt]
    """Never empty, made when they are asked for; ids are unique. Of a file above ``CHECKED_ROWS`` rows, asking for a
    bad one raises DataError."""
    skipped: int = 0
    """Bad rows found at the start, malformed or over-long; 0 unless ``skip_bad``."""
    problems: tuple[str, ...] = ()
    """What was wrong with each of them, in order."""
    looked: Looked = field(default=Looked(), compare=False)

    def __len__(self) -> int:
        return len(self.prompts)

    def sample(self, count: int, seed: int) -> Sequence[int]:
        """Indices of all prompts, where all were looked at; else of ``count`` drawn from ``seed``, ascending."""
        if self.looked.whole or len(self) <= count:
            return range(len(self))
        return sorted(np.random.default_rng(seed).choice(len(self), count, replace=False).tolist())

    def place(self, index: int) -> str:
        """Where a prompt stands: "path, line 7"."""
        place = getattr(self.prompts, "place", None)
        return str(place(index)) if place is not None else f"prompt {index}"

    def without(self, problems: dict[int, str]) -> PromptSet:
        """The set without the prompts at these indices, which are counted as skipped."""
        if not problems or not isinstance(self.prompts, LazyItems):
            return self
        more = tuple(problems[index] for index in sorted(problems))
        if len(more) == len(self):
            raise DataError(f"none of {len(self)} prompts is usable, the first: {more[0]}")
        return replace(
            self,
            prompts=self.prompts.without(sorted(problems)),
            skipped=self.skipped + len(more),
            problems=(*self.problems, *more),
        )


@dataclass(frozen=True)
class Completion:
    """One example of supervised fine-tuning."""

    prompt: Prompt
    completion_ids: tuple[int, ...]
    """[R], R >= 1; the last one ends a response (``training_end``). Encoded apart from the prompt, as a rollout's
    tokens follow the prompt's."""


@dataclass(frozen=True)
class CompletionSet:
    """The examples of a file, in its order: as ``PromptSet``."""

    completions: Sequence[Completion]
    """Never empty, made when they are asked for; their prompts' ids are unique."""
    skipped: int = 0
    problems: tuple[str, ...] = ()
    looked: Looked = field(default=Looked(), compare=False)

    def __len__(self) -> int:
        return len(self.completions)


def load_prompts(
    path: str | Path,
    *,
    tokenizer: Tokenizer,
    format: PromptFormat = "auto",
    fields: Paths = OWN_FIELDS,
    chat_template: bool = True,
    max_prompt_tokens: int | None = None,
    keep_long: bool = False,
    skip_bad: bool = False,
    limit: int | None = None,
    whole: bool = False,
) -> PromptSet:
    """Prompts of a file, of a directory of shards or of a pattern (``files.open_rows``), rendered and tokenized.

    What a row means is ``format``'s to say (docs/data.md has the table); "auto" takes the format of the first row that
    is of a known one. ``fields`` names other fields than the format's own. A row without an id gets "line-7" ("row-7"
    in Parquet and JSON arrays), counted from 1; under a directory the shard's name stands before it.

    Up to ``CHECKED_ROWS`` rows (or ``limit``, if that is less; or ``whole``) every row is looked at here, until
    ``limit`` usable ones are found. Raises DataError with file and row; with ``skip_bad`` a bad row (malformed, over
    ``max_prompt_tokens``, an id seen before) is left out and counted, but a file without one usable row is an error
    all the same. Of more rows, ``FIRST_ROWS`` are looked at, and ``limit`` counts bad ones too.

    A text of more characters than ``max_prompt_tokens`` of the longest tokens have is over-long without being
    tokenized, which would take half a minute and gigabytes for one of 5 MB. With ``keep_long`` others are kept.
    """
    reader = _Reader(tokenizer, format, fields, chat_template, keep_long, max_prompt_tokens)
    return PromptSet(*_load(Path(path), reader, _Reader.prompt, lambda prompt: prompt, skip_bad, limit, whole))


def load_completions(
    path: str | Path,
    *,
    tokenizer: Tokenizer,
    format: PromptFormat = "auto",
    fields: Paths = OWN_FIELDS,
    chat_template: bool = True,
    max_prompt_tokens: int | None = None,
    max_response_tokens: int | None = None,
    keep_long: bool = False,
    skip_bad: bool = False,
    limit: int | None = None,
) -> CompletionSet:
    """Examples for supervised fine-tuning: prompts as ``load_prompts`` reads them, and the text that follows them.

    That text is ``completion`` in format "prompts", ``answer`` in "gsm8k", the last turn of a conversation;
    ``training_end`` is appended, unless it ends in a stop token already. More than ``max_response_tokens`` of them,
    that one counted, is a bad row like an over-long prompt.
    """
    end_id = training_end(tokenizer, chat_template)
    reader = _Reader(
        tokenizer, format, fields, chat_template, keep_long, max_prompt_tokens, max_response_tokens, end_id
    )
    return CompletionSet(
        *_load(Path(path), reader, _Reader.completion, lambda example: example.prompt, skip_bad, limit, False)
    )


def _load(
    path: Path,
    reader: _Reader,
    make: Callable[[_Reader, Row], T],
    prompt_of: Callable[[T], Prompt],
    skip_bad: bool,
    limit: int | None,
    whole: bool,
) -> tuple[LazyItems[T], int, tuple[str, ...], Looked]:
    """(items, skipped, problems, looked), as ``PromptSet`` and ``CompletionSet`` have them."""
    rows = open_rows(path)
    count = len(rows) if limit is None else min(limit, len(rows))
    whole = whole or count <= CHECKED_ROWS
    reader = replace(reader, format=_format(rows, reader), place_in_id=not whole)
    first = rows.read_all() if whole else _first_rows(rows, count)
    cache: Cache[T] = Cache(_tokens_of)
    found = _look(path, first, functools.partial(make, reader), prompt_of, skip_bad, limit, cache if whole else None)
    rows_N = np.asarray(found.usable, dtype=np.int64) if whole else np.arange(count)
    items = LazyItems(str(path), rows, rows_N, functools.partial(make, reader), cache)
    known = found.fingerprint.text if whole else functools.partial(_fingerprint, rows, items)
    tokens = tuple(found.prompt_tokens), tuple(found.response_tokens)
    looked = Looked(found.read, len(rows), whole, *tokens, reader.format, known)
    return items, len(found.problems), tuple(found.problems), looked


def _format(rows: Rows, reader: _Reader) -> PromptFormat:
    if reader.format != "auto":
        return reader.format
    some = (rows.read(index) for index in range(min(RECOGNISED_BY, len(rows))))
    return recognise((row.fields for row in some if not row.problem), reader.fields)  # type: ignore[return-value]


def _first_rows(rows: Rows, count: int) -> Iterable[Row]:
    broken = [row for row in rows.suspects() if FIRST_ROWS <= row < count][:FIRST_ROWS]
    return map(rows.read, [*range(FIRST_ROWS), *broken])


def _fingerprint(rows: Rows, items: LazyItems[Any]) -> str:
    """Of files that are too long to be read row by row for it."""
    growing = Fingerprint()
    growing.add((rows.digest(), len(items)))
    for index in np.linspace(0, len(items) - 1, SAMPLED_ROWS, dtype=np.int64).tolist():
        try:
            growing.add(_facts(items[index]))
        except DataError as error:
            growing.add(("bad", type(error).__name__))
    return f"files-{growing.text()}"


def _facts(item: Prompt | Completion) -> tuple[Any, ...]:
    """What training makes of an item."""
    if isinstance(item, Completion):
        return item.prompt.id, item.prompt.token_ids, item.completion_ids
    return item.id, item.token_ids, item.answer, item.metadata


def _tokens_of(item: Prompt | Completion) -> int:
    return len(item.token_ids) if isinstance(item, Prompt) else len(item.prompt.token_ids) + len(item.completion_ids)


@dataclass
class _Found:
    read: int = 0
    fingerprint: Fingerprint = field(default_factory=Fingerprint)
    usable: list[int] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)
    prompt_tokens: list[int] = field(default_factory=list)
    response_tokens: list[int] = field(default_factory=list)


def _look(
    path: Path,
    rows: Iterable[Row],
    make: Callable[[Row], T],
    prompt_of: Callable[[T], Prompt],
    skip_bad: bool,
    limit: int | None,
    cache: Cache[T] | None,
) -> _Found:
    """Makes items of rows until ``limit`` are usable, and keeps what they say of the file. Raises DataError."""
    found = _Found()
    first_seen: dict[str, str] = {}
    for row in rows:
        found.read += 1
        try:
            item = make(row)
            prompt = prompt_of(item)
            if prompt.id in first_seen:
                raise DataError(f"id {prompt.id!r} was seen before, at {first_seen[prompt.id]}: ids must be unique")
        except DataError as error:
            if not skip_bad:
                raise DataError(f"{path}, {row.place}: {error}") from error
            found.problems.append(f"{row.place}: {error}")
            continue
        first_seen[prompt.id] = row.place
        found.fingerprint.add(_facts(item))
        found.usable.append(found.read - 1)
        if cache is not None:
            cache.put(found.read - 1, item)
        found.prompt_tokens.append(len(prompt.token_ids))
        if isinstance(item, Completion):
            found.response_tokens.append(len(item.completion_ids))
        if len(found.usable) == limit:
            break
    if not found.usable:
        problems = found.problems
        bad = f"; {len(problems)} bad rows were skipped, the first: {problems[0]}" if problems else ""
        raise DataError(f"{path}: holds no usable rows{bad}")
    return found


@dataclass(frozen=True)
class _Reader:
    """Turns a row into a prompt or an example. Raises DataError without the place."""

    tokenizer: Tokenizer
    format: PromptFormat
    fields: Paths
    chat_template: bool
    keep_long: bool
    max_prompt_tokens: int | None
    max_response_tokens: int | None = None
    end_id: int | None = None
    place_in_id: bool = False

    def prompt(self, row: Row) -> Prompt:
        return self._prompt(row, self._example(row))

    def completion(self, row: Row) -> Completion:
        example = self._example(row)
        text = completion_of(self.format, self.fields, example)
        assert self.end_id is not None
        limit = Limit("completion", self.max_response_tokens, "rollout.max_response_tokens", self.keep_long)
        limit.check_characters(len(text), self.tokenizer.longest_token)
        said = self.tokenizer.encode(text)
        ids = tuple(said if said and said[-1] in self.tokenizer.stop_ids else [*said, self.end_id])
        limit.check_tokens(len(ids))
        return Completion(self._prompt(row, example), ids)

    def _example(self, row: Row) -> Example:
        if row.problem:
            raise DataError(row.problem)
        return read_example(self.format, self.fields, dict(row.fields))

    def _prompt(self, row: Row, example: Example) -> Prompt:
        if example.metadata.get("tools") and not isinstance(example.prompt, str):
            raise DataError(
                "the row has tools, which would not reach the chat template: give those that all rows share as "
                "data.chat_template_kwargs.tools, and leave the field out or name it otherwise"
            )
        if media := next((name for name in MEDIA if name != "files" and holds_media(example.metadata.get(name))), None):
            raise DataError(
                f"the row has {media!r}: images, audio and files do not reach a language model; name the "
                f"field otherwise if the prompt says all without them"
            )
        limit = Limit("prompt", self.max_prompt_tokens, "rollout.max_prompt_tokens", self.keep_long)
        limit.check_characters(_asked(example.prompt), self.tokenizer.longest_token)
        text = self.tokenizer.render(example.prompt, self.chat_template)
        if example.newline and text == self.tokenizer.render(example.prompt, False):
            text += "\n"
        limit.check_characters(len(text), self.tokenizer.longest_token)
        ids = tuple(self.tokenizer.encode(text))
        if not ids:
            raise DataError("the prompt has no tokens")
        limit.check_tokens(len(ids))
        identity = example.id or row.default_id
        if self.place_in_id and example.id:
            identity = f"{example.id}@{row.default_id}"
        return Prompt(identity, text, ids, example.answer, metadata=example.metadata, asked=example.prompt)


def _asked(prompt: str | tuple[ChatMessage, ...]) -> int:
    """Characters that must be in the rendered text; of an assistant's turn a template may leave out the thinking."""
    if isinstance(prompt, str):
        return len(prompt)
    return sum(len(message["content"] or "") for message in prompt if message["role"] != "assistant")


@dataclass(frozen=True)
class Limit:
    """How long a text may be. Raises DataError without the place."""

    what: str
    tokens: int | None
    setting: str
    keep_long: bool

    def check_characters(self, characters: int, longest_token: int) -> None:
        """Before the text is tokenized: one that cannot have so few tokens."""
        most = (self.tokens or 0) * max(longest_token, SHORT_TOKEN)
        if self.tokens is not None and characters > most:
            raise DataError(
                f"the {self.what} has {characters} characters, more than {self.setting} = {self.tokens} of the longest "
                f"tokens hold ({most}): raise it, or set data.skip_bad = true"
            )

    def check_tokens(self, tokens: int) -> None:
        """Raises DataError for a prompt that is too long."""
        if self.tokens is not None and tokens > self.tokens and not self.keep_long:
            raise DataError(
                f"the {self.what} has {tokens} tokens, {self.setting} is {self.tokens}: raise it, or set "
                f"data.skip_bad = true"
            )
