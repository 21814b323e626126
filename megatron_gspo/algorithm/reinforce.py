"""REINFORCE with other baselines than a critic's: REINFORCE++ (arXiv 2501.03262) and RLOO (arXiv 2402.14740)."""

from __future__ import annotations

from typing import ClassVar, Literal

from megatron_gspo.algorithm.base import Credit
from megatron_gspo.algorithm.clipped import Below
from megatron_gspo.algorithm.ppo import ClippedTokens
from megatron_gspo.section import PositiveFloat


class ReinforcePlusPlus(ClippedTokens):
    """PPO's clipped objective; rewards are whitened over all tokens of the outer step."""

    source: ClassVar = "arXiv 2501.03262"

    name: Literal["reinforce++"] = "reinforce++"
    credit: Credit = "batch"
    clip_low: Below = 0.2
    clip_high: PositiveFloat = 0.2


class ReinforcePlusPlusBaseline(ReinforcePlusPlus):
    """REINFORCE++ after the group's mean has been taken off each reward."""

    name: Literal["reinforce++-baseline"] = "reinforce++-baseline"  # type: ignore[assignment]
    credit: Credit = "group-then-batch"


class Rloo(ClippedTokens):
    """REINFORCE leave-one-out: A_i = R_i minus the mean of the group's other rewards.

    The paper takes one step per batch, where the ratio is 1; with several mini-batches the ratio is clipped as PPO's.
    """

    source: ClassVar = "arXiv 2402.14740, section 2.2"

    name: Literal["rloo"] = "rloo"
    credit: Credit = "leave-one-out"
    clip_low: Below = 0.2
    clip_high: PositiveFloat = 0.2
