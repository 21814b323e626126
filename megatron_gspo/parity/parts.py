"""What a rank of the check has of a layout's steps."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
import torch

from megatron_gspo.megatron.groups import Groups
from megatron_gspo.megatron.recorded_routes import Routes
from megatron_gspo.parity import shards
from megatron_gspo.parity.case import Case, Key
from megatron_gspo.types import LossOutput, PackedBatch


@dataclass(frozen=True)
class Difference:
    """Of one tensor from the reference's."""

    error: float
    """max |a - b|; infinity for another shape or a NaN."""
    scale: float
    """max |b|."""


@dataclass
class TokenValues:
    """Per-token results by token number; entries of several micro-batches are appended."""

    numbers: list[np.ndarray] = field(default_factory=list)
    """Each [n] int64."""
    logprobs: list[np.ndarray] = field(default_factory=list)
    entropy: list[np.ndarray] = field(default_factory=list)
    """Empty in the passes before training."""
    clipped: list[np.ndarray] = field(default_factory=list)
    """Bool: on the clipped branch; empty in the passes before training."""


@dataclass
class Choices:
    """The routers' choices in a pass."""

    experts: dict[int, tuple[np.ndarray, np.ndarray]] = field(default_factory=dict)
    """Layer -> ([n] token numbers, [n, K] experts, ascending in a row)."""
    margins: dict[int, np.ndarray] = field(default_factory=dict)
    """Layer -> [n] what parts the last chosen expert from the next, in logits; where it was recorded."""


@dataclass
class Values:
    """A number for each token, and for each response."""

    numbers: list[np.ndarray] = field(default_factory=list)
    """Token numbers, an array a micro-batch."""
    of_tokens: list[np.ndarray] = field(default_factory=list)
    """A loss's gradient in their logprobs, or a correction's weights."""
    of_responses: dict[Key, float] = field(default_factory=dict)
    """A loss's parts, whole on every rank; empty of a correction."""


@dataclass
class StepPart:
    """What one rank has of an optimizer step."""

    training: TokenValues = field(default_factory=TokenValues)
    loss: float = 0.0
    """Sum over its micro-batches of what is differentiated; 0 but on the last stage."""
    sequences: dict[Key, tuple[float, float]] = field(default_factory=dict)
    """(log s_i, its part of the loss), whole on every rank of the last stage."""
    choices: Choices = field(default_factory=Choices)
    metrics: dict[str, float] | None = None
    """As a run reports them, ``grad_norm`` and ``lr`` among them; None where no optimizer step was taken."""
    gradients: dict[str, Difference] = field(default_factory=dict)
    """Of this rank's own copy or piece, by Hugging Face name."""
    parameters: dict[str, Difference] | None = None
    """The same after the step."""
    objectives: dict[str, Values] = field(default_factory=dict)
    """Of every loss and correction, where they are compared."""
    sent: dict[str, Difference] = field(default_factory=dict)
    """After the step, of the whole tensors that a weight sync would send from this rank."""


@dataclass
class CriticPart:
    """What a rank has of the critic's step, arrays by micro-batch."""

    numbers: list[np.ndarray] = field(default_factory=list)
    values: list[np.ndarray] = field(default_factory=list)
    advantages: list[np.ndarray] = field(default_factory=list)
    returns: list[np.ndarray] = field(default_factory=list)
    metrics: dict[str, float] = field(default_factory=dict)
    gradients: dict[str, Difference] = field(default_factory=dict)
    not_finite: str = ""
    """What stopped it, on every rank: an advantage or a return that is not finite. There is nothing else then."""


@dataclass
class Part:
    """What one rank has of a layout's outer step."""

    stage: int = 0
    token_rank: int = 0
    data_rank: int = 0
    old_pass: TokenValues = field(default_factory=TokenValues)
    ref_pass: TokenValues = field(default_factory=TokenValues)
    choices: Choices = field(default_factory=Choices)
    """Of the pi_old pass."""
    steps: list[StepPart] = field(default_factory=list)
    critic: CriticPart | None = None
    """Where it is compared."""


def note(
    case: Case,
    batch: PackedBatch,
    groups: Groups,
    into: TokenValues,
    logprobs_T: torch.Tensor,
    entropy_T: torch.Tensor | None = None,
    output: LossOutput | None = None,
) -> None:
    """Appends a micro-batch's values at the tokens that predict response tokens."""
    numbers = shards.own_numbers(case, batch, groups)
    wanted = np.zeros(case.tokens + 1, dtype=bool)
    for index in range(len(case.samples)):
        wanted[case.predicting(index)] = True
    own = wanted[numbers]
    into.numbers.append(numbers[own])
    into.logprobs.append(logprobs_T.detach().double().cpu().numpy()[own])
    if entropy_T is not None:
        into.entropy.append(entropy_T.detach().double().cpu().numpy()[own])
    if output is not None:
        into.clipped.append((output.clipped_low_T | output.clipped_high_T).cpu().numpy()[own])


def recorded(routers: list[list[Routes]], numbers: list[np.ndarray]) -> Choices:
    """Every router's choices in every micro-batch, by token number; padding left out."""
    found = Choices()
    all_numbers = np.concatenate(numbers) if numbers else np.zeros(0, dtype=np.int64)
    real = all_numbers >= 0
    for choices in filter(None, routers):
        layer = choices[0].layer
        found.experts[layer] = (all_numbers[real], np.concatenate([c.experts_TK.numpy() for c in choices])[real])
        found.margins[layer] = np.concatenate([c.margin_T.numpy() for c in choices])[real]
    return found
