"""Sources of prompts that are mixed."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any, Literal

from pydantic import Field, field_validator

from megatron_gspo.section import Named, Positive, PositiveFloat, Section

if TYPE_CHECKING:
    from megatron_gspo.config.rollouts import RewardConfig

SOURCE_NAME = r"[A-Za-z0-9][A-Za-z0-9_-]{0,39}"


class SourceReward(Section):
    """What a source has instead of ``reward.function`` and ``reward.options``."""

    function: Named
    options: dict[str, Any] = Field(default_factory=dict)


class SourceConfig(Section):
    """A source of training prompts, ``[[data.sources]]``."""

    name: str
    """A word: its metrics are ``source/NAME/*``, and its prompts' ids begin with it."""
    path: Named
    """As ``data.path``."""
    weight: PositiveFloat = 1.0
    """Its share of the prompts that are drawn, relative to the others'."""
    format: Literal["", "auto", "prompts", "gsm8k", "verl", "messages", "sharegpt", "alpaca"] = ""
    """As ``data.format``, which it has when empty; likewise the fields."""
    prompt_field: str = ""
    answer_field: str = ""
    limit: Positive | None = None
    """Reads at most this many of its prompts."""
    reward: SourceReward | None = None
    """``reward = { function = "math" }``: its own reward; absent: ``[reward]``."""

    @field_validator("name")
    @classmethod
    def _is_word(cls, name: str) -> str:
        if not re.fullmatch(SOURCE_NAME, name):
            raise ValueError(f"{name!r} is no word of letters, digits, - and _ (at most 40)")
        return name

    def reward_config(self, default: RewardConfig) -> RewardConfig:
        """Its reward; all but function and options is the default's."""
        own = self.reward
        return default if own is None else default.model_copy(update={"function": own.function, "options": own.options})
