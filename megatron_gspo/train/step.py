"""One outer step, in the order in which data flows.

prompts -> rollout -> rewards -> packed batch -> logprobs, values -> advantages -> sequence ratios -> loss
        -> optimizer step -> weight sync -> report
"""

from __future__ import annotations

import functools
import operator
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from itertools import islice

import torch

from megatron_gspo.algorithm.metrics import MetricSums, finish, minibatch_sums
from megatron_gspo.algorithm.objective import objective
from megatron_gspo.batching.packing import shard_tokens
from megatron_gspo.errors import NonFiniteError, RolloutError
from megatron_gspo.megatron.groups import device
from megatron_gspo.parallel.exchange import agree, broadcast_object
from megatron_gspo.parallel.sums import heaviest_expert, reduce_metric_sums
from megatron_gspo.train.assembly import Run
from megatron_gspo.train.batch import Minibatch, check_tokens, place
from megatron_gspo.train.clock import Clock
from megatron_gspo.train.collect import collect, summarise
from megatron_gspo.train.credit import give_credit
from megatron_gspo.train.learner import Learner
from megatron_gspo.train.noise import measure_noise
from megatron_gspo.train.nonfinite import Guard, non_finite_error
from megatron_gspo.train.passes import Made, find_pass, needs_old_pass
from megatron_gspo.train.progress import NON_FINITE, SKIPPED
from megatron_gspo.train.reading import read_samples
from megatron_gspo.train.routing import Routing, open_routing, routing_metrics
from megatron_gspo.train.settle import settle
from megatron_gspo.train.values import train_critic
from megatron_gspo.types import (
    RolloutRecord,
    RouteShard,
    StepReport,
    TokenShard,
    Trained,
)


def outer_step(run: Run, number: int, *, first_step: int) -> tuple[list[StepReport], list[RolloutRecord]]:
    """Runs one outer step; returns the report of each optimizer step and the responses kept for reading. Collective.

    A step without a group of two responses is skipped where ``rollout.on_empty_step`` says so: it has one report, with
    ``step/skipped``, and no optimizer step.

    Args:
        run: the run.
        number: outer steps before this one; also the weight version that the servers are at.
        first_step: optimizer steps before this one.
    """
    clock = Clock(run.entering)
    collected, drawn = collect(run, number, clock)
    summary = summarise(run, collected) | drawn
    check_tokens(collected.samples, run.policy.shape.vocab_size, run.groups)
    minibatches = place(collected.samples, run.config, run.groups)
    if not minibatches:
        return [skip_step(run, number, first_step, summary, clock)], []
    with clock("sync"):
        run.learn()
    prompts = {place: group.prompt.id for place, group in collected.groups.items()}
    guard = Guard(run.config.train, run.policy, prompts, run.notes.append, f"outer step {number + 1}")
    prepared: list[Minibatch] | None = None
    has_old = needs_old_pass(run, number)
    with clock("logprobs"), guard([batch for minibatch in minibatches for batch in minibatch.batches]):
        routing = open_routing(run, collected.samples, minibatches, number)
        credited = give_credit(run, pi_old_pass(run, minibatches, routing, evaluates=has_old))
        prepared, summary = credited.minibatches, summary | credited.metrics
        summary |= routing.mismatch(run, prepared) | measure_noise(run, prepared[0], number)
    if prepared is None or guard.struck:
        reports = [not_taken(first_step + i, number, i, summary) for i in range(len(minibatches))]
        done: list[Minibatch] = []
    else:
        if has_old:
            hold_against_engine(run, number, prepared)
        with clock("train"):
            reports, done = train_minibatches(run, prepared, number, first_step, summary, guard, has_old=has_old)
    with clock("sync"):
        run.push(number + 1)
    reports[-1].metrics |= clock.metrics(sum(minibatch.tokens for minibatch in minibatches))
    return reports, read_samples(run, done, collected.groups, collected.samples) if done else []


