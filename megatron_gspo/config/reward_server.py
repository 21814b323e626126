"""Servers of a reward model or a judge that a run starts beside its own."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import AfterValidator, Field

from megatron_gspo.config.rollouts import without_keys
from megatron_gspo.section import AsList, Count, Positive, Seconds, Section

JUDGE_NAME = "judge"
"""The model's name in requests to a judge that a run has started."""


class RewardServerConfig(Section):
    """Servers of a reward model or a judge, started with the run (or ``eval``) and ended with it, for the rewards that
    name no ``url``."""

    model: str = ""
    """Hugging Face directory of what they serve. Empty: none is started, and a reward names the address of one."""
    kind: Literal["reward_model", "judge"] = "reward_model"
    """"reward_model": a sequence classifier, for the reward of that name; "judge": a language model, for ``judge`` and
    ``judge_ranking``."""
    count: Positive = 1
    """Servers, each of the whole model; they are asked in turn. On a CPU each computes on one core."""
    tensor: Positive = 1
    """GPUs of each (``--tp-size``): the last ones of this machine, which neither ranks nor rollout servers then get."""
    memory: Annotated[float, Field(gt=0.0, lt=1.0)] = 0.8
    """Of a GPU's memory, what weights and cache take."""
    dtype: Literal["", "float32", "bfloat16", "float16"] = ""
    """What they compute in; when empty, float32 on a CPU and bfloat16 on GPUs."""
    args: Annotated[tuple[str, ...], AsList, AfterValidator(without_keys)] = ()
    """More arguments for each, after those that the launcher chooses, which they overrule."""
    start_s: Seconds = 300.0
    """Seconds that one may take until it is healthy, and that a reward waits for one that is started again."""
    restarts: Count = 10
    """How often, at most, those that have died or answer nothing are started again in one start of a run."""

    @property
    def cards(self) -> int:
        """GPUs of all of them, on a machine that has some; 0 where none is started."""
        return self.count * self.tensor if self.model else 0
