"""The reference: the product's model in one process, one sequence a micro-batch, under naive float64 formulas."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import save_file

from megatron_gspo.errors import BatchError
from megatron_gspo.parity import shards
from megatron_gspo.parity.case import Case, Key, set_apart, straddling_old
from megatron_gspo.parity.layouts import Layout
from megatron_gspo.parity.naive import naive_term
from megatron_gspo.parity.step import GRADIENTS, PARAMETERS, Part, build, note, old_pass, replayed
from megatron_gspo.policy.policy import Policy
from megatron_gspo.types import PackedBatch

ONE_PROCESS = Layout("one process")


@dataclass
class Reference:
    """What every layout is compared with, besides the files of gradients and parameters."""

    case: Case
    """With old logprobs set, and responses with a near-tie set apart."""
    logprobs: np.ndarray
    """[tokens of all samples] float64; NaN where a token predicts no response token. By token number, like the rest."""
    entropy: np.ndarray
    clipped: np.ndarray
    """Bool."""
    routes: dict[int, np.ndarray]
    """Layer -> [tokens, K] experts."""
    margins: dict[int, np.ndarray]
    """Layer -> [tokens]."""
    sequences: dict[Key, tuple[float, float]]
    """(log s_i, its part of the loss)."""
    loss: float
    norm: float = 0.0
    gradient_scale: float = 0.0
    """Largest entry of any gradient."""
    parameter_scale: float = 0.0
    names: set[str] = field(default_factory=set)
    """Of gradients."""
    weights: set[str] = field(default_factory=set)
    """Of parameters, and of what is no parameter but part of the model: routers' expert biases."""
    idle: list[str] = field(default_factory=list)
    """Tensors without a gradient: experts that got no token."""
    apart: list[Key] = field(default_factory=list)


def reference_step(case: Case, directory: str) -> Reference:
    """Runs the reference on this one rank, and writes its gradients and parameters into ``directory``.

    Raises BatchError when the mini-batch could not tell right from wrong.
    """
    policy, groups = build(case, ONE_PROCESS)
    batches = [shards.pack(case, [index], groups) for index in range(len(case.samples))]
    part = Part(0, 0, 0)
    old_pass(case, policy, batches, part)
    total = int(case.starts[-1])
    scatter = _scatter(total, np.concatenate(part.old_pass.numbers))
    logprobs = scatter(np.concatenate(part.old_pass.logprobs), np.nan)
    routes = {layer: _scatter(total, numbers)(experts, -1) for layer, (numbers, experts) in part.routes.items()}
    margins = {layer: _scatter(total, part.routes[layer][0])(m, np.inf) for layer, m in part.margins.items()}
    apart = near_ties(case, margins) if case.precision.sets_apart else []
    case = set_apart(case, apart)
    new = [logprobs[case.predicting(index)] for index in range(len(case.samples))]
    case = replace(case, old=straddling_old(case, new))
    clipped = _train(case, policy, batches, part)
    case = replace(case, alone=longest_alive(case, clipped))
    reference = Reference(
        case=case,
        logprobs=logprobs,
        entropy=scatter(np.concatenate(part.old_pass.entropy), np.nan),
        clipped=clipped,
        routes=routes,
        margins=margins,
        sequences=part.sequences,
        loss=part.loss,
        apart=[key for key, sample in zip(case.keys, case.samples, strict=True) if not sample.weight],
    )
    _write_tensors(policy, Path(directory), reference)
    check_meaning(reference)
    return reference


def reference_without(case: Case, indices: Sequence[int], directory: str) -> Reference:
    """The reference once more, with these samples set apart."""
    Path(directory).mkdir()
    return reference_step(set_apart(case, indices), directory)


def longest_alive(case: Case, clipped: np.ndarray) -> int:
    """The sample that counts, is not clipped, and whose response is longer than its prompt by most."""
    alive = [i for i, s in enumerate(case.samples) if s.weight and not clipped[case.predicting(i)].all()]
    return max(alive, key=lambda i: len(case.samples[i].response_ids) - len(case.samples[i].prompt_ids), default=0)


def near_ties(case: Case, margins: dict[int, np.ndarray]) -> list[int]:
    """The samples with a token whose router nearly chose otherwise, in the layer where it was nearest."""
    closest = np.min(list(margins.values()), axis=0) if margins else np.full(int(case.starts[-1]), np.inf)
    return [
        index
        for index in range(len(case.samples))
        if closest[case.starts[index] : case.starts[index + 1]].min() < case.precision.near_tie
    ]


def check_meaning(reference: Reference) -> None:
    """Raises BatchError when nothing is compared: no response clipped or all, or a gradient that is 0 without cause."""
    case = reference.case
    counted = [i for i, sample in enumerate(case.samples) if sample.weight]
    shares = [reference.clipped[case.predicting(i)].mean() for i in counted]
    if not counted or not any(shares) or all(share == 1 for share in shares):
        raise BatchError(
            f"{len(counted)} responses count, {sum(map(bool, shares))} of them clipped: the mini-batch could not tell "
            f"right from wrong; another --seed gives another one"
        )
    silent = [name for name in reference.idle if ".experts." not in name and not name.endswith(".gate.weight")]
    if silent:
        raise BatchError(f"{len(silent)} gradients are zero without a cause, {silent[0]} first: nothing is compared")


def _train(case: Case, policy: Policy, batches: Sequence[PackedBatch], part: Part) -> np.ndarray:
    """Loss and gradients by the naive formulas; returns [tokens] whether each is on the clipped branch."""
    clipped = np.zeros(int(case.starts[-1]), dtype=bool)

    def objective(index: int, logprobs_T: torch.Tensor, entropy_T: torch.Tensor) -> torch.Tensor:
        sample, own = case.samples[index], case.predicting(index)
        first = own.start - int(case.starts[index])
        new_R = logprobs_T[first : first + len(sample.response_ids)]
        old_R = torch.from_numpy(case.old[index])
        term = naive_term(case.loss, new_R, old_R, case.advantages(index), sample.weight, case.clip, case.clip)
        clipped[own] = term.clipped
        part.sequences[case.keys[index]] = (term.log_ratio, float(term.loss.detach()))
        part.loss += float(term.loss.detach())
        note(case, batches[index], policy.groups, part.training, logprobs_T, entropy_T)
        return term.loss

    with policy.replay.replay(replayed(case, policy, batches)):
        policy.gradients(batches, objective)
    return clipped


def _write_tensors(policy: Policy, directory: Path, reference: Reference) -> None:
    gradients = dict(policy.named_gradients())
    squares = [float(gradient.double().square().sum()) for gradient in gradients.values()]
    reference.norm = math.sqrt(sum(squares))
    reference.names = set(gradients)
    reference.idle = [name for name, square in zip(gradients, squares, strict=True) if square == 0.0]
    reference.gradient_scale = max(float(gradient.abs().max()) for gradient in gradients.values())
    save_file(gradients, directory / GRADIENTS)
    policy.step(0, 1)
    parameters = dict(policy.weights())
    reference.weights = set(parameters)
    reference.parameter_scale = max(float(parameter.abs().max()) for parameter in parameters.values())
    save_file(parameters, directory / PARAMETERS)


def _scatter(total: int, numbers: np.ndarray):  # type: ignore[no-untyped-def]  # of arrays of any dtype
    def place(values: np.ndarray, fill: float) -> np.ndarray:
        whole = np.full((total, *values.shape[1:]), fill, dtype=values.dtype)
        whole[numbers] = values
        return whole

    return place
