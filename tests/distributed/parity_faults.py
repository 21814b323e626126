"""Faults that trainers ship, each a context that every rank of a layout enters; the reference runs without them."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from copy import copy
from dataclasses import replace
from typing import Any
from unittest import mock

import torch

# ------------------------------------------------------------------------------------------- objective and metric sums


def objective_becomes(change: Callable[[Any, Any], Any]) -> Any:
    """Hands the objective of a micro-batch, as a function of the algorithm, and the algorithm to ``change``."""
    from megatron_gspo.train import step

    objective = step.objective

    def changed(algorithm: Any, *args: Any) -> Any:
        return change(lambda other: objective(other, *args), algorithm)

    return mock.patch.object(step, "objective", changed)


@contextmanager
def losses_are_doubled() -> Iterator[None]:
    """A factor that belongs to a layout (of context or data ranks) stays in what is differentiated."""

    def doubled(ask: Any, asked: Any) -> Any:
        output = ask(asked)
        return replace(output, loss=2 * output.loss)

    with objective_becomes(doubled):
        yield


@contextmanager
def the_clip_range_is_wider() -> Iterator[None]:
    with objective_becomes(lambda ask, asked: ask(asked.model_copy(update={"clip_high": 10 * asked.clip_high}))):
        yield


@contextmanager
def a_micro_batch_gives_no_gradient() -> Iterator[None]:
    from megatron_gspo.megatron.policy import Policy

    gradients = Policy.gradients

    def without(self: Any, batches: Any, objective: Any) -> None:
        gradients(self, batches, lambda index, *values: objective(index, *values) * float(index != 1))

    with mock.patch.object(Policy, "gradients", without):
        yield


@contextmanager
def a_run_sums_sequences_over_tensor_ranks_only() -> Iterator[None]:
    """Where a run makes its sums, context ranks are forgotten."""
    from megatron.core import parallel_state

    from megatron_gspo.train import learner

    build = learner.ShardedSequenceSum

    def over_tensor_ranks(group: Any) -> Any:
        return build(parallel_state.get_tensor_model_parallel_group())

    with mock.patch.object(learner, "ShardedSequenceSum", over_tensor_ranks):
        yield


@contextmanager
def the_kl_term_is_counted_by_every_tensor_rank() -> Iterator[None]:
    from megatron.core import parallel_state

    from megatron_gspo.algorithm import objective

    kl_loss = objective.kl_loss

    def counted(*args: Any) -> torch.Tensor:
        return parallel_state.get_tensor_model_parallel_world_size() * kl_loss(*args)

    with mock.patch.object(objective, "kl_loss", counted):
        yield


@contextmanager
def metrics_of_sequences_are_summed_over_tensor_ranks_too() -> Iterator[None]:
    from megatron_gspo.train import step

    reduce = step.reduce_metric_sums
    with mock.patch.object(step, "reduce_metric_sums", lambda sums, stage, data: reduce(sums, stage=stage, data=stage)):
        yield


@contextmanager
def metrics_of_tokens_stay_on_their_data_rank() -> Iterator[None]:
    from megatron_gspo.train import step

    reduce = step.reduce_metric_sums

    def local(sums: Any, stage: Any, data: Any) -> Any:
        return replace(reduce(sums, stage=stage, data=data), token=sums.token)

    with mock.patch.object(step, "reduce_metric_sums", local):
        yield


@contextmanager
def quantiles_are_of_one_data_rank() -> Iterator[None]:
    from megatron_gspo.parallel import sums as metrics

    with mock.patch.object(metrics, "_concatenate", side_effect=lambda values, group: values):
        yield


@contextmanager
def entropy_is_at_temperature_1() -> Iterator[None]:
    from megatron_gspo.megatron.heads import LogprobHead

    head = LogprobHead.__call__

    def other(self: LogprobHead, model: Any, labels: Any, hidden: Any) -> torch.Tensor:
        right, wrong = head(self, model, labels, hidden), head(LogprobHead(1.0), model, labels, hidden)
        return torch.stack([right[0], wrong[1].detach()])

    with mock.patch.object(LogprobHead, "__call__", other):
        yield


# ------------------------------------------------------------------------------------------ placement, masks and passes


@contextmanager
def dropped_responses_still_count_in_their_group() -> Iterator[None]:
    """1/G is that of the configuration, and not of a group's survivors."""
    from megatron_gspo.train import batch

    weights = batch.response_weights

    def of_whole_groups(name: str, lengths: Any, **limit: Any) -> Any:
        return tuple(w * len(w) / 4 for w in weights(name, lengths, **limit))

    with mock.patch.object(batch, "response_weights", of_whole_groups):
        yield