def train_minibatches(
    run: Run,
    minibatches: Sequence[Minibatch],
    number: int,
    first_step: int,
    summary: Mapping[str, float],
    guard: Guard,
    *,
    has_old: bool,
) -> tuple[list[StepReport], list[Minibatch]]:
    """An optimizer step of each mini-batch; the reports, and the mini-batches with what they gave. Collective.

    One whose numbers are not finite is left out where ``train.on_non_finite`` says so.
    """
    reports, done = [], []
    gate = functools.partial(hold_against_engine, run, number)
    for index, minibatch in enumerate(minibatches):
        step, frozen = first_step + index, number < run.config.critic.pretraining_steps
        with guard(minibatch.batches):
            settled = settle(run, minibatch)
            before_step = None if has_old or index else gate
            trained, metrics, live = train_minibatch(run, settled.minibatch, step, frozen=frozen, check=before_step)
        if guard.struck:
            reports.append(not_taken(step, number, index, summary))
            continue
        metrics |= train_critic(run, settled.minibatch, step)
        metrics |= settled.metrics | routing_metrics(run, trained, live, number)
        reports.append(StepReport(step, number, index, {**summary, SKIPPED: 0.0, NON_FINITE: 0.0} | metrics))
        done.append(trained)
    return reports, done


def not_taken(step: int, number: int, index: int, summary: Mapping[str, float]) -> StepReport:
    """The report of an optimizer step that was not taken, since something was not finite."""
    return StepReport(step, number, index, {**summary, SKIPPED: 0.0, NON_FINITE: 1.0})


def skip_step(run: Run, number: int, first_step: int, summary: Mapping[str, float], clock: Clock) -> StepReport:
    """The report of an outer step without anything to train on; the weights stay, and get the next version. Collective.

    Raises RolloutError unless ``rollout.on_empty_step`` is "skip".
    """
    if run.config.rollout.on_empty_step == "error":
        raise RolloutError(
            f'{empty_text(number, summary)} (rollout.on_empty_step = "skip" would go on with the next prompts)'
        )
    with clock("sync"):
        run.push(number + 1)  # rollouts are held against the outer step's version
    return StepReport(first_step, number, 0, {**summary, SKIPPED: 1.0, **clock.metrics(0)})


def empty_text(number: int, metrics: Mapping[str, float]) -> str:
    """What happened in an outer step that has nothing to train on."""
    return f"outer step {number + 1}: no group has two responses left; dropped: {_kinds(metrics)}"


def _kinds(summary: Mapping[str, float]) -> str:
    """What was dropped, by kind."""
    counts = {name.removeprefix("dropped/"): count for name, count in summary.items() if name.startswith("dropped/")}
    return ", ".join(f"{count:g} {kind.replace('_', ' ')}" for kind, count in counts.items() if count)


def pi_old_pass(
    run: Learner, minibatches: Sequence[Minibatch], routing: Routing, *, evaluates: bool = True
) -> list[Minibatch]:
    """The mini-batches with old logprobs, with what the algorithm's other passes make, and with the routes that
    training replays. Collective.

    A forward pass of its own over exactly the micro-batches that are trained on: the first mini-batch's ratios are
    then exactly 1 because two evaluations agree, and not because one was copied. ``evaluates`` False leaves it out.
    """
    batches = [batch for minibatch in minibatches for batch in minibatch.batches]
    made, live = list[Made](), list[RouteShard]()
    if evaluates:
        with run.policy.replay.replay(routing.of_old_pass()) as live:
            made = [[{TokenShard.old_logprobs_T: old_T} for old_T, _ in run.policy.logprobs(batches)]]
    made += [find_pass(name)(run, batches) for name in run.config.algorithm.passes]
    error, shards = None, []
    for batch, *columns in zip(batches if run.groups.is_last_stage else [], *made, strict=True):
        shard = functools.reduce(operator.or_, columns, shard_tokens(batch, run.groups.shard))
        if evaluates:
            error = error or non_finite_error(shard.old_logprobs_T, shard, "pi_old")
        shards.append(shard)
    agree(error, run.groups.world)
    routes = routing.of_training([len(minibatch.batches) for minibatch in minibatches], live)
    rest = iter(shards)
    return [
        replace(minibatch, shards=tuple(islice(rest, len(minibatch.batches))), routes=own)
        for minibatch, own in zip(minibatches, routes, strict=True)
    ]


