"""One outer step of a layout, seen from one rank: what a run computes from placed samples to the second update.

Everything between the responses and the weights is what ``train.step`` runs. Only old logprobs are replaced: a run's
would put every ratio of the first mini-batch at exactly 1.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path

import numpy as np
import torch

from megatron_gspo.errors import NonFiniteError
from megatron_gspo.megatron.groups import make_groups
from megatron_gspo.megatron.policy import Policy
from megatron_gspo.megatron.recorded_routes import record_routes
from megatron_gspo.parity import shards
from megatron_gspo.parity.case import STEPS, Case
from megatron_gspo.parity.critic import critic_step
from megatron_gspo.parity.layouts import Layout
from megatron_gspo.parity.objectives import every_objective
from megatron_gspo.parity.parts import Choices, Part, StepPart, note, recorded
from megatron_gspo.parity.tensors import GRADIENTS, PARAMETERS, compare, gradient_copies, parameter_copies
from megatron_gspo.train import step as training
from megatron_gspo.train.batch import Minibatch, place
from megatron_gspo.train.learner import Learner, build_learner
from megatron_gspo.train.routing import open_routing
from megatron_gspo.train.settle import settle
from megatron_gspo.types import RouteShard, Sample

Fault = Callable[[], AbstractContextManager[object]]
"""Makes a context that each rank enters around its whole step. For tests: the check must be able to fail."""


def layout_step(case: Case, layout: Layout, references: str, fault: Fault | None = None) -> Part:
    """Runs a layout's steps on this rank and compares the tensors that it holds with the files in ``references``.

    Raises LayoutError where the layout is refused.
    """
    with (fault or nullcontext)():
        learner = build(case, layout)
        groups = learner.groups
        part = Part(groups.pipeline.rank(), groups.token.rank(), groups.data_rank)
        samples = shards.routed_samples(case, learner.policy.shape.routes)
        mine = samples[groups.data_rank :: groups.data_size] if groups.is_leader else []
        minibatches = place(mine, learner.config, groups)
        minibatches = old_pass(case, learner, mine, minibatches, part)
        if case.compares_everything:
            part.critic = critic_step(case, learner, minibatches, Path(references))
        for number, minibatch in enumerate(minibatches):
            part.steps.append(train(case, learner, minibatch, number, Path(references)))
            if part.steps[-1].metrics is None:
                break
    return part


def build(case: Case, layout: Layout) -> Learner:
    """The layout's models on this rank. Raises LayoutError where we or Megatron refuse it."""
    settings = case.run_config(layout)
    learner = build_learner(settings, make_groups(settings.parallel))
    if isinstance(learner.reference, Policy):  # and not the policy without its adapters, which differs from it
        disturb(learner.reference)
    return learner


@torch.no_grad()
def disturb(reference: Policy) -> None:
    """Makes another policy of a reference that has the policy's weights: its final norm is scaled, entry by entry."""
    for own, named in (rule for chunk in reference.chunks for rule in chunk.rules(reference.family)):
        if named.hf_names == ("model.norm.weight",):
            parameter = own.data
            places = torch.arange(len(parameter), dtype=torch.float64, device=parameter.device)
            parameter.mul_((1 + 0.2 * torch.cos(places)).to(parameter.dtype))


def old_pass(
    case: Case, learner: Learner, mine: Sequence[Sample], minibatches: list[Minibatch], part: Part
) -> list[Minibatch]:
    """The forward passes of pi_old and the reference, with the routers' choices; returns what training takes."""
    routing = open_routing(learner, mine, minibatches, 0)
    with record_routes(learner.policy.chunks) as routers:
        minibatches = training.pi_old_pass(learner, minibatches, routing)
    batches = [batch for minibatch in minibatches for batch in minibatch.batches]
    routers = [choices[: len(batches)] for choices in routers]  # a reference may be the same model, without adapters
    part.choices = recorded(routers, [shards.own_numbers(case, batch, learner.groups) for batch in batches])
    prepared = []
    for minibatch in minibatches:
        own = []
        for batch, shard in zip(minibatch.batches, minibatch.shards, strict=bool(minibatch.shards)):
            note(case, batch, learner.groups, part.old_pass, shard.old_logprobs_T)
            note(case, batch, learner.groups, part.ref_pass, shard.ref_logprobs_T)
            own.append(shards.with_old_logprobs(case, batch, shard, learner.groups))
        prepared.append(minibatch.with_shards(own))
    return prepared


def train(case: Case, learner: Learner, minibatch: Minibatch, number: int, references: Path) -> StepPart:
    """An optimizer step; its tensors are compared between the gradients and the step, and after it."""
    step = StepPart()
    minibatch = settle(learner, minibatch).minibatch
    minibatch, sums, live = training.minibatch_gradients(learner, minibatch)
    of_each = zip(minibatch.batches, minibatch.trained, strict=bool(minibatch.trained))
    for batch, (logprobs_T, entropy_T, output) in of_each:
        note(case, batch, learner.groups, step.training, logprobs_T, entropy_T, output)
        step.loss += float(output.loss.detach())
        rows = zip(output.log_ratio_S.tolist(), output.loss_S.tolist(), strict=True)
        step.sequences.update(zip(batch.samples, rows, strict=True))
    step.sequences.pop((-1, -1), None)  # dummies
    if case.compares_everything:
        step.objectives = every_objective(case, learner, minibatch, number)
    if minibatch.routes.replayed is None:
        step.choices = chosen(live, [shards.own_numbers(case, batch, learner.groups) for batch in minibatch.batches])
    step.gradients = gradient_copies(learner.policy, references / GRADIENTS.format(step=number))
    try:
        step.metrics = training.take_step(learner, sums, STEPS[number])
    except NonFiniteError:  # raised on every rank; the columns say where it comes from
        return step
    parameters = references / PARAMETERS.format(step=number)
    step.parameters = parameter_copies(learner.policy, parameters)
    step.sent = compare(learner.policy.weights(copies=False), parameters)
    return step


def chosen(live: Sequence[RouteShard], numbers: Sequence[np.ndarray]) -> Choices:
    """The live choices of a pass by token number, as ``parts.recorded`` has them; without margins."""
    found = Choices()
    for place_of, layer in enumerate(live[0].layers if live else ()):
        experts_TK = np.concatenate([shard.experts_LTK[place_of].cpu().numpy().astype(np.int64) for shard in live])
        all_numbers = np.concatenate(numbers)
        real = all_numbers >= 0
        found.experts[layer] = (all_numbers[real], np.sort(experts_TK[real], axis=1))
    return found