@contextmanager
def masks_are_shifted() -> Iterator[None]:
    """The response's own positions instead of those that predict it."""
    from megatron_gspo.train import batch

    pack = batch.pack

    def shifted(*args: Any, **kwargs: Any) -> Any:
        packed = pack(*args, **kwargs)
        return packed.replace(mask_T=packed.mask_T.roll(1))

    with mock.patch.object(batch, "pack", shifted), mock.patch.object(batch, "check_batch"):
        yield


@contextmanager
def token_slices_begin_one_late() -> Iterator[None]:
    from megatron_gspo.batching import packing

    shard_tokens = packing.shard_tokens

    def late(batch: Any, *place: Any) -> Any:
        fields = ("labels_T", "mask_T", "sequence_T", "rollout_logprobs_T", "advantages_T")
        return shard_tokens(batch.replace(**{name: getattr(batch, name).roll(-1) for name in fields}), *place)

    with mock.patch.object(packing, "shard_tokens", late):
        yield


@contextmanager
def reference_logprobs_come_one_token_late() -> Iterator[None]:
    from megatron_gspo.megatron.policy import Policy

    logprobs = Policy.logprobs

    def late(self: Any, batches: Any) -> Any:
        found = logprobs(self, batches)
        return found if self.optimizer else [(new_T.roll(1), entropy_T) for new_T, entropy_T in found]

    with mock.patch.object(Policy, "logprobs", late):
        yield


def dropping(tensor: str) -> Any:
    """Loads everything but a tensor, which stays zero."""
    from megatron_gspo.megatron import network

    load = network.load_weights

    def drop(model: Any, family: Any, reader: Any) -> None:
        load(model, family, reader)
        for own, named in model.rules(family):
            if tensor in named.hf_names:
                own.data.zero_()

    return mock.patch.object(network, "load_weights", drop)


@contextmanager
def an_expert_is_dropped() -> Iterator[None]:
    """Expert 3 of the last layer gives nothing."""
    with dropping("model.layers.3.mlp.experts.3.down_proj.weight"):
        yield


@contextmanager
def an_early_expert_is_dropped() -> Iterator[None]:
    with dropping("model.layers.1.mlp.experts.3.down_proj.weight"):
        yield


@contextmanager
def a_rank_raises() -> Iterator[None]:
    import torch.distributed as dist

    if dist.get_rank() == 1:
        raise ValueError("rank 1 has had enough")
    yield


# ------------------------------------------------------------------------------------------------ gradients over ranks


@contextmanager
def gradients_are_averaged_over_data_ranks() -> Iterator[None]:
    from megatron_gspo.megatron import optimizer

    ddp = optimizer.DistributedDataParallel

    def build(config: Any, *args: Any, **kwargs: Any) -> Any:
        with mock.patch.object(config, "calculate_per_token_loss", False):
            return ddp(config, *args, **kwargs)

    with mock.patch.object(optimizer, "DistributedDataParallel", build):
        yield


@contextmanager
def expert_gradients_stay_on_their_data_rank() -> Iterator[None]:
    from megatron_gspo.megatron import network

    build = network.wrap_ddp

    def wrap(model: Any, groups: Any, **how: Any) -> Any:
        wrapped = build(model, groups, **how)
        for group in wrapped.expert_parallel_bucket_groups:
            group.start_grad_sync = group.finish_grad_sync = lambda *args, **kwargs: None
        return wrapped

    with mock.patch.object(network, "wrap_ddp", wrap):
        yield


def after_marking(change: Callable[[Any, Any], None]) -> Any:
    """Does something to each parameter and its rule after a model's parameters were marked."""
    from megatron_gspo.megatron import model

    mark = model._mark_parameters

    def other(policy: Any, family: Any) -> None:
        mark(policy, family)
        for own, named in policy.rules(family):
            change(own.parameter, named)

    return mock.patch.object(model, "_mark_parameters", other)


@contextmanager
def input_norms_are_not_all_reduced() -> Iterator[None]:
    """Each tensor rank keeps the part of a replicated norm's gradient that its own tokens gave."""

    def unmark(parameter: Any, named: Any) -> None:
        if "input_layernorm" in named.rule.megatron:
            parameter.sequence_parallel = False

    with after_marking(unmark):
        yield


@contextmanager
def shards_are_unmarked() -> Iterator[None]:
    """The norm counts a tensor-parallel parameter on tensor rank 0 only."""

    def unmark(parameter: Any, named: Any) -> None:
        if hasattr(parameter, "tensor_model_parallel"):
            parameter.tensor_model_parallel = False

    with after_marking(unmark):
        yield


@contextmanager
def everything_is_marked_a_shard() -> Iterator[None]:
    """The norm counts what tensor ranks replicate once a rank."""
    with after_marking(lambda parameter, named: setattr(parameter, "tensor_model_parallel", True)):
        yield


def after_reductions(change: Callable[[Any], None]) -> Any:
    """Does something to each chunk under DDP when its gradients are complete."""
    from megatron_gspo.megatron import network

    finalize = network.finalize_model_grads

    def other(modules: Any, *args: Any, **kwargs: Any) -> None:
        finalize(modules, *args, **kwargs)
        for module in modules:
            change(module.module)

    return mock.patch.object(network, "finalize_model_grads", other)


