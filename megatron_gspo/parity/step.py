"""One training step of a layout, seen from one rank: what every rank of the check runs."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from safetensors import safe_open

from megatron_gspo.algorithm.objective import policy_objective, resolve_loss
from megatron_gspo.errors import NonFiniteError
from megatron_gspo.parallel.sequence import ShardedSequenceSum
from megatron_gspo.parity import shards
from megatron_gspo.parity.case import Case, Key, uneven_plan
from megatron_gspo.parity.layouts import Layout
from megatron_gspo.policy.groups import Groups, make_groups
from megatron_gspo.policy.policy import Policy
from megatron_gspo.policy.routes import Routes, record_routes
from megatron_gspo.types import LossOutput, PackedBatch, RouteShard

Fault = Callable[[], AbstractContextManager[object]]
"""Makes a context that each rank enters around its whole step. For tests: the check must be able to fail."""

GRADIENTS, PARAMETERS = "gradients.safetensors", "parameters.safetensors"


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
    clipped: list[np.ndarray] = field(default_factory=list)
    """Bool: on the clipped branch; empty in the pass that has no loss."""


@dataclass
class Part:
    """What one rank has of a layout's step."""

    stage: int
    token_rank: int
    data_rank: int
    norm: float = 0.0
    old_pass: TokenValues = field(default_factory=TokenValues)
    training: TokenValues = field(default_factory=TokenValues)
    loss: float = 0.0
    """Sum over its micro-batches of what is differentiated; 0 but on the last stage."""
    sequences: dict[Key, tuple[float, float]] = field(default_factory=dict)
    """(log s_i, its part of the loss), whole on every rank of the last stage."""
    routes: dict[int, tuple[np.ndarray, np.ndarray]] = field(default_factory=dict)
    """Layer -> ([n] token numbers, [n, K] experts)."""
    margins: dict[int, np.ndarray] = field(default_factory=dict)
    """Layer -> [n] what parts the last chosen expert from the next, in logits."""
    gradients: dict[str, Difference] = field(default_factory=dict)
    """Of the tensors that this rank owns, by Hugging Face name."""
    parameters: dict[str, Difference] | None = None
    """None where no optimizer step was taken."""


def layout_step(case: Case, layout: Layout, references: str, fault: Fault | None = None) -> Part:
    """Runs a layout's step on this rank and compares the tensors that it owns with the files in ``references``.

    Raises LayoutError where the layout is refused.
    """
    with (fault or nullcontext)():
        policy, groups = build(case, layout)
        part = Part(groups.pipeline.rank(), groups.token.rank(), groups.data_rank)
        multiple = policy.config.parallel.microbatch_multiple
        plan = uneven_plan(len(case.samples), groups.data_size, multiple, case.alone)
        batches = [shards.pack(case, indices, groups) for indices in plan[part.data_rank]]
        old_pass(case, policy, batches, part)
        train(case, policy, batches, part)
        part.gradients = compare(policy.named_gradients(), Path(references) / GRADIENTS)
        try:
            part.norm, _ = policy.step(0, 1)
        except NonFiniteError:  # on every rank alike; the columns say where it comes from
            part.norm = math.nan
        part.parameters = compare(policy.weights(), Path(references) / PARAMETERS)
    return part


def build(case: Case, layout: Layout) -> tuple[Policy, Groups]:
    """The layout's policy on this rank. Raises LayoutError where we or Megatron refuse it."""
    settings = case.run_config(layout)
    groups = make_groups(settings.parallel)
    return Policy(settings, groups), groups


def old_pass(case: Case, policy: Policy, batches: list[PackedBatch], part: Part) -> None:
    """The forward pass of pi_old: logprobs, entropies, and the routers' choices."""
    routes = replayed(case, policy, batches)
    with record_routes(policy.chunks) as routers, policy.replay.replay(routes):
        results = policy.logprobs(batches)
    for batch, (logprobs_T, entropy_T) in zip(batches if results else [], results, strict=True):
        note(case, batch, policy.groups, part.old_pass, logprobs_T, entropy_T)
    numbers = [shards.own_numbers(case, batch, policy.groups) for batch in batches]
    for choices in filter(None, routers):
        note_routes(part, choices, numbers)
        if routes is not None:  # what is replayed has no near-tie
            replayed_T = torch.cat([shard.present_T for shard in routes]).cpu().numpy()
            part.margins[choices[0].layer][replayed_T[np.concatenate(numbers) >= 0]] = np.inf


