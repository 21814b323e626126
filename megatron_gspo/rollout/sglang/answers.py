"""An HTTP answer of a server: its bytes, bounded, and what they say."""

from __future__ import annotations

import json
from typing import Any

import aiohttp

from megatron_gspo.calls import refusal
from megatron_gspo.errors import EngineReplyError, RolloutError
from megatron_gspo.rollout.sglang.reply import shorten


def decode_answer(status: int, text: str, url: str) -> Any:
    """The JSON of an answer with status 200. Raises RolloutError for a refusal, EngineReplyError for other text."""
    if status != 200:
        raise RolloutError(f"{url} refused the request ({refusal(status)}): {_message(text)}")
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise EngineReplyError(f"{url} answered with broken JSON ({error}): {shorten(text)}") from None


def _message(text: str) -> str:
    """SGLang's own words, when the body is its error object."""
    try:
        return str(json.loads(text)["error"]["message"])
    except (ValueError, RecursionError, KeyError, TypeError):
        return shorten(text)


async def read_body(response: aiohttp.ClientResponse, most_bytes: int) -> str:
    """The body. Raises EngineReplyError for one of more than ``most_bytes``, as soon as they have come."""
    body = bytearray()
    async for part in response.content.iter_any():
        body += part
        if len(body) > most_bytes:
            raise EngineReplyError(
                f"{response.url}: the reply goes on after {most_bytes} bytes, the most that what was asked for can take"
            )
    return body.decode(errors="replace")