@contextmanager
def tensor_rank_1_has_the_final_norms_gradient_negated() -> Iterator[None]:
    from megatron.core import parallel_state

    def negate(chunk: Any) -> None:
        if parallel_state.get_tensor_model_parallel_rank() == 1:
            chunk.decoder.final_layernorm.weight.main_grad.neg_()

    with after_reductions(negate):
        yield


@contextmanager
def tied_stages_keep_their_own_gradients() -> Iterator[None]:
    """The first and the last stage of a pipeline do not add up what each knows of the tied matrix."""
    from megatron.core.distributed import finalize_model_grads

    module = sys.modules[finalize_model_grads.__module__]  # the package gives its function the module's name
    with mock.patch.object(module, "_allreduce_word_embedding_grads", return_value=None):
        yield


@contextmanager
def key_gradients_stay_on_their_context_rank() -> Iterator[None]:
    """The backward of gathering keys and values is a slice: what other ranks' queries say of them is lost."""
    from megatron_gspo.parallel import context

    def own_slice(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, None]:
        return grad.chunk(ctx.group.size())[ctx.group.rank()], None

    with mock.patch.object(context._GatherRows, "backward", own_slice):
        yield


@contextmanager
def gradients_are_summed_over_data_ranks_only() -> Iterator[None]:
    """Context ranks keep what their own tokens gave to the parameters that they all hold."""
    from megatron_gspo.megatron import network

    build = network.wrap_ddp

    def wrap(model: Any, groups: Any, **how: Any) -> Any:
        collection = copy(groups.megatron)
        collection.dp_cp = collection.intra_dp_cp = collection.dp
        return build(model, replace(groups, megatron=collection))

    with mock.patch.object(network, "wrap_ddp", wrap):
        yield


@contextmanager
def router_gradients_are_detached() -> Iterator[None]:
    """They are zeros: where there are none, Megatron's overlapped reduction stops the run."""
    from megatron.core.transformer.moe.router import TopKRouter

    gating = TopKRouter.gating

    def detached(self: Any, hidden: Any) -> Any:
        logits = gating(self, hidden)
        return logits.detach() + 0 * logits

    with mock.patch.object(TopKRouter, "gating", detached):
        yield


@contextmanager
def gradients_pile_up_over_mini_batches() -> Iterator[None]:
    from megatron.core.distributed import DistributedDataParallel

    with mock.patch.object(DistributedDataParallel, "zero_grad_buffer"):
        yield


# -------------------------------------------------------------------------------------- every loss, corrections, critic


@contextmanager
def tokens_are_chosen_on_each_rank_alone() -> Iterator[None]:
    from megatron_gspo.parallel.sums import StageTotals

    def own(self: StageTotals, values: torch.Tensor, n: int) -> float:
        return float(values.topk(min(n, values.numel())).values[-1]) if values.numel() else 0.0

    with mock.patch.object(StageTotals, "nth_largest", own):
        yield


@contextmanager
def value_heads_are_not_all_reduced() -> Iterator[None]:
    from megatron_gspo.megatron.heads import ValueOutput

    init = ValueOutput.__init__

    def unmarked(self: ValueOutput, *args: Any, sequence_parallel: bool) -> None:
        init(self, *args, sequence_parallel=False)

    with mock.patch.object(ValueOutput, "__init__", unmarked):
        yield


@contextmanager
def a_reward_within_a_response_is_a_nan() -> Iterator[None]:
    """What GAE makes of it is not finite, and the step itself never reads it."""
    from megatron_gspo.train import credit

    rewards = credit.token_rewards

    def other(run: Any, shard: Any) -> torch.Tensor:
        rewards_T = rewards(run, shard)
        return rewards_T * float("nan") if run.groups.data_rank == 1 else rewards_T

    with mock.patch.object(credit, "token_rewards", other):
        yield


@contextmanager
def advantages_see_a_ranks_own_tokens_alone() -> Iterator[None]:
    from megatron_gspo.train import credit

    def own(piece: torch.Tensor, group: Any) -> list[torch.Tensor]:
        return [piece if rank == group.rank() else torch.zeros_like(piece) for rank in range(group.size())]

    with mock.patch.object(credit, "gather_pieces", own):
        yield


@contextmanager
def advantages_are_whitened_by_data_rank() -> Iterator[None]:
    """The advantages alone: what is said of the values is summed over all ranks, as it should be."""
    from megatron_gspo.train import credit

    moments = credit._moments

    def of_this_rank(*args: Any) -> tuple[float, float]:
        with mock.patch.object(credit, "reduce_token_sums", lambda sums, stage: sums):
            return moments(*args)

    with mock.patch.object(credit, "_moments", of_this_rank):
        yield
