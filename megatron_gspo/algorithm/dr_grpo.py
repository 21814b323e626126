"""GRPO without its two biases, arXiv 2503.20783 (Dr. GRPO)."""

from __future__ import annotations

from typing import ClassVar, Literal

from megatron_gspo.algorithm.base import Aggregation, Credit
from megatron_gspo.algorithm.clipped import Below
from megatron_gspo.algorithm.ppo import ClippedTokens
from megatron_gspo.section import PositiveFloat


class DrGrpo(ClippedTokens):
    """Clipped token ratios; A_i = R_i - mean R, and tokens are summed and divided by a constant, not by |y_i|."""

    source: ClassVar = "arXiv 2503.20783, section 3.2"

    name: Literal["dr-grpo"] = "dr-grpo"
    aggregation: Aggregation = "token-sum"
    credit: Credit = "centred"
    clip_low: Below = 0.2
    clip_high: PositiveFloat = 0.2
