"""How far a run is: what a checkpoint keeps beside the policy, so that nothing else depends on the past.

Random draws do not: at the start of every outer step Python's, numpy's and torch's generators are set to a function of
(seed, outer step), the same on every rank, and rollouts have seeds of their own. So no generator's state is saved, and
a checkpoint resumes at any layout. What draws from them during a step (a reward in one event loop) repeats; what does
so from several threads at once never did.
"""

from __future__ import annotations

import random
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from megatron_gspo.data.cursor import PromptCursor
from megatron_gspo.data.fingerprint import fingerprint

__all__ = ["Progress", "fingerprint", "seed_generators"]


@dataclass
class Progress:
    """Where a run stands between two outer steps, alike on every rank."""

    cursor: PromptCursor
    """Which prompts come next."""
    outer_steps: int = 0
    """Outer steps done; the weights' version is the same number."""
    optimizer_steps: int = 0
    """Optimizer steps done; the learning rate's schedule is a function of it."""

    def state_dict(self) -> dict[str, Any]:
        return {
            "outer_step": self.outer_steps,
            "optimizer_step": self.optimizer_steps,
            "weight_version": self.outer_steps,
            "cursor": dict(self.cursor.state_dict()),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continues where ``state`` was taken. Raises DataError when the prompts or the seed are not the same."""
        self.cursor.load_state_dict(state["cursor"])
        self.outer_steps, self.optimizer_steps = state["outer_step"], state["optimizer_step"]


def seed_generators(seed: int, outer_step: int) -> None:
    """Sets every global generator for one outer step."""
    drawn = int(np.random.SeedSequence([seed, outer_step]).generate_state(1)[0])
    random.seed(drawn)
    np.random.seed(drawn)
    torch.manual_seed(drawn)
