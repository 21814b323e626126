"""Decoupled clip and dynamic sampling policy optimization, arXiv 2503.14476, eq. 8."""

from __future__ import annotations

from typing import ClassVar, Literal

from megatron_gspo.algorithm.base import Aggregation
from megatron_gspo.algorithm.clipped import Below
from megatron_gspo.algorithm.ppo import ClippedTokens
from megatron_gspo.section import PositiveFloat


class Dapo(ClippedTokens):
    """Clipped token ratios with a higher upper bound, every token of a prompt's responses with the same weight.

    The paper averages over the tokens of a prompt's group, and prompts with each other; implementations take the mean
    over all tokens of the mini-batch, which is ``aggregation = "token-mean"``. Its other parts are settings of their
    own: ``rollout.dynamic_sampling``, ``overlong_buffer`` and ``on_truncated``.
    """

    source: ClassVar = "arXiv 2503.14476, eq. 8 and section 4.1"

    name: Literal["dapo"] = "dapo"
    aggregation: Aggregation = "group-token-mean"
    clip_low: Below = 0.2
    clip_high: PositiveFloat = 0.28
