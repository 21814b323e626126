"""What a row of each format means: one table, pure functions of a row's fields. docs/data.md is this table to read."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from decimal import Decimal
from typing import Any, Literal, get_args

from megatron_gspo.config import DataConfig
from megatron_gspo.data.messages import ALIASES, ChatMessage, check_prompt, check_text, holds_messages
from megatron_gspo.errors import DataError

PromptFormat = Literal["auto", "prompts", "gsm8k", "verl", "messages", "sharegpt", "alpaca"]
Fields = dict[str, Any]


@dataclass(frozen=True)
class Example:
    """What a row says, before anything is rendered."""

    prompt: str | tuple[ChatMessage, ...]
    answer: str = ""
    """The reference answer; empty when there is none."""
    id: str = ""
    """Empty: the row has none, and its place will do."""
    completion: object = None
    """What supervised fine-tuning learns, a text or the assistant's one message, looked at by ``completion_of`` alone;
    None when the row has none."""
    metadata: Fields = field(default_factory=dict)
    newline: bool = False
    """Whether a prompt that no chat template was applied to ends in a newline."""


@dataclass(frozen=True)
class Format:
    """An entry of the table."""

    read: Callable[[Fields], Example]
    """From a row's fields, which it may take apart. Raises DataError, without the place."""
    recognise: Callable[[Fields], bool]
    """Whether "auto" takes a row with these fields for one of this format."""
    prompt: str
    """The field that holds the prompt."""
    completion: str
    """The field that holds the completion."""


def read_prompts(fields: Fields) -> Example:
    """``prompt`` (text or chat messages), ``answer``, ``id``, ``completion``: a text, or TRL's one message."""
    prompt = check_prompt(fields.pop("prompt", None))
    answer = optional_text(fields.pop("answer", None), "answer")
    return Example(prompt, answer, _identity(fields), fields.get("completion"), fields)


def read_gsm8k(fields: Fields) -> Example:
    """``question`` and ``answer``, whose whole text is the reference and the completion."""
    question = check_text(fields.pop("question", None), "question")
    answer = text(fields.pop("answer", None), "answer")
    return Example(question, answer, _identity(fields), answer, fields, newline=True)


def read_verl(fields: Fields) -> Example:
    """``prompt`` and ``reward_model.ground_truth``; all but ``prompt`` is metadata too, as verl's rewards read it.

    ``extra_info.index`` is no id: DAPO-Math repeats it a hundred times.
    """
    prompt = check_prompt(fields.pop("prompt", None))
    answer = optional_text(find(fields, VERL_ANSWER), VERL_ANSWER)
    return Example(prompt, answer, _identity(fields), fields.get("completion"), fields)


def read_messages(fields: Fields) -> Example:
    """``messages``: turns up to the last one are the prompt, the last one, the assistant's, is the completion."""
    return _conversation(fields, "messages")


def read_sharegpt(fields: Fields) -> Example:
    """``conversations`` of {"from", "value"} turns, and perhaps ``system``; otherwise as "messages"."""
    turns = fields.get("conversations")
    system = fields.pop("system", None)
    if system and isinstance(turns, list):
        fields["conversations"] = [{"role": "system", "content": system}, *turns]
    return _conversation(fields, "conversations")


def read_alpaca(fields: Fields) -> Example:
    """``instruction``, ``input`` below it after an empty line, and ``output``: the completion, and the reference unless
    there is an ``answer``."""
    prompt = check_text(fields.pop("instruction", None), "instruction")
    if more := optional_text(fields.pop("input", None), "input"):
        prompt = f"{prompt}\n\n{more}"
    output = optional_text(fields.pop("output", None), "output")
    answer = optional_text(fields.pop("answer", None), "answer") or output
    return Example(prompt, answer, _identity(fields), output or None, fields)


def _is_verl(row: Fields) -> bool:
    model = row.get("reward_model")
    return _is_object(model) or find(row, VERL_ANSWER) is not None


