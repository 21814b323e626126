"""Rewards from a server of the user's, over HTTP."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from megatron_gspo.errors import ConfigError
from megatron_gspo.rewards.asking import Asking, NoAnswerError, Service, check_asking, check_urls, read_key
from megatron_gspo.rewards.interface import RewardResult, Score, Ungraded
from megatron_gspo.types import Prompt, Rollout


class Remote(Asking):
    """Posts a group, gets one reward a response.

    The question: ``{"prompt_id", "prompt", "turns", "answer", "metadata", "ids", "responses", "finish_reasons"}``, the
    last three lists with an entry a response. The answer: a list with an entry a response, or ``{"rewards": [...]}``;
    an entry is a number, ``{"reward": NUMBER, "components": {NAME: NUMBER}}``, or ``{"ungraded": REASON}``.
    """

    def __init__(
        self,
        url: str | Sequence[str],
        *,
        low: float | str = 0.0,
        high: float | str = 1.0,
        key_variable: str = "",
        key_file: str = "",
        timeout_s: float = 20.0,
        retries: int = 4,
    ) -> None:
        check_asking("remote", timeout_s, retries)
        try:
            self.range = (float(low), float(high))  # "-inf" and "inf" too
        except (TypeError, ValueError):
            self.range = (0.0, 0.0)
        if not self.range[0] < self.range[1]:
            raise ConfigError(f"reward 'remote': low = {low!r} is not below high = {high!r}")
        urls, key = check_urls("remote", url), read_key("remote", key_variable, key_file)
        self._service = Service(urls, key=key, timeout_s=timeout_s, retries=retries)

    async def score_group(self, prompt: Prompt, responses: Sequence[Rollout]) -> Sequence[RewardResult]:
        """What the server says of each."""
        try:
            found = await self._service.ask(question(prompt, responses))
            entries = found.get("rewards") if isinstance(found, dict) else found
            if not isinstance(entries, list) or len(entries) != len(responses):
                what = f"{len(entries)} rewards" if isinstance(entries, list) else f"{found!r:.100}"
                raise NoAnswerError(f"it answered {what} for {len(responses)} responses")
        except NoAnswerError as error:
            return [Ungraded(str(error))] * len(responses)
        return [_entry(entry) for entry in entries]


def question(prompt: Prompt, responses: Sequence[Rollout]) -> dict[str, Any]:
    """What is posted: JSON values."""
    return {
        "prompt_id": prompt.id,
        "prompt": prompt.text,
        "turns": _json(prompt.turns),
        "answer": prompt.answer,
        "metadata": _json(prompt.metadata),
        "ids": [f"{prompt.id}/{response.sample}" for response in responses],
        "responses": [response.text for response in responses],
        "finish_reasons": [response.finish_reason for response in responses],
    }


def _json(value: Any) -> Any:
    """With text for what JSON has no word for."""
    if isinstance(value, dict):
        return {str(name): _json(part) for name, part in value.items()}
    if isinstance(value, (list, tuple)):
        return [_json(part) for part in value]
    return value if value is None or isinstance(value, (str, int, float, bool)) else str(value)


def _entry(entry: Any) -> Any:
    """As a result; what it is not is found by whoever asked."""
    if not isinstance(entry, dict):
        return entry
    if "ungraded" in entry:
        return Ungraded(str(entry["ungraded"]))
    return Score(entry.get("reward", float("nan")), entry.get("components") or {})
