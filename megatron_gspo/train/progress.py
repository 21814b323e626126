"""How far a run is: what a checkpoint keeps beside the policy, so that nothing else depends on the past.

Random draws do not: at the start of every outer step Python's, numpy's and torch's generators are set to a function of
(seed, outer step), the same on every rank, and rollouts have seeds of their own. So no generator's state is saved, and
a checkpoint resumes at any layout. What draws from them during a step (a reward in one event loop) repeats; what does
so from several threads at once never did.
"""

from __future__ import annotations

import random
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from megatron_gspo.data.cursor import PromptOrder
from megatron_gspo.data.fingerprint import fingerprint
from megatron_gspo.errors import DataError
from megatron_gspo.types import StepReport

__all__ = ["Progress", "fingerprint", "seed_generators"]

ORDERED_BY = {"data.path", "data.sources", "data.shuffle", "train.seed"}
"""Settings that the order of the prompts is a function of."""
SKIPPED = "step/skipped"
"""Metric: whether an outer step had nothing to train on, and took no optimizer step."""
NON_FINITE = "step/non_finite"
"""Metric: whether an optimizer step was not taken, since something was not finite."""


@dataclass
class Progress:
    """Where a run stands between two outer steps, the same on every rank."""

    cursor: PromptOrder
    """Which prompts come next."""
    outer_steps: int = 0
    """Outer steps done; the weights' version is the same number."""
    optimizer_steps: int = 0
    """Optimizer steps done; the learning rate's schedule is a function of it."""
    empty_steps: int = 0
    """Outer steps in a row, up to now, that had nothing to train on."""

    non_finite_steps: int = 0
    """Outer steps in a row, up to now, of which something was not finite."""

    def advance(self, reports: Sequence[StepReport]) -> None:
        """Counts one outer step, by its reports."""
        skipped = any(report.metrics.get(SKIPPED) for report in reports)
        self.outer_steps += 1
        self.optimizer_steps += 0 if skipped else len(reports)
        self.empty_steps = self.empty_steps + 1 if skipped else 0
        self.count_non_finite(reports)

    def count_non_finite(self, reports: Sequence[StepReport]) -> None:
        """Counts an outer step in which an optimizer step was not taken; one in which all were begins anew."""
        struck = any(report.metrics.get(NON_FINITE) for report in reports)
        self.non_finite_steps = self.non_finite_steps + 1 if struck else 0

    def state_dict(self) -> dict[str, Any]:
        """As JSON: what a checkpoint keeps."""
        return {
            "outer_step": self.outer_steps,
            "optimizer_step": self.optimizer_steps,
            "weight_version": self.outer_steps,
            "empty_steps": self.empty_steps,
            "non_finite_steps": self.non_finite_steps,
            "cursor": dict(self.cursor.state_dict()),
        }

    def load_state_dict(self, state: dict[str, Any], accepted: Collection[str] = ()) -> None:
        """Continues where ``state`` was taken.

        Where the user ``accepted`` that the prompts, their seed or their shuffling are others, a new order begins at
        its start. Raises DataError when they are others and nobody did, and for a state that nobody has written so.
        """
        try:
            self._load(state, accepted)
        except DataError:
            raise
        except (KeyError, TypeError, ValueError, AttributeError, IndexError) as error:
            raise DataError(
                f"where the checkpoint's run stood cannot be read ({type(error).__name__}: {error}): it was changed, "
                f"or another version wrote it; continue from another checkpoint"
            ) from error

    def _load(self, state: dict[str, Any], accepted: Collection[str]) -> None:
        same = all(state["cursor"].get(name) == value for name, value in self.cursor.order().items())
        same = same and ("sources" in state["cursor"]) == ("sources" in self.cursor.order())
        if same or not ORDERED_BY & set(accepted):
            self.cursor.load_state_dict(state["cursor"])
        self.outer_steps, self.optimizer_steps = state["outer_step"], state["optimizer_step"]
        self.empty_steps, self.non_finite_steps = state.get("empty_steps", 0), state.get("non_finite_steps", 0)


def seed_generators(seed: int, outer_step: int) -> None:
    """Sets every global generator for one outer step."""
    drawn = int(np.random.SeedSequence([seed, outer_step]).generate_state(1)[0])
    random.seed(drawn)
    np.random.seed(drawn)
    torch.manual_seed(drawn)
