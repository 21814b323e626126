"""Supervised fine-tuning on the same policy, packing and step: the cold start of a reinforcement-learning run."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from megatron_gspo.batching.packing import shard_tokens
from megatron_gspo.config import RunConfig
from megatron_gspo.data.formats import Paths
from megatron_gspo.data.prompts import Completion, CompletionSet, load_completions
from megatron_gspo.data.tokenizer import open_tokenizer
from megatron_gspo.errors import NonFiniteError
from megatron_gspo.megatron.groups import Groups
from megatron_gspo.megatron.policy import Policy
from megatron_gspo.parallel.exchange import agree, broadcast_object, gather_objects
from megatron_gspo.parallel.sequence import ShardedSequenceSum
from megatron_gspo.train.batch import Minibatch, check_tokens, place
from megatron_gspo.train.clock import Clock
from megatron_gspo.train.draw import skip_notes, take_usable
from megatron_gspo.train.inputs import describe_looked
from megatron_gspo.train.models import check_models
from megatron_gspo.train.nonfinite import Guard, non_finite_error
from megatron_gspo.train.profile import Profiles
from megatron_gspo.train.progress import NON_FINITE, Progress, seed_generators
from megatron_gspo.types import Sample, StepReport


@dataclass(frozen=True)
class Examples:
    """What supervised fine-tuning reads besides weights."""

    loaded: CompletionSet

    @property
    def completions(self) -> Sequence[Completion]:
        """In the order of the file."""
        return self.loaded.completions

    def describe(self) -> str:
        """One line."""
        return f"{len(self.loaded)} examples{describe_looked(self.loaded)}"

    def fingerprints(self) -> dict[str, str]:
        """Setting -> fingerprint of what was read through it. Reads a long file once more."""
        return {"data.path": self.loaded.looked.fingerprint()}


def load_examples(config: RunConfig) -> Examples:
    """Reads prompts and completions, before anything is started or written. Raises UserError."""
    check_models(config)
    loaded = load_completions(
        config.data.path,
        tokenizer=open_tokenizer(config),
        format=config.data.format,
        fields=Paths.named_by(config.data),
        chat_template=config.data.chat_template,
        max_prompt_tokens=config.rollout.max_prompt_tokens,
        max_response_tokens=config.rollout.max_response_tokens,
        skip_bad=config.data.skip_bad,
        limit=config.data.limit,
    )
    return Examples(loaded)


def fine_tune(
    config: RunConfig,
    groups: Groups,
    policy: Policy,
    examples: Examples,
    progress: Progress,
    note: Callable[[str], None] = lambda text: None,
) -> Iterator[StepReport]:
    """Takes optimizer steps of ``train.prompts_per_step`` examples up to ``train.outer_steps``. Collective.

    Yields a report after each, with ``progress`` at its end; ``note`` hears of examples that were skipped. The loss
    is the mean negative log-likelihood over the mini-batch's completion tokens.
    """
    count, skip_bad = config.train.prompts_per_step, config.data.skip_bad
    mine = range(groups.data_rank, count, groups.data_size)
    profiles = Profiles(config, groups)
    for step in range(progress.outer_steps, config.train.outer_steps):
        clock = Clock()
        seed_generators(config.train.seed, step)
        make = examples.completions.__getitem__
        drawn = take_usable(progress.cursor, count, make, groups.world, mine=mine, skip_bad=skip_bad)
        for line in skip_notes(step, drawn.skipped):
            note(line)
        samples = [as_sample(group, drawn.items[group]) for group in mine]
        check_tokens(samples, policy.shape.vocab_size, groups)
        (minibatch,) = place(samples, config, groups)
        guard = Guard(config.train, policy, _ids(drawn.items), note, f"step {step + 1}")
        metrics = {NON_FINITE: 1.0}
        with profiles.step(step), clock("train"), guard(minibatch.batches):
            metrics = supervised_step(config, groups, policy, minibatch, step) | {NON_FINITE: 0.0}
        if skip_bad:
            metrics["data/skipped"] = float(len(drawn.skipped))
        progress.outer_steps = progress.optimizer_steps = step + 1
        report = StepReport(step, step, 0, metrics | clock.metrics(minibatch.tokens))
        progress.count_non_finite([report])
        yield report


def _ids(examples: Mapping[int, Completion]) -> dict[int, str]:
    return {place: example.prompt.id for place, example in examples.items()}


def as_sample(group: int, example: Completion) -> Sample:
    """A completion in the place of a response; the fields of reinforcement learning are zeros."""
    length = len(example.completion_ids)
    return Sample.of_response(
        np.asarray(example.prompt.token_ids),
        np.asarray(example.completion_ids),
        group=group,
        sample=0,
        rollout_logprobs=np.zeros(length, dtype=np.float32),
        advantage=0.0,
        token_advantages=np.zeros(length),
    )


def supervised_step(
    config: RunConfig, groups: Groups, policy: Policy, minibatch: Minibatch, step: int
) -> dict[str, float]:
    """One optimizer step; returns its metrics on every rank. Collective."""
    sequence_sum = ShardedSequenceSum(groups.token)
    losses: list[torch.Tensor] = []
    error: NonFiniteError | None = None

    def objective(index: int, logprobs_T: torch.Tensor, entropy_T: torch.Tensor) -> torch.Tensor:
        nonlocal error
        shard = shard_tokens(minibatch.batches[index], groups.shard)
        error = error or non_finite_error(logprobs_T, shard, "policy's")
        loss = config.algorithm.loss(shard, logprobs_T, sequence_sum).loss
        losses.append(loss.detach())
        return loss

    policy.gradients(minibatch.batches, objective)
    agree(error, groups.world)  # before the optimizer moves
    total = None
    if groups.is_last_stage:
        total = sum(gather_objects(sum(loss.item() for loss in losses), groups.data))
    loss = broadcast_object(total, groups.last_stage_rank, groups.pipeline)
    if not math.isfinite(loss):
        raise NonFiniteError(f"loss = {loss}: no step was taken; the weights are as they were")
    grad_norm, lr = policy.step(step, config.total_steps)  # refuses a gradient that is not finite
    return {"loss": loss, "grad_norm": grad_norm, "lr": lr}
