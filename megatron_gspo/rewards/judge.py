"""A language model that grades responses, behind an OpenAI-compatible chat completions endpoint."""

from __future__ import annotations

import asyncio
import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from megatron_gspo.errors import ConfigError
from megatron_gspo.rewards.asking import Asking, NoAnswerError, check_asking, check_model
from megatron_gspo.rewards.interface import RewardContext, RewardResult, Score, Ungraded
from megatron_gspo.rewards.judge_cache import JudgeCache
from megatron_gspo.rewards.judge_talk import chat, converse
from megatron_gspo.rewards.judge_text import MARKED_GRADE, TEMPLATE, GradeReader, check_template, fill
from megatron_gspo.rewards.registry import NO_CONTEXT
from megatron_gspo.rewards.served import find_place
from megatron_gspo.types import Prompt, Rollout


@dataclass(frozen=True)
class Verdict:
    """What a judge said of one question."""

    grade: float
    """In [0, 1]."""
    prompt_tokens: int = 0
    completion_tokens: int = 0
    asked: int = 0
    """Requests that it took; 0 for one that was known."""


@dataclass(frozen=True)
class Prices:
    """Money for a million tokens, in whatever currency."""

    prompt: float
    completion: float

    def of(self, verdict: Verdict) -> float:
        """What it cost."""
        return (verdict.prompt_tokens * self.prompt + verdict.completion_tokens * self.completion) / 1e6


class Judge(Asking):
    """Asks ``model`` to grade each response, at temperature 0; the grade is scaled to [0, 1].

    Equal questions are asked once: answers are kept by the hash of what was asked, in memory, and with ``keep`` in the
    run's directory too. Components: ``grade`` (as the judge gave it), ``prompt_tokens``, ``completion_tokens``,
    ``asked`` (requests), and ``cost`` where prices are given; what was known costs nothing.

    Args:
        url: of the endpoint, ".../v1/chat/completions", or several, asked in turn. Without one, the servers that the
            run starts (``[reward_server]``, of kind "judge").
        model: its name there.
        template: the user's message, with {prompt}, {answer}, {response} and {mark}: see ``judge_text``.
        system: a system message; none when empty.
        pattern: a regular expression whose one group, at its last match, is the grade.
        field: or the field of a JSON object that holds it.
        scale: the judge's least and best grade.
        extra: further fields of the request.
        price: (prompt, completion) of a million tokens.
        timeout_s: of one try; ``reward.timeout_s`` bounds all of a response's.
        cache: answers that are kept in memory; 0 none.
        keep: also writes them to ``judge/`` in the run's directory, and reads them there.
    """

    def __init__(
        self,
        url: str | Sequence[str] = "",
        model: str = "",
        *,
        template: str = TEMPLATE,
        system: str = "",
        pattern: str = MARKED_GRADE,
        field: str = "",
        scale: tuple[float, float] = (0.0, 10.0),
        max_tokens: int = 1024,
        extra: dict[str, Any] | None = None,
        price: tuple[float, float] | None = None,
        key_variable: str = "",
        key_file: str = "",
        timeout_s: float = 25.0,
        retries: int = 4,
        cache: int = 100_000,
        keep: bool = False,
        context: RewardContext = NO_CONTEXT,
    ) -> None:
        check_asking("judge", timeout_s, retries)
        place = find_place("judge", url, model, key_variable, key_file, context)
        check_model("judge", place.model, max_tokens)
        check_template(template)
        if cache < 0:
            raise ConfigError(f"reward 'judge': cache = {cache} is 0 or more")
        self._model, self._system, self._template = place.model, system, template
        self._reader = GradeReader(pattern, field, scale)
        self._extra, self._max_tokens = dict(extra or {}), max_tokens
        self._prices = None if price is None else Prices(*_pair("price", price))
        self._cache = JudgeCache(cache, context.run_dir if keep else "")
        self._under_way: dict[str, asyncio.Task[Verdict]] = {}
        self.limits_itself = place.own  # a server that is started again is waited for
        self._service = place.chat(timeout_s, retries)

    async def __aexit__(self, *error: object) -> None:
        left = list(self._under_way.values())
        for task in left:
            task.cancel()
        await asyncio.gather(*left, return_exceptions=True)
        await super().__aexit__(*error)
        await asyncio.to_thread(self._cache.write)

    async def __call__(self, prompt: Prompt, response: Rollout) -> RewardResult:
        question = self._question(prompt, response)
        key = hashlib.sha256(json.dumps(question, sort_keys=True).encode()).hexdigest()
        known = self._cache.get(key)
        try:
            verdict = Verdict(known) if known is not None else await self._ask_once(key, question)
        except NoAnswerError as error:
            return Ungraded(f"judge {self._model!r}: {error}")
        return Score(verdict.grade, self._components(verdict))

    def close(self) -> None:
        """Writes what is left to write."""
        self._cache.write()

    async def _ask_once(self, key: str, question: dict[str, Any]) -> Verdict:
        """Its own verdict for the first that asks, and for the others, who wait for it, the same at no cost."""
        task = self._under_way.get(key)
        is_first = task is None
        if task is None:
            task = self._under_way[key] = asyncio.create_task(self._ask(key, question))
            task.add_done_callback(lambda done: self._done(key, done))
        verdict = await asyncio.shield(task)  # the first one's time may be up before the others'
        return verdict if is_first else Verdict(verdict.grade)

    def _done(self, key: str, task: asyncio.Task[Verdict]) -> None:
        self._under_way.pop(key, None)
        if not task.cancelled():
            task.exception()  # seen, also where nobody waits for it any more

    async def _ask(self, key: str, question: dict[str, Any]) -> Verdict:
        """Raises NoAnswerError, RewardError."""
        said = await converse(self._service, question, self._reader.grade)
        self._cache.put(key, said.found)
        return Verdict(said.found, said.prompt_tokens, said.completion_tokens, said.requests)

    def _question(self, prompt: Prompt, response: Rollout) -> dict[str, Any]:
        asked = fill(self._template, prompt, response.text)
        return chat(self._model, self._system, asked, self._max_tokens, self._extra)

    def _components(self, verdict: Verdict) -> dict[str, float]:
        found = {
            "grade": self._reader.unscaled(verdict.grade),
            "prompt_tokens": float(verdict.prompt_tokens),
            "completion_tokens": float(verdict.completion_tokens),
            "asked": float(verdict.asked),
        }
        return found | ({"cost": self._prices.of(verdict)} if self._prices else {})


def _pair(name: str, given: Any) -> tuple[float, float]:
    try:
        first, second = (float(value) for value in given)
    except (TypeError, ValueError):
        raise ConfigError(f"reward 'judge': {name} = {given!r} is not two numbers") from None
    return first, second
