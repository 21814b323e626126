"""The reference: the product's model in one process, one sequence a micro-batch; all else is naive and in float64."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import save_file

from megatron_gspo.errors import BatchError
from megatron_gspo.hf.lora import PEFT_PREFIX
from megatron_gspo.megatron.lora import fill_adapters
from megatron_gspo.megatron.model import load_weights
from megatron_gspo.megatron.policy import BasePolicy, Policy
from megatron_gspo.megatron.recorded_routes import record_routes
from megatron_gspo.parity import shards
from megatron_gspo.parity.case import (
    BETAS,
    KL_COEF,
    STEPS,
    TOTAL_STEPS,
    WARMUP_STEPS,
    WEIGHT_DECAY,
    Case,
    Key,
    straddling_old,
)
from megatron_gspo.parity.critic import CriticReference, critic_reference
from megatron_gspo.parity.layouts import Layout
from megatron_gspo.parity.naive import NaiveTerm, naive_term, naive_weights
from megatron_gspo.parity.naive_adamw import NaiveAdamW, gradient_norm, naive_lr
from megatron_gspo.parity.naive_metrics import Measured, Metric, naive_metrics
from megatron_gspo.parity.objectives import Expected, naive_choice, naive_objectives, response_of
from megatron_gspo.parity.parts import Choices, recorded
from megatron_gspo.parity.step import build
from megatron_gspo.parity.tensors import GRADIENTS, PARAMETERS
from megatron_gspo.train.learner import Learner
from megatron_gspo.types import RouteShard

ONE_PROCESS = Layout("one process")
CLIPPED_TO = 0.25
"""``clip_grad`` over the norm of the first gradient: both steps are clipped."""


@dataclass
class Routing:
    """Every router's choices in a pass, over all tokens by number."""

    experts: dict[int, np.ndarray] = field(default_factory=dict)
    """Layer -> [tokens, K]; -1 where the pass did not come by."""
    margins: dict[int, np.ndarray] = field(default_factory=dict)
    """Layer -> [tokens]."""


@dataclass
class StepReference:
    """One optimizer step, besides the files of gradients and parameters. Arrays are by token number, [tokens]."""

    logprobs: np.ndarray
    """Float64; NaN where a token predicts no response token of this mini-batch, like the entropies."""
    entropy: np.ndarray
    clipped: np.ndarray
    """Bool."""
    routing: Routing
    sequences: dict[Key, tuple[float, float]]
    """(log s_i, its part of the loss)."""
    loss: float
    kl: float = 0.0
    """The part of the KL term in it, without its coefficient."""
    metrics: dict[str, Metric] = field(default_factory=dict)
    norm: float = 0.0
    gradient_scale: float = 0.0
    """Largest entry of any gradient."""
    parameter_scale: float = 0.0
    names: set[str] = field(default_factory=set)
    """Of gradients."""
    weights: set[str] = field(default_factory=set)
    """Of parameters, and of what is no parameter but part of the model: routers' expert biases."""
    trained: set[str] = field(default_factory=set)
    """Of what the step may change: the same, or with adapters theirs."""
    objectives: dict[str, Expected] = field(default_factory=dict)
    """Every loss and correction, where they are compared."""
    idle: list[str] = field(default_factory=list)
    """Tensors without a gradient: experts that got no token."""


@dataclass
class Reference:
    """What every layout is compared with, besides the files."""

    case: Case
    """With old and reference logprobs, and without responses with a near-tie."""
    logprobs: np.ndarray
    """[tokens] float64, of the pi_old pass; NaN where a token predicts no response token, like the next."""
    ref_logprobs: np.ndarray
    routing: Routing
    """Of the pi_old pass."""
    steps: list[StepReference]
    critic: CriticReference | None = None
    """Where it is compared."""

    @property
    def clipped(self) -> np.ndarray:
        """[tokens] bool, of both mini-batches."""
        return np.logical_or.reduce([step.clipped for step in self.steps])


