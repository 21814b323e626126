"""A sum of rewards with weights, each of them a named component."""

from __future__ import annotations

import asyncio
import contextlib
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, Any

import numpy as np
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from megatron_gspo.config import RewardConfig
from megatron_gspo.errors import ConfigError
from megatron_gspo.rewards.interface import RewardContext, RewardResult, Score, Stopped, TokenRewards, Ungraded
from megatron_gspo.rewards.registry import NO_CONTEXT, Reward, check_reward, resolve_reward
from megatron_gspo.rewards.results import Result
from megatron_gspo.rewards.scoring import lifetime, results_of, slots
from megatron_gspo.types import Prompt, Rollout

MOST_PARTS = 32


class PartSettings(BaseModel):
    """An entry of ``reward.options.parts``."""

    model_config = ConfigDict(extra="forbid")

    function: str
    """As ``reward.function``."""
    weight: Annotated[float, Field(allow_inf_nan=False)] = 1.0
    """What its number is multiplied by; negative for a penalty, 0 for one that is only looked at."""
    options: dict[str, Any] = Field(default_factory=dict)
    """As ``reward.options``."""
    name: Annotated[str, Field(pattern="^[a-z0-9_]{1,40}$")] | None = None
    """Of its component; the function's name when absent."""

    @property
    def component(self) -> str:
        """Its component's name."""
        last = re.split(r"[:.]", self.function)[-1].lower()
        return self.name or re.sub(r"[^a-z0-9_]", "_", last)[:40]


@dataclass(frozen=True)
class Part:
    """One of the rewards."""

    name: str
    weight: float
    reward: Reward

    @property
    def span(self) -> tuple[float, float]:
        """The least and the most that it adds."""
        ends = [self.weight * end for end in self.reward.range] if self.weight else [0.0]
        return min(ends), max(ends)


class Weighted:
    """``sum of weight x part``, in the order of the parts.

    Each part is scored as if it stood alone, within its own lifetime and limits (``reward.timeout_s`` is one part's).
    A response that one part cannot grade is ungraded, unless the part's weight is 0. Its range follows from theirs.
    """

    composite = True

    def __init__(self, parts: list[dict[str, Any]], context: RewardContext = NO_CONTEXT) -> None:
        given = context.config or RewardConfig()
        self.parts = []
        for settings in read_parts(parts):
            update = {"function": settings.function, "options": settings.options}
            reward = resolve_reward(given.model_copy(update=update), context)
            self.parts.append(Part(settings.component, settings.weight, reward))
        lows, highs = zip(*(part.span for part in self.parts), strict=True)
        self.range = (_sum(lows), _sum(highs))
        self.ours = all(part.reward.ours for part in self.parts)
        self.sparing = any(part.reward.sparing for part in self.parts)
        self._slots: list[asyncio.Semaphore] = []

    @staticmethod
    def check(parts: list[dict[str, Any]], context: RewardContext = NO_CONTEXT) -> None:
        """Raises ConfigError for what can be said of the parts without running any of the user's code."""
        for settings in read_parts(parts):
            check_reward(RewardConfig(function=settings.function, options=settings.options), context)

    async def __aenter__(self) -> None:
        self._slots = [slots(part.reward) for part in self.parts]
        async with contextlib.AsyncExitStack() as stack:
            for part in self.parts:
                await stack.enter_async_context(lifetime(part.reward))
            self._lifetimes = stack.pop_all()

    async def __aexit__(self, *error: object) -> None:
        await self._lifetimes.aclose()

    async def score_group(self, prompt: Prompt, responses: Sequence[Rollout]) -> list[RewardResult]:
        """All parts at a time."""
        scorings = [
            asyncio.create_task(results_of(part.reward, [responses], limit))
            for part, limit in zip(self.parts, self._slots, strict=True)
        ]
        try:
            found = await asyncio.gather(*scorings)
        finally:
            for scoring in scorings:
                scoring.cancel()
        by_part = [results for (results,) in found]
        return [self._sum([results[i] for results in by_part]) for i in range(len(responses))]

    def close(self) -> None:
        """Closes the parts."""
        for part in self.parts:
            part.reward.close()

    def _sum(self, results: Sequence[Result]) -> RewardResult:
        components: dict[str, float] = {}
        terms: list[Any] = []
        for part, result in zip(self.parts, results, strict=True):
            if result.ungraded:
                if part.weight:
                    return Ungraded(f"{part.name}: {result.ungraded}")
                continue
            value = result.reward.values if isinstance(result.reward, TokenRewards) else result.reward
            components[part.name] = float(np.mean(value))
            components |= {f"{part.name}_{name}"[:64]: of_part for name, of_part in result.components.items()}
            terms.append(part.weight * value if part.weight else 0.0)
        total = _sum(terms)
        if np.ndim(total):
            return Score(TokenRewards(np.asarray(total)), components)
        stopped = any(isinstance(result.reward, Stopped) for result in results)
        return Score(Stopped(total) if stopped else float(total), components)


def read_parts(parts: object) -> list[PartSettings]:
    """The parts as they are configured. Raises ConfigError."""
    if not isinstance(parts, list) or not 1 <= len(parts) <= MOST_PARTS:
        raise ConfigError(f"reward.options.parts is a list of 1 to {MOST_PARTS} tables with function and weight")
    found = []
    for number, part in enumerate(parts, start=1):
        try:
            found.append(PartSettings.model_validate(part))
        except ValidationError as error:
            first = error.errors()[0]
            where = ".".join(map(str, first["loc"]))
            raise ConfigError(f"reward.options.parts, number {number}: {where}: {first['msg']}") from None
    counts = Counter(settings.component for settings in found)
    if twice := [name for name, count in counts.items() if count > 1]:
        raise ConfigError(f"reward.options.parts has two parts called {twice[0]!r}: give one another name")
    return found


def _sum(terms: Sequence[Any]) -> Any:
    """From left to right, so that parts at the ends of their ranges add up to exactly the ends of the whole."""
    total = terms[0] if terms else 0.0
    for term in terms[1:]:
        total = total + term
    return total