VERL_ANSWER = "reward_model.ground_truth"
FORMATS: dict[str, Format] = {
    "verl": Format(
        read_verl,
        lambda row: "prompt" in row and "answer" not in row and _is_verl(row),
        prompt="prompt",
        completion="completion",
    ),
    "prompts": Format(read_prompts, lambda row: "prompt" in row, "prompt", "completion"),
    "messages": Format(read_messages, lambda row: "messages" in row, "messages", "messages"),
    "sharegpt": Format(read_sharegpt, lambda row: "conversations" in row, "conversations", "conversations"),
    "gsm8k": Format(read_gsm8k, lambda row: "question" in row and "answer" in row, "question", "answer"),
    "alpaca": Format(read_alpaca, lambda row: "instruction" in row, "instruction", "output"),
}
"""In the order in which "auto" asks. Adding a format is a function and an entry here, and its name in
``PromptFormat`` and ``DataConfig.format``."""
assert {"auto", *FORMATS} == set(get_args(PromptFormat))


@dataclass(frozen=True)
class Paths:
    """Fields that stand in for a format's own, by name; "a.b" is the field b within a. Empty: the format's own."""

    prompt: str = ""
    answer: str = ""
    completion: str = ""

    @classmethod
    def named_by(cls, config: DataConfig) -> Paths:
        """As ``[data]`` names fields."""
        return cls(config.prompt_field, config.answer_field, config.completion_field)


def recognise(rows: Iterable[Mapping[str, Any]], paths: Paths) -> str:
    """The format of the first row that is of one; "prompts" when none is, whose errors then say what is missing.

    A row of verl's whose answer is null looks like one of "prompts": another row tells.
    """
    if paths.prompt:
        return "prompts"
    fields = [dict(row) for row in rows]
    found = [name for row in fields for name, entry in FORMATS.items() if entry.recognise(row)][:1] or ["prompts"]
    is_verl = found == ["prompts"] and not any("answer" in row for row in fields)
    return "verl" if is_verl and any(FORMATS["verl"].recognise(row) for row in fields) else found[0]


def read_example(name: str, paths: Paths, fields: Fields) -> Example:
    """A row as the format ``name`` has it, with ``paths`` in the place of its own fields.

    Raises DataError, without the place; it says which format the row was taken for.
    """
    entry, names = FORMATS[name], ", ".join(fields)
    found = entry.prompt in fields
    try:
        chosen = {what: _named(fields, path) for what, path in vars(paths).items() if path and what != "completion"}
        if "prompt" in chosen:
            fields = {key: value for key, value in fields.items() if key != paths.prompt}
            fields[entry.prompt] = chosen["prompt"]
        if "answer" in chosen and entry.completion != "answer":
            fields.pop("answer", None)
        raw = find(fields, paths.completion) if paths.completion else None
        example = entry.read(fields)
    except DataError as error:
        lacks = "" if paths.prompt or found else f"; the row has {names:.200}: data.prompt_field names the prompt's"
        raise DataError(f'{error} (read as data.format = "{name}"{lacks})') from None
    answer = optional_text(chosen["answer"], paths.answer) if "answer" in chosen else example.answer
    return replace(example, answer=answer, completion=raw if paths.completion else example.completion)


def completion_of(name: str, paths: Paths, example: Example) -> str:
    """What supervised fine-tuning learns. Raises DataError when the row has none."""
    where = paths.completion or FORMATS[name].completion
    try:
        if isinstance(example.completion, list | tuple):
            if len(example.completion) != 1:
                count = len(example.completion)
                raise DataError(f"{where} has {count} messages: one is learnt, the assistant's answer to the prompt")
            return _assistant_text(example.completion[0], f"{where}[-1]")
        if example.completion is None and not paths.completion and where in ("messages", "conversations"):
            raise DataError(f"the last turn of {where} is not the assistant's: there is nothing to learn")
        if example.completion is None and not paths.completion:
            names = ", ".join(example.metadata)
            raise DataError(
                f"the field {where!r} is missing; beside it the row has {names:.200}: "
                f"data.completion_field names what is learnt"
            )
        return text(example.completion, where)
    except DataError as error:
        raise DataError(f'{error} (read as data.format = "{name}")') from None


