"""What a step must agree on with the oracle, and how closely."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from tests.distributed import steps
from tests.distributed.steps import Step

LOGPROBS, GRADIENTS = 1e-12, 1e-12
LOG_RATIO = 1e-9  # a difference of log-probabilities a thousand times its size
NORM = 1e-6  # Megatron keeps norms and clip factors in float32
MOVED = 1e-6  # of the largest move of a tensor


def assert_same_step(step: Step, expected: Step) -> None:
    """Log-probabilities, entropies, s_i, clipping, loss and every gradient; and the norm, when a step was taken."""
    for name, tolerance in (("logprobs", LOGPROBS), ("entropy", LOGPROBS), ("log_ratio", LOG_RATIO)):
        error, where = steps.worst(getattr(step, name), getattr(expected, name))
        assert error < tolerance, f"{name} of response {where} is off by {error:.1e}"
    assert step.clipped == expected.clipped
    assert step.loss == pytest.approx(expected.loss, rel=1e-10)
    error, where = steps.worst(step.gradients, expected.gradients)
    assert error < GRADIENTS, f"the gradient of {where} is off by {error:.1e}"
    if step.grad_norms:
        assert step.grad_norms[0] == pytest.approx(norm_of(expected.gradients.values()), rel=NORM)


def norm_of(gradients: Any) -> float:
    return float(np.sqrt(sum((gradient**2).sum() for gradient in gradients)))
