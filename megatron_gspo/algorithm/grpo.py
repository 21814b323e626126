"""Group Relative Policy Optimization, arXiv 2402.03300, as arXiv 2507.18071 eq. 2 states it."""

from __future__ import annotations

from typing import ClassVar, Literal

from megatron_gspo.algorithm.clipped import Below
from megatron_gspo.algorithm.ppo import ClippedTokens
from megatron_gspo.section import PositiveFloat


class Grpo(ClippedTokens):
    """PPO's clipped objective with group-relative advantages in place of a critic's."""

    source: ClassVar = "arXiv 2507.18071, eq. 2 and section 5.1"

    name: Literal["grpo"] = "grpo"
    clip_low: Below = 0.2
    clip_high: PositiveFloat = 0.27
