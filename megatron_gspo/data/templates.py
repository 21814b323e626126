"""A tokenizer's chat template: the one place where prompts are rendered, and what is made sure of there."""

from __future__ import annotations

import functools
import json
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

from megatron_gspo.data.messages import ChatMessage
from megatron_gspo.data.model_files import one_line, short
from megatron_gspo.data.rendering import StoppedError, bind, names_read, render
from megatron_gspo.errors import DataError

T = TypeVar("T")
OURS = frozenset({"messages", "add_generation_prompt"})
"""Variables of a template that rendering sets itself."""
GLOBALS = frozenset({"raise_exception", "strftime_now", "range", "dict", "namespace", "lipsum", "cycler", "joiner"})
"""Names that transformers and Jinja give to every template."""
_ELSEWHERE = re.compile(
    r"\s*(?:<s>|<bos>|<\|endoftext\|>|<\uff5cbegin\u2581of\u2581sentence\uff5c>|\[gMASK\]<sop>)?\s*"
    r"(<\|im_start\|>|<\|begin_of_text\|>|<\|start_header_id\|>|<start_of_turn>|<\uff5cUser\uff5c>"
    r"|<\|(?:user|system)\|>(?=\s*\n)|\[INST\](?=.*\[/INST\]))",
    re.DOTALL,
)
"""How a text begins that the template of a well-known family has rendered."""