def find(fields: Mapping[str, Any], path: str) -> Any:
    """The value at "a.b", or of a column that is named so; None when there is none. Raises DataError for an object that
    was written down as a text: it has no fields."""
    if path in fields:
        return fields[path]
    head, dot, rest = path.partition(".")
    inner = fields.get(head) if dot else None
    if _is_object(inner):
        raise DataError(f"the field {head!r} holds an object as a text, got {inner!r:.80}: write it as an object")
    return find(inner, rest) if isinstance(inner, Mapping) else None


def _is_object(value: object) -> bool:
    """Whether it is a text that is a JSON object."""
    return isinstance(value, str) and value.lstrip()[:1] == "{" and value.rstrip()[-1:] == "}"


def text(value: object, name: str) -> str:
    """A text with something in it."""
    if value is None:
        raise DataError(f"the field {name!r} is missing")
    if not isinstance(value, str) or not value.strip():
        raise DataError(f"the field {name!r} must be a non-empty string, got {value!r:.80}")
    if holds_messages(value):
        raise DataError(f"the field {name!r} holds chat messages as a text, got {value!r:.80}: write them as a list")
    return value


def optional_text(value: object, name: str) -> str:
    """A text, or a number as text; empty when absent."""
    if value is None:
        return ""
    if isinstance(value, bool) or not isinstance(value, str | int | float | Decimal):
        raise DataError(f"the field {name!r} must be a string or a number, got {value!r:.80}")
    if isinstance(value, float | Decimal) and not math.isfinite(value):
        raise DataError(f"the field {name!r} is {value}, which is no number")
    return str(value)


def _identity(fields: Fields) -> str:
    return optional_text(fields.pop("id", None), "id")


def _named(fields: Fields, path: str) -> Any:
    """What stands at a path that the configuration names."""
    value = find(fields, path)
    if value is None:
        raise DataError(f"the field {path!r} is missing")
    return value


def _conversation(fields: Fields, name: str) -> Example:
    """Turns: the last one, if it is the assistant's, is completion and reference, the others are the prompt."""
    turns = fields.pop(name, None)
    answer = optional_text(fields.pop("answer", None), "answer")
    if not isinstance(turns, list | tuple) or not turns:
        raise DataError(f"the field {name!r} must be a list of chat messages, got {turns!r:.80}")
    if not _is_assistant(turns[-1]):
        return Example(check_prompt(list(turns), name), answer, _identity(fields), None, fields)
    *before, last = turns
    if not before:
        raise DataError(f"{name} has no turn before the assistant's")
    with contextlib.suppress(DataError):  # a turn that calls tools is no reference
        answer = answer or _assistant_text(last, name)
    return Example(check_prompt(before, name), answer, _identity(fields), [last], fields)


def _is_assistant(message: object) -> bool:
    role = message.get("role") or message.get("from") if isinstance(message, Mapping) else None
    name = role.strip().lower() if isinstance(role, str) else ""
    return ALIASES.get(name, name) == "assistant"


def _assistant_text(message: object, name: str) -> str:
    """The text of an assistant's turn. Raises DataError for one of another role, or that says more than a text."""
    if not _is_assistant(message):
        raise DataError(f"{name} = {message!r:.80} is not the assistant's turn")
    turns = check_prompt([message, {"role": "user", "content": "?"}], name)
    assert not isinstance(turns, str)
    turn = turns[0]
    more = sorted(turn.keys() - {"role", "content", "name"})
    if more:
        raise DataError(f"{name} has {', '.join(more)}, which is more than a text to learn")
    return text(turn["content"], name)