def reference_step(case: Case, directory: str) -> Reference:
    """Runs the reference on this one rank, and writes its gradients and parameters into ``directory``.

    Raises BatchError when the mini-batches could not tell right from wrong.
    """
    learner = build(case, ONE_PROCESS)
    logprobs, routing = _old_pass(case, learner.policy)
    ties = near_ties(case, routing.margins) if case.precision.sets_apart else []
    if ties:  # what is left has numbers of its own
        case = case.without(ties)
        _check_filled(case)
        logprobs, routing = _old_pass(case, learner.policy)
    assert learner.reference is not None
    case = replace(case, ref=_logprobs(case, learner.reference, range(len(case.samples)), live=True))
    writer = _Steps(case, learner, Path(directory))
    steps = [writer.take(number) for number in range(len(case.minibatches))]
    case = writer.case
    reference = Reference(
        case,
        logprobs=shards.scattered(case, logprobs, np.nan),
        ref_logprobs=shards.scattered(case, case.ref, np.nan),
        routing=routing,
        steps=steps,
        critic=critic_reference(case, learner, Path(directory)) if case.compares_everything else None,
    )
    check_meaning(reference)
    return reference


def reference_without(case: Case, indices: Collection[int], directory: str) -> Reference:
    """The reference once more, without these samples."""
    Path(directory).mkdir()
    case = case.without(indices)
    _check_filled(case)
    return reference_step(case, directory)


class _Steps:
    """The policy of the reference while its two optimizer steps are taken."""

    def __init__(self, case: Case, learner: Learner, directory: Path) -> None:
        self.case, self.policy, self.directory = case, learner.policy, directory
        self._adam: NaiveAdamW | None = None

    def take(self, number: int) -> StepReference:
        members = self.case.minibatches[number]
        new = _logprobs(self.case, self.policy, members)
        old = {index: straddling_old(self.case, index, new[index]) for index in members}
        self.case = replace(self.case, old={**self.case.old, **old})
        step = _gradients(self.case, self.policy, members)
        if self.case.compares_everything:
            step.objectives = naive_objectives(self.case, step.logprobs, number)
        gradients = dict(self.policy.named_gradients())
        self._describe(step, gradients)
        save_file(gradients, self.directory / GRADIENTS.format(step=number))
        lr = naive_lr(
            STEPS[number],
            lr=self.case.precision.lr,
            min_lr=self.case.precision.lr / 10,
            warmup=WARMUP_STEPS,
            total=TOTAL_STEPS,
        )
        step.metrics["lr"] = Metric(lr, lr)
        self._update(step, gradients, lr)
        trained, parameters = dict(self.policy.trained_weights()), dict(self.policy.weights())
        step.trained, step.weights = set(trained), set(parameters)
        parameters |= trained
        step.parameter_scale = max(float(parameter.abs().max()) for parameter in parameters.values())
        save_file(parameters, self.directory / PARAMETERS.format(step=number))
        return step

    def _describe(self, step: StepReference, gradients: dict[str, torch.Tensor]) -> None:
        step.norm, step.names = gradient_norm(gradients), set(gradients)
        step.idle = [name for name, gradient in gradients.items() if not gradient.any()]
        step.gradient_scale = max(float(gradient.abs().max()) for gradient in gradients.values())

    def _update(self, step: StepReference, gradients: dict[str, torch.Tensor], lr: float) -> None:
        """AdamW by the naive optimizer, whose weights are then the model's."""
        if self._adam is None:
            clip = float(f"{CLIPPED_TO * step.norm:.2g}")
            count = sum(gradient.numel() for gradient in gradients.values())
            eps = float(f"{self.case.precision.eps * clip / math.sqrt(count):.2g}")
            self.case = replace(self.case, clip_grad=clip, eps=eps)
            weights = {name: weight.double() for name, weight in self.policy.trained_weights()}
            self._adam = NaiveAdamW(weights, BETAS, eps, WEIGHT_DECAY, clip)
        self._adam.step(gradients, lr)
        source = _InMemory(self._adam.weights)
        with torch.no_grad():
            for chunk in self.policy.chunks:
                if self.policy.adapted:
                    fill_adapters(chunk, source, 0)  # type: ignore[arg-type]
                else:
                    load_weights(chunk, self.policy.family, source)  # type: ignore[arg-type]