def hold_against_engine(run: Run, outer_step: int, minibatches: Sequence[Minibatch]) -> None:
    """Stops the run, or notes a warning, where these logprobs are not the engine's. Collective."""
    run.notes.extend(run.gate.check([each.shards for each in minibatches], run.groups, outer_step))


def train_minibatch(
    run: Learner,
    minibatch: Minibatch,
    step: int,
    *,
    frozen: bool = False,
    check: Callable[[Sequence[Minibatch]], None] | None = None,
) -> tuple[Minibatch, dict[str, float], list[RouteShard]]:
    """One optimizer step; returns the mini-batch with what each micro-batch gave, the metrics, and what this rank's
    routers would have chosen by themselves. ``frozen``: nothing is differentiated, and the weights stay. ``check``
    looks at the mini-batch before they move. Collective."""
    trained, sums, live = minibatch_gradients(run, minibatch, frozen=frozen)
    if check:
        check([trained])
    if frozen:
        return trained, minibatch_metrics(run, sums) | {"grad_norm": 0.0, "lr": 0.0}, live
    return trained, take_step(run, sums, step), live


def minibatch_gradients(
    run: Learner, minibatch: Minibatch, *, frozen: bool = False
) -> tuple[Minibatch, MetricSums, list[RouteShard]]:
    """``train_minibatch`` up to the optimizer, with this rank's part of the metrics' sums. Collective.

    Raises NonFiniteError on every rank when a logprob of a response is not finite.
    """
    algorithm, correction = run.config.algorithm, run.config.correction
    outputs: list[Trained] = []
    shards = list(minibatch.shards)
    sums = MetricSums.zeros(device())
    error: NonFiniteError | None = None

    def loss_of(index: int, new_logprobs_T: torch.Tensor, entropy_T: torch.Tensor) -> torch.Tensor:
        nonlocal sums, error
        shard = shards[index]
        output = objective(algorithm, shard, new_logprobs_T, run.sequence_sum, correction.opsm)
        if correction.bypass and TokenShard.trainer_logprobs_T not in shard:  # to the bit the same in the first one
            shards[index] = shard = shard | {TokenShard.trainer_logprobs_T: new_logprobs_T.detach()}
        error = error or non_finite_error(new_logprobs_T, shard, "pi_theta")
        sums = sums + minibatch_sums(shard, output, entropy_T, new_logprobs_T)
        outputs.append(Trained(new_logprobs_T.detach(), entropy_T.detach(), output))
        return output.loss

    with run.policy.replay.replay(minibatch.routes.replayed) as live:
        (run.policy.evaluate if frozen else run.policy.gradients)(minibatch.batches, loss_of)
    agree(error, run.groups.world)  # before the optimizer moves
    return replace(minibatch, shards=tuple(shards), trained=tuple(outputs)), sums, live


def take_step(run: Learner, sums: MetricSums, step: int) -> dict[str, float]:
    """Moves the weights by the accumulated gradients; returns the mini-batch's metrics on every rank. Collective."""
    grad_norm, lr = run.policy.step(step, run.config.total_steps)
    return minibatch_metrics(run, sums) | {"grad_norm": grad_norm, "lr": lr}


def minibatch_metrics(run: Learner, sums: MetricSums) -> dict[str, float]:
    """The last stage's sums, completed over its ranks, and the routers' load; on every rank. Collective."""
    groups = run.groups
    metrics = None
    if groups.is_last_stage:
        metrics = finish(reduce_metric_sums(sums, stage=groups.tensor_data, data=groups.data))
    metrics = broadcast_object(metrics, groups.last_stage_rank, groups.pipeline)
    if run.policy.shape.num_experts:
        load = run.policy.expert_load.stop().to(device())
        metrics["expert/load_max"] = heaviest_expert(load, stage=groups.tensor_data, pipeline=groups.pipeline)
    return metrics