class ChatTemplate:
    """The template of a transformers tokenizer, with ``data.chat_template_kwargs`` bound to it.

    A template is a program of its own, which may leave out or change what it is given. So each message is looked for
    in the text, and text that would be read as the template's own tokens is refused. It runs in a process that can be
    stopped (``rendering``); one that had to be is refused for good, with the file that holds it.
    """

    def __init__(self, hf: Any, variables: Mapping[str, Any], file: Path) -> None:
        """``file``: what errors name."""
        self._hf, self._variables, self._file = hf, dict(variables), file
        try:
            self._source = str(hf.get_chat_template(tools=variables.get("tools")))
        except ValueError as error:  # several, and none by the name of "default"
            raise DataError(f"the chat template cannot be chosen: {one_line(error)}") from error
        special = {name: _texts(token) for name, token in hf.special_tokens_map.items()}
        unset = {"tools": None, "documents": None}
        self._bound = bind(self._source, unset | special | self._variables)
        self._stopped: StoppedError | None = None
        self._dropped: dict[tuple[Any, ...], frozenset[int]] = {}
        if variables:
            self._check_variables()

    def render(self, prompt: str | Sequence[ChatMessage]) -> str:
        """The prompt's text up to where the assistant's turn begins. Raises DataError."""
        messages = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else list(prompt)
        if isinstance(prompt, str):
            self._check_unrendered(prompt)
        else:
            self._check_contents(messages)
        text = self._write_all(messages)
        self._check_said(messages, text)
        return text

    @functools.cached_property
    def turn_end(self) -> str | None:
        """The special token that the template writes behind what an assistant says; None where it writes none."""
        turns = _turns("user", "assistant", "user")
        try:
            last = self._write(turns[:2], generation_prompt=False)
            is_asked = last != self._write(turns[:2], generation_prompt=True)
            end = self._first_special(_behind(last, turns[1]))
            if end is None or is_asked:
                return end and end[0]
            # What it writes may be the beginning of another turn, which it always appends: an end stands between too.
            between = _behind(self._write(turns, generation_prompt=False), turns[1])
            return end[0] if end == self._first_special(between) else None
        except DataError:  # a template that refuses such a conversation has no end of a turn to show
            return None

    def _write(self, messages: Sequence[ChatMessage], *, generation_prompt: bool) -> str:
        return self._run(
            "the chat template refuses the messages: ",
            lambda: render(self._bound, messages, generation_prompt=generation_prompt),
        )

    def _run(self, refusal: str, ask: Callable[[], T]) -> T:
        """Raises DataError: what the template itself says, behind ``refusal``; or why it was stopped, now or before."""
        if self._stopped is None:
            try:
                return ask()
            except StoppedError as error:
                self._stopped = StoppedError(f"{self._file}: the chat template {error}: it is not used; mend it there")
            except DataError as error:
                raise DataError(f"{refusal}{one_line(error)} ({self._file})") from None
        raise self._stopped

    def _write_all(self, messages: Sequence[ChatMessage]) -> str:
        """As ``_write``. A turn that only calls tools has no content: null, as most templates ask for it, or an empty
        text for one that would write "None"."""
        if all(message["content"] is not None for message in messages):
            return self._write(messages, generation_prompt=True)
        empty = [{**message, "content": message["content"] or ""} for message in messages]
        without = self._write(empty, generation_prompt=True)
        try:
            text = self._write(messages, generation_prompt=True)
        except DataError:
            return without
        return without if text.count("None") > without.count("None") else text

    def _check_variables(self) -> None:
        """Raises DataError for a variable that the template never reads: setting it would do nothing."""
        read = self._run("the chat template is none: ", lambda: names_read(self._bound)) - OURS
        unread = sorted(self._variables.keys() - read)
        if unread:
            known = sorted(read - GLOBALS - set(self._hf.special_tokens_map))
            raise DataError(
                f"data.chat_template_kwargs: the model's chat template never reads {', '.join(unread)} "
                f"(it reads {', '.join(known) or 'nothing that can be set'})"
            )

    @functools.cached_property
    def _special(self) -> re.Pattern[str]:
        """Any special token; those of thinking are text that an assistant's turn may hold."""
        added = {token.content for token in self._hf.added_tokens_decoder.values() if token.special}
        tokens = {token for token in added | set(self._hf.all_special_tokens) if token and "think" not in token.lower()}
        return re.compile("|".join(map(re.escape, sorted(tokens, key=len, reverse=True))) or r"(?!)")

    def _first_special(self, text: str) -> tuple[str, int] | None:
        found = self._special.search(text)
        return (found[0], found.start()) if found else None

    @functools.cached_property
    def _marks(self) -> frozenset[str]:
        """The special tokens that the template writes around what is said."""
        marks: set[str] = set()
        for roles in (("user",), ("system", "user"), ("user", "assistant", "user")):
            try:
                marks.update(self._special.findall(self._write(_turns(*roles), generation_prompt=True)))
            except DataError:  # a template without such a role
                continue
        return frozenset(marks)

    @functools.cached_property
    def _ends(self) -> frozenset[str]:
        """The tokens between texts, which the template need not write."""
        return frozenset(filter(None, (self._hf.bos_token, self._hf.eos_token, self._hf.pad_token)))

    def _first_of(self, tokens: frozenset[str], text: str) -> str | None:
        return next((token for token in self._special.findall(text) if token in tokens), None)

    @functools.cached_property
    def _around(self) -> tuple[str, str]:
        """What the template writes before and behind a user's only turn, without white space at the ends."""
        (turn,) = _turns("user")
        before, _, behind = self._write([turn], generation_prompt=True).partition(turn["content"])
        return before.strip(), behind.strip()

    def _check_unrendered(self, text: str) -> None:
        """Raises DataError for a text that was rendered already: it would become a turn within a user's turn."""
        mark = self._first_of(self._marks, text)
        if mark is None:
            before, behind = self._around
            if before and behind and text.strip().startswith(before) and text.strip().endswith(behind):
                mark = before
        if mark is not None:
            raise DataError(
                f"the prompt already holds {mark!r}, which the chat template writes itself: for texts that are "
                f"rendered already set data.chat_template = false, else remove it from the text"
            )
        if elsewhere := _ELSEWHERE.match(text):
            raise DataError(
                f"the prompt begins with {elsewhere[1]!r}: another model's chat template has rendered it already; give "
                f"the question alone or chat messages, or set data.chat_template = false"
            )
        if end := self._first_of(self._ends, text):
            raise DataError(f"the prompt holds {end!r}, which the model would read as that token: remove it")

    def _check_contents(self, messages: Sequence[ChatMessage]) -> None:
        for i, message in enumerate(messages):
            mark = self._first_of(self._marks | self._ends, str(message["content"] or ""))
            if mark is not None:
                raise DataError(
                    f"message {i} ({message['role']}) holds {mark!r}, {self._what(mark)}: the "
                    f"model would read it as one of those; remove it"
                )

    def _what(self, mark: str) -> str:
        return "which the chat template writes around turns" if mark in self._marks else "a token that ends texts"

    def _check_said(self, messages: Sequence[ChatMessage], text: str) -> None:
        """Raises DataError unless the text holds what every message says."""
        dropped = self._positions_dropped(messages)
        for i, message in enumerate(messages):
            role, content = message["role"], str(message["content"] or "")
            if content.strip() and (i in dropped or not _says(text, role, content)):
                raise DataError(
                    f"the chat template leaves out what message {i} ({role}) says, {short(content)}: the model would "
                    f"not read it; give it another role, or another template to the model"
                )
            absent = next((name for name in _called(message) if name not in text), None)
            if absent is not None:
                raise DataError(f"the chat template leaves out the call of {absent!r} in message {i} ({role})")

    def _positions_dropped(self, messages: Sequence[ChatMessage]) -> frozenset[int]:
        """Messages that the template would leave out whatever they say: "2" is in many a text by chance."""
        shape = tuple((message["role"], bool(message["content"]), *sorted(message)) for message in messages)
        if shape not in self._dropped:
            words = [f"probe{i}x" if message["content"] else "" for i, message in enumerate(messages)]
            probes = [
                {**message, "content": word or message["content"]}
                for message, word in zip(messages, words, strict=True)
            ]
            try:
                text = self._write_all(probes)
                self._dropped[shape] = frozenset(i for i, word in enumerate(words) if word not in text)
            except DataError:  # it asks for more than words; what the messages really say is looked for all the same
                self._dropped[shape] = frozenset()
        return self._dropped[shape]


def _texts(token: Any) -> Any:
    """A special token as text; several as a list of them."""
    return [str(part) for part in token] if isinstance(token, list | tuple) else str(token)


def _turns(*roles: str) -> list[dict[str, str]]:
    return [{"role": role, "content": f"probe{i}x"} for i, role in enumerate(roles)]


def _behind(text: str, turn: ChatMessage) -> str:
    """What follows the turn's content; nothing where the text lacks it."""
    _, content, behind = text.rpartition(turn["content"])
    return behind if content else ""


def _says(text: str, role: str, content: str) -> bool:
    """Whether the text holds the content, white space around it aside, as it is or as a string of JSON.

    Of an assistant's earlier turn templates may leave out the thinking, on purpose.
    """
    said = content.strip()
    if said in text or json.dumps(said, ensure_ascii=False)[1:-1] in text:
        return True
    return role == "assistant" and "</think>" in said and said.rpartition("</think>")[2].strip() in text


def _called(message: ChatMessage) -> Iterator[str]:
    """Names of the functions that a turn calls."""
    calls = message.get("tool_calls")
    for call in calls if isinstance(calls, list | tuple) else ():
        function = call.get("function", call) if isinstance(call, dict) else None
        name = function.get("name") if isinstance(function, dict) else None
        if isinstance(name, str):
            yield name
