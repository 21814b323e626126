"""What a prompt may be, for every file format: a text, or chat messages in one normal form.

A chat template writes whatever it is given: ``None`` for a content that is null, a Python list for a list of parts,
nothing at all for a role that it does not know. So messages are brought into one form here, or refused.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from megatron_gspo.errors import DataError

ChatMessage = Mapping[str, Any]
"""One turn: at least ``role`` and ``content``."""

ROLES = ("system", "developer", "user", "assistant", "tool")
ALIASES = {"human": "user", "gpt": "assistant", "model": "assistant", "bot": "assistant", "chatbot": "assistant"}
"""Roles as ShareGPT, Gemini and others name them."""
MEDIA = ("image", "images", "video", "videos", "audio", "audios", "files")
"""Keys of a message that stand for what is no text."""
_ROLE_KEY = re.compile(r"['\"](?:role|from)['\"]\s*:")
_ONE_MESSAGE = (
    re.compile(r"['\"](?:role|from)['\"]\s*:\s*['\"](?:system|developer|user|assistant|tool|human|gpt)['\"]"),
    re.compile(r"['\"](?:content|value)['\"]\s*:"),
)
_INVISIBLE = "\u200b\u200c\u200d\u2060\ufeff"


def check_prompt(value: object, name: str = "prompt") -> str | tuple[ChatMessage, ...]:
    """A prompt as the tokenizer renders it: a text, or chat messages whose contents are texts.

    Messages are {"role", "content"}, or ShareGPT's {"from", "value"}. A content is a text, or parts
    {"type": "text", "text": ...}, which are joined with nothing between them. A key whose value is null is left out,
    at every depth: Parquet gives every message every key. Other keys (``tool_calls``, ``name``) stay as they are. Only
    an assistant's turn that calls tools and says nothing has the content None.

    ``name`` is the field that errors speak of. Raises DataError, without the place in the file, for anything that
    would not reach the model as a user means it: null, a number, an image, an unknown role, a user's turn without
    text, and a last turn that is the assistant's.
    """
    if value is None:
        raise DataError(f"the field {name!r} is missing")
    if not isinstance(value, list | tuple):
        return check_text(value, name)
    if not value:
        raise DataError(f"{name} is an empty list of chat messages")
    try:
        messages = tuple(_message(message, f"{name}[{i}]") for i, message in enumerate(value))
    except RecursionError:
        raise DataError(f"{name}: the messages are nested too deeply to be read") from None
    if not any(message["role"] in ("user", "tool") for message in messages):
        roles = ", ".join(str(message["role"]) for message in messages[:5])
        raise DataError(f"{name} has no turn of the user's ({roles}): the model would answer to nobody")
    if messages[-1]["role"] == "assistant":
        raise DataError(
            f"{name}[{len(messages) - 1}], the last message, is the assistant's: a prompt ends where the model is to "
            f"answer; move the reference answer to the field 'answer' (a text to learn, to 'completion')"
        )
    return messages


def check_text(value: object, name: str) -> str:
    """A text with more in it than white space. Raises DataError, which names the field, also for chat messages that
    were written down as a text: they would be one turn of the user's."""
    if value is None:
        raise DataError(f"the field {name!r} is missing")
    if not isinstance(value, str) or _is_blank(value):
        raise DataError(f"the field {name!r} must be a non-empty string, got {value!r:.80}")
    if holds_messages(value):
        raise DataError(f"the field {name!r} holds chat messages as a text, got {value!r:.80}: write them as a list")
    return value


def holds_messages(text: str) -> bool:
    """Whether the text is chat messages, or one of them, as JSON or as Python prints them."""
    begins = text.lstrip()[:2]
    if begins == "[{":
        return _ROLE_KEY.search(text) is not None
    return begins[:1] == "{" and all(pattern.search(text) for pattern in _ONE_MESSAGE)


def holds_media(value: object) -> bool:
    """Whether a field for images, audio or video has any: Parquet gives rows without them a null, an empty list, or an
    object whose fields are null."""
    if isinstance(value, dict):
        return any(map(holds_media, value.values()))
    return any(map(holds_media, value)) if isinstance(value, list | tuple) else bool(value)


def _is_blank(text: str) -> bool:
    return not text.translate(dict.fromkeys(map(ord, _INVISIBLE))).strip()


def _message(value: object, place: str) -> ChatMessage:
    fields = _without_nulls(value)
    if isinstance(fields, dict) and "role" not in fields and {"from", "value"} <= fields.keys():
        fields = {"role": fields.pop("from"), "content": fields.pop("value"), **fields}
    if not isinstance(fields, dict) or "role" not in fields:
        raise DataError(f"{place} = {value!r:.80} is no chat message: it needs role and content")
    if fields.get("tool_calls") in ([], ()):
        del fields["tool_calls"]
    role = _role(fields["role"], place)
    if role == "assistant" and "tool_calls" in fields and not fields.get("content"):
        return {**fields, "role": role, "content": None}
    if "content" not in fields:
        raise DataError(f"{place} = {value!r:.80} is no chat message: it needs role and content, which is not null")
    content = _content(fields["content"], place)
    if media := next((key for key in MEDIA if holds_media(fields.get(key))), None):
        raise DataError(f"{place} has {media!r}: images, audio and files do not reach a language model")
    if role == "user" and _is_blank(content):
        raise DataError(f"{place}: the user's turn is empty, got {fields['content']!r:.80}")
    return {**fields, "role": role, "content": content}


def _role(value: object, place: str) -> str:
    role = value.strip().lower() if isinstance(value, str) else ""
    role = ALIASES.get(role, role)
    if role not in ROLES:
        raise DataError(
            f"{place}: the role {value!r:.40} is unknown, use {', '.join(ROLES[:-1])} or {ROLES[-1]} "
            f"({', '.join(ALIASES)} are read too)"
        )
    return role


def _content(value: object, place: str) -> str:
    """The text of a content; parts are joined with nothing between them, as templates that take parts do."""
    if isinstance(value, str):
        return value
    if not isinstance(value, list | tuple):
        raise DataError(f"{place}: the content must be a text or text parts, got {value!r:.80}")
    texts = []
    for part in value:
        text = part.get("text") if isinstance(part, dict) and part.get("type", "text") == "text" else None
        if not isinstance(text, str):
            raise DataError(
                f'{place}: a part of the content is no text ({{"type": "text", "text": ...}}), got {part!r:.80}: '
                f"images, audio and files do not reach a language model"
            )
        texts.append(text)
    return "".join(texts)


def _without_nulls(value: Any) -> Any:
    """A copy of a JSON tree without the keys whose value is null."""
    if isinstance(value, dict):
        return {key: _without_nulls(item) for key, item in value.items() if item is not None}
    return [_without_nulls(item) for item in value] if isinstance(value, list | tuple) else value