def replayed(case: Case, policy: Policy, batches: Sequence[PackedBatch]) -> list[RouteShard] | None:
    """The routes of a pass over ``batches``, where the case replays any."""
    return [shards.routes(case, batch, policy) for batch in batches] if case.replay else None


def train(case: Case, policy: Policy, batches: list[PackedBatch], part: Part) -> None:
    """Loss and gradients, by the product's own objective."""
    inputs = [shards.with_old_logprobs(case, batch, policy.groups) for batch in batches]
    loss, sequence_sum = resolve_loss(case.loss), ShardedSequenceSum(policy.groups.token)

    def objective(index: int, logprobs_T: torch.Tensor, entropy_T: torch.Tensor) -> torch.Tensor:
        output = policy_objective(
            inputs[index],
            logprobs_T,
            loss=loss,
            clip_low=case.clip,
            clip_high=case.clip,
            kl_loss_coef=0.0,
            sequence_sum=sequence_sum,
        )
        note(case, batches[index], policy.groups, part.training, logprobs_T, entropy_T, output)
        part.loss += float(output.loss.detach())
        rows = zip(output.log_ratio_S.tolist(), output.loss_S.tolist(), strict=True)
        part.sequences.update(zip(batches[index].samples, rows, strict=True))
        return output.loss

    with policy.replay.replay(replayed(case, policy, batches)):
        policy.gradients(batches, objective)
    part.sequences.pop((-1, -1), None)  # dummies


@torch.no_grad()
def compare(tensors: Iterator[tuple[str, torch.Tensor]], reference: Path) -> dict[str, Difference]:
    """Each tensor that this rank owns, against the reference's of its name; names that only one has are errors."""
    found: dict[str, Difference] = {}
    with safe_open(reference, framework="pt", device="cpu") as file:
        known = set(file.keys())
        for name, a in tensors:
            b = file.get_tensor(name) if name in known else torch.empty(0)
            error = (a.double() - b.double()).abs().max() if a.shape == b.shape else torch.tensor(torch.inf)
            scale = float(b.double().abs().max()) if b.numel() else 0.0
            found[name] = Difference(float(error) if error == error else float("inf"), scale)
    return found


def note(
    case: Case,
    batch: PackedBatch,
    groups: Groups,
    into: TokenValues,
    logprobs_T: torch.Tensor,
    entropy_T: torch.Tensor,
    output: LossOutput | None = None,
) -> None:
    """Appends a micro-batch's values at the tokens that predict response tokens."""
    numbers = shards.own_numbers(case, batch, groups)
    wanted = np.zeros(int(case.starts[-1]) + 1, dtype=bool)
    for index in range(len(case.samples)):
        wanted[case.predicting(index)] = True
    own = wanted[numbers]
    into.numbers.append(numbers[own])
    into.logprobs.append(logprobs_T.detach().double().cpu().numpy()[own])
    into.entropy.append(entropy_T.detach().double().cpu().numpy()[own])
    if output is not None:
        into.clipped.append((output.clipped_low_T | output.clipped_high_T).cpu().numpy()[own])


def note_routes(part: Part, choices: list[Routes], numbers: list[np.ndarray]) -> None:
    """One router's choices in every micro-batch, by token number; padding left out."""
    all_numbers = np.concatenate(numbers)
    real = all_numbers >= 0
    layer = choices[0].layer
    part.routes[layer] = (all_numbers[real], np.concatenate([c.experts_TK.numpy() for c in choices])[real])
    part.margins[layer] = np.concatenate([c.margin_T.numpy() for c in choices])[real]