@dataclass(frozen=True)
class _InMemory:
    """Weights by Hugging Face name under ``HfReader``'s interface."""

    weights: dict[str, torch.Tensor]
    directory: str = "the naive optimizer's weights"

    def read(self, name: str) -> torch.Tensor:
        return self.weights[name.removeprefix(PEFT_PREFIX)]


def near_ties(case: Case, margins: dict[int, np.ndarray]) -> list[int]:
    """The samples with a token whose router nearly chose otherwise, in the layer where it was nearest."""
    closest = np.min(list(margins.values()), axis=0) if margins else np.full(case.tokens, np.inf)
    return [index for index in range(len(case.samples)) if closest[case.own(index)].min() < case.precision.near_tie]


def check_meaning(reference: Reference) -> None:
    """Raises BatchError when nothing is compared: no response clipped or all, no KL, no clipping by the norm, or a
    gradient that is 0 without cause."""
    case = reference.case
    shares = [reference.clipped[case.predicting(index)].mean() for index in range(len(case.samples))]
    if case.algorithm.clips != "nothing" and (not any(shares) or all(share == 1 for share in shares)):
        raise BatchError(
            f"{len(shares)} responses, {sum(map(bool, shares))} of them clipped: the mini-batches could not tell "
            f"right from wrong; another --seed gives others"
        )
    for step in reference.steps:
        silent = [name for name in step.idle if ".experts." not in name and not name.endswith(".gate.weight")]
        if silent:
            raise BatchError(
                f"{len(silent)} gradients are zero without a cause, {silent[0]} first: nothing is compared"
            )
        if not step.kl > 0 or not reference.steps[0].norm > case.clip_grad > 0:
            raise BatchError(
                f"KL {step.kl:g}, gradient norm {step.norm:g} with clip_grad {case.clip_grad:g}: the KL term and "
                f"gradient clipping could not tell right from wrong; another --seed gives other mini-batches"
            )


def _check_filled(case: Case) -> None:
    if not case.samples:
        raise BatchError("every response has a near-tie in a router: another --seed gives others")


def _routes(case: Case, policy: Policy, indices: Sequence[int]) -> list[RouteShard] | None:
    """What routers are made to choose in a pass over these samples, where the case replays any."""
    if not case.replay:
        return None
    return [shards.routes(case, shards.pack_alone(case, index), policy) for index in indices]


def _logprobs(
    case: Case, policy: Policy | BasePolicy, indices: Sequence[int], *, live: bool = False
) -> dict[int, np.ndarray]:
    """Sample -> [R] float64; ``live``: routers choose for themselves, as those of a reference policy always do."""
    batches = [shards.pack_alone(case, index) for index in indices]
    routes = _routes(case, policy, indices) if isinstance(policy, Policy) and not live else None
    with policy.replay.replay(routes):
        results = policy.logprobs(batches)
    return {index: _of_response(case, index, new_T) for index, (new_T, _) in zip(indices, results, strict=True)}


def _of_response(case: Case, index: int, values_T: torch.Tensor) -> np.ndarray:
    own, start = torch.from_numpy(case.predicting(index)), int(case.starts[index])
    return values_T[own - start].detach().double().cpu().numpy()


def _old_pass(case: Case, policy: Policy) -> tuple[dict[int, np.ndarray], Routing]:
    indices = range(len(case.samples))
    with record_routes(policy.chunks) as routers:
        logprobs = _logprobs(case, policy, indices)
    return logprobs, _whole(case, recorded(routers, _numbers(case, indices)))


def _numbers(case: Case, indices: Sequence[int]) -> list[np.ndarray]:
    """Of the tokens of each sample's micro-batch."""
    return [np.arange(case.own(index).start, case.own(index).stop) for index in indices]


def _whole(case: Case, choices: Choices) -> Routing:
    routing = Routing()
    for layer, (numbers, experts) in choices.experts.items():
        routing.experts[layer] = np.full((case.tokens, experts.shape[1]), -1)
        routing.experts[layer][numbers] = experts
        routing.margins[layer] = np.full(case.tokens, np.inf)
        routing.margins[layer][numbers] = choices.margins[layer]
        if case.replay:  # what is replayed has no near-tie
            routing.margins[layer][np.setdiff1d(numbers, case.starts[1:] - 1)] = np.inf
    return routing


def _gradients(case: Case, policy: Policy, members: list[int]) -> StepReference:
    """Loss and gradients of a mini-batch by the naive formulas, and its metrics by theirs."""
    weights, chosen = weights_of(case, members), naive_choice(case, members)
    measured: list[Measured] = []
    logprobs, entropy, clipped, kl = {}, {}, np.zeros(case.tokens, dtype=bool), 0.0
    sequences: dict[Key, tuple[float, float]] = {}

    def objective(position: int, logprobs_T: torch.Tensor, entropy_T: torch.Tensor) -> torch.Tensor:
        nonlocal kl
        index = members[position]
        own, start = case.predicting(index), int(case.starts[index])
        term = term_of(case, index, logprobs_T[torch.from_numpy(own - start)], weights[position], chosen)
        logprobs[index], entropy[index] = (_of_response(case, index, v) for v in (logprobs_T, entropy_T))
        clipped[own], kl = term.clipped, kl + term.kl
        sequences[case.keys[index]] = (term.log_ratio, float(term.loss.detach()))
        measured.append(_measured(case, index, logprobs[index], entropy[index], term))
        return term.loss

    batches = [shards.pack_alone(case, index) for index in members]
    with record_routes(policy.chunks) as routers, policy.replay.replay(_routes(case, policy, members)):
        policy.gradients(batches, objective)
    routing = _whole(case, recorded(routers, _numbers(case, members)))
    own_tokens = np.concatenate(_numbers(case, members))
    loads = {
        layer: np.bincount(experts[own_tokens].ravel(), minlength=policy.shape.num_experts)
        for layer, experts in routing.experts.items()
    }
    return StepReference(
        logprobs=shards.scattered(case, logprobs, np.nan),
        entropy=shards.scattered(case, entropy, np.nan),
        clipped=clipped,
        routing=routing,
        sequences=sequences,
        loss=sum(part for _, part in sequences.values()),
        kl=kl,
        metrics=naive_metrics(measured, loads),
    )


def term_of(case: Case, index: int, new_R: torch.Tensor, weight: float, chosen: Mapping[int, list[bool]]) -> NaiveTerm:
    """A sample's part of the loss by the naive formulas; ``chosen``: ``naive_choice`` of its mini-batch."""
    response = response_of(case, index, list(new_R.double().unbind()), chosen)
    return naive_term(case.loss, response, case.algorithm.model_dump(), weight, KL_COEF)


def weights_of(case: Case, members: Sequence[int]) -> list[float]:
    """The naive weights of a mini-batch's responses."""
    samples = [case.samples[index] for index in members]
    longest = max(sample.length for sample in case.samples) - 1
    return naive_weights(
        [sample.group for sample in samples],
        [sample.num_trained for sample in samples],
        case.algorithm.aggregation,
        longest,
    )


def _measured(case: Case, index: int, new_R: np.ndarray, entropy_R: np.ndarray, term: NaiveTerm) -> Measured:
    return Measured(
        new=new_R,
        old=case.old[index],
        ref=case.ref[index],
        rollout=case.samples[index].rollout_logprobs.astype(np.float64),
        entropy=entropy_R,
        advantages=case.advantages(index),
        low=term.low,
        high=term.high,
        loss=float(term.loss.detach()),
    )
