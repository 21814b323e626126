"""Faults of the kinds that trainers ship, put in on purpose: each must move a number far beyond the tests' tolerances.

Each fault is one that leaves the loss and s_i plausible, so that only the comparison of gradients (or, where gradients
are untouched, of the gradient norm) can catch it. Without a fault the same comparison is at 1e-14.
"""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from copy import copy
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist

from megatron_gspo.types import PackedBatch, Shard
from tests import oracle
from tests.distributed import steps
from tests.distributed.steps import Case, Step
from tests.pool import RankPool

pytestmark = pytest.mark.distributed

FAR_ABOVE_TOLERANCE = 0.1
"""Gradients of right code are within 1e-12 (test_policy)."""


@pytest.fixture(scope="module")
def case(tmp_path_factory: pytest.TempPathFactory) -> Case:
    return steps.straddling_case(str(oracle.make_tiny_qwen3_moe(tmp_path_factory.mktemp("faults"))), updates=1)


@pytest.fixture(scope="module")
def expected(case: Case) -> Step:
    return steps.expected_step(case)


# -------------------------------------------------------------------------------- faults; each is entered by every rank


@contextmanager
def sequence_sums_stay_local() -> Iterator[None]:
    """No all-reduce of the partial sums: s_i is each tensor rank's own."""
    from megatron_gspo.parallel import sequence

    with mock.patch.object(sequence._AllReduceSum, "forward", lambda ctx, partial, group: partial.clone()):
        yield


@contextmanager
def sequence_sum_backward_is_summed() -> Iterator[None]:
    """The backward of an all-reduce taken for an all-reduce: one loss is counted by every tensor rank."""
    from megatron_gspo.parallel import sequence

    forward = sequence._AllReduceSum.forward

    def remember(ctx: Any, partial: torch.Tensor, group: Any) -> torch.Tensor:
        ctx.group = group
        return forward(ctx, partial, group)

    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, None]:
        grad = grad.clone()
        dist.all_reduce(grad, group=ctx.group)
        return grad, None

    with mock.patch.multiple(sequence._AllReduceSum, forward=remember, backward=backward):
        yield


@contextmanager
def logprob_gradients_stay_local() -> Iterator[None]:
    """The backward of "keep the own slice" is a slice: other ranks' tokens give this shard of the head nothing."""
    from megatron_gspo.parallel import logprobs

    gather = logprobs._gather

    def own_slice_only(piece: torch.Tensor, group: Any) -> torch.Tensor:
        if piece.ndim > 1:
            return gather(piece, group)
        whole = piece.new_zeros(group.size(), len(piece))
        whole[group.rank()] = piece
        return whole.flatten()

    with mock.patch.object(logprobs, "_gather", own_slice_only):
        yield


@contextmanager
def megatron_averages_over_data_ranks() -> Iterator[None]:
    """DDP built without ``calculate_per_token_loss``: it divides a loss that is normalised already."""
    from megatron_gspo.megatron import optimizer

    ddp = optimizer.DistributedDataParallel

    def build(config: Any, *args: Any, **kwargs: Any) -> Any:
        with mock.patch.object(config, "calculate_per_token_loss", False):
            return ddp(config, *args, **kwargs)

    with mock.patch.object(optimizer, "DistributedDataParallel", build):
        yield


@contextmanager
def megatron_averages_over_micro_batches() -> Iterator[None]:
    """The schedule divides by the number of micro-batches."""
    from megatron_gspo.megatron import network

    build = network.wrap_ddp

    def wrap(model: Any, groups: Any, **how: Any) -> Any:
        wrapped = build(model, groups, **how)
        model.config.calculate_per_token_loss = False
        return wrapped

    with mock.patch.object(network, "wrap_ddp", wrap):
        yield


@contextmanager
def after_marking(change: Callable[[Any, Any], None]) -> Iterator[None]:
    """``change(parameter, named)`` for every parameter, after the product has marked them."""
    from megatron_gspo.megatron import model

    mark = model._mark_parameters

    def then(policy: Any, family: Any) -> None:
        mark(policy, family)
        for parameter, named in policy.rules(family):
            change(parameter, named)

    with mock.patch.object(model, "_mark_parameters", then):
        yield


def the_input_norms_are_unmarked() -> Any:
    """Each tensor rank keeps the part of a norm's gradient that its own tokens gave."""

    def change(parameter: Any, named: Any) -> None:
        if "input_layernorm" in named.rule.megatron:
            parameter.sequence_parallel = False

    return after_marking(change)


def the_final_norm_is_unmarked() -> Any:
    def change(parameter: Any, named: Any) -> None:
        if "final_layernorm" in named.rule.megatron:
            parameter.sequence_parallel = False

    return after_marking(change)


def the_router_is_unmarked() -> Any:
    def change(parameter: Any, named: Any) -> None:
        if "router" in named.rule.megatron:
            parameter.sequence_parallel = False

    return after_marking(change)


def experts_are_unmarked() -> Any:
    """Megatron-Core 0.16.1 at EP1: experts without ``allreduce = False``, so DDP takes them for dense parameters."""

    def change(parameter: Any, named: Any) -> None:
        if named.rule.is_expert:
            parameter.allreduce = True

    return after_marking(change)


def shards_are_unmarked() -> Any:
    """The norm counts a tensor-parallel parameter on tensor rank 0 only."""

    def change(parameter: Any, named: Any) -> None:
        if hasattr(parameter, "tensor_model_parallel"):
            parameter.tensor_model_parallel = False

    return after_marking(change)


@contextmanager
def masks_are_shifted_by_one() -> Iterator[None]:
    """The response's own positions instead of those that predict it, for old and new log-probabilities alike."""
    pack, positions = steps.pack_samples, steps.response_positions

    def shifted(case: Case, indices: Any, shard: Shard) -> PackedBatch:
        batch = pack(case, indices, shard)
        return batch.replace(mask_T=batch.mask_T.roll(1))

    with mock.patch.multiple(
        steps, pack_samples=shifted, response_positions=lambda case, batch: positions(case, batch) + 1
    ):
        yield


@contextmanager
def tied_stages_keep_their_own_gradients() -> Iterator[None]:
    """The first and the last stage of a pipeline do not add up what each knows of the tied matrix."""
    from megatron.core.distributed import finalize_model_grads

    module = sys.modules[finalize_model_grads.__module__]  # the package gives its function the module's name
    with mock.patch.object(module, "_allreduce_word_embedding_grads", return_value=None):
        yield


@contextmanager
def padding_rows_take_probability() -> Iterator[None]:
    """The vocabulary's padding rows are not masked."""
    from megatron_gspo.megatron import heads

    logprobs = heads.vocab_parallel_logprobs

    def unmasked(*args: Any, vocab_size: int, **kwargs: Any) -> Any:
        return logprobs(*args, vocab_size=vocab_size + 1, **kwargs)

    with mock.patch.object(heads, "vocab_parallel_logprobs", unmasked):
        yield


# ------------------------------------------------------------------------------------------------- context parallelism


@contextmanager
def megatron_multiplies_by_context_ranks() -> Iterator[None]:
    """What the schedule does to a loss that comes without a token count."""
    from megatron.core import parallel_state
    from megatron.core.pipeline_parallel import schedules

    calc_loss = schedules.forward_step_calc_loss

    def scaled(*args: Any, **kwargs: Any) -> Any:
        loss, num_tokens = calc_loss(*args, **kwargs)
        return loss * parallel_state.get_context_parallel_world_size(), num_tokens

    with mock.patch.object(schedules, "forward_step_calc_loss", scaled):
        yield


@contextmanager
def the_zigzag_turns_one_position_late() -> Iterator[None]:
    """``<=`` for ``<`` where the front chunk ends, wherever positions are dealt out."""
    from megatron_gspo.batching import packing
    from megatron_gspo.megatron import attention, model

    right = packing.zigzag_positions

    def late(cu_seqlens: torch.Tensor, context: int, rank: int) -> torch.Tensor:
        positions, start = right(cu_seqlens, context, rank).clone(), 0
        for length in (cu_seqlens.diff() // context).tolist():
            positions[start + length // 2] = positions[start + length // 2 - 1] + 1
            start += length
        return positions

    with contextlib.ExitStack() as stack:
        for module in (packing, attention, model):
            stack.enter_context(mock.patch.object(module, "zigzag_positions", late))
        yield


@contextmanager
def labels_are_dealt_out_one_rank_off() -> Iterator[None]:
    """The model's tokens are the next context rank's; attention and shards are right."""
    from megatron_gspo.megatron import model

    right = model.zigzag_positions
    with mock.patch.object(model, "zigzag_positions", lambda cu, n, rank: right(cu, n, (rank + 1) % n)):
        yield


@contextmanager
def key_gradients_stay_local() -> Iterator[None]:
    """The backward of gathering keys and values is a slice: what other ranks' queries say of them is lost."""
    from megatron_gspo.parallel import context

    def own_slice(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, None]:
        return grad.chunk(ctx.group.size())[ctx.group.rank()], None

    with mock.patch.object(context._GatherRows, "backward", own_slice):
        yield


@contextmanager
def sequence_sums_are_over_tensor_ranks_only() -> Iterator[None]:
    """s_i and the token counts are each context rank's own."""
    from megatron.core import parallel_state

    from megatron_gspo.parallel import sequence

    all_reduce = sequence._AllReduceSum.forward

    def over_tensor_ranks(ctx: Any, partial: torch.Tensor, group: Any) -> torch.Tensor:
        return all_reduce(ctx, partial, parallel_state.get_tensor_model_parallel_group())

    with mock.patch.object(sequence._AllReduceSum, "forward", over_tensor_ranks):
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


FAULTS: list[tuple[Callable[[], Any], str, str]] = [
    (sequence_sums_stay_local, "TP2xEP2", "model.norm.weight"),
    (sequence_sum_backward_is_summed, "TP2xEP2", "model.norm.weight"),
    (logprob_gradients_stay_local, "TP2xEP2", "lm_head.weight"),
    (megatron_averages_over_data_ranks, "DP2", "lm_head.weight"),
    (megatron_averages_over_micro_batches, "TP1", "lm_head.weight"),
    (the_input_norms_are_unmarked, "TP2xEP2", "model.layers.0.input_layernorm.weight"),
    (the_final_norm_is_unmarked, "TP2xEP2", "model.norm.weight"),
    (the_router_is_unmarked, "TP2xEP2", "model.layers.2.mlp.gate.weight"),
    (experts_are_unmarked, "TP2", "model.layers.1.mlp.experts.3.down_proj.weight"),
    (masks_are_shifted_by_one, "TP1", "lm_head.weight"),
    (padding_rows_take_probability, "TP2xEP2", "lm_head.weight"),
    (sequence_sums_stay_local, "CP2", "model.norm.weight"),
    (sequence_sum_backward_is_summed, "CP2", "model.norm.weight"),
    (sequence_sums_are_over_tensor_ranks_only, "TP2xCP2", "model.norm.weight"),
    (megatron_multiplies_by_context_ranks, "CP2", "lm_head.weight"),
    (the_zigzag_turns_one_position_late, "CP2", "lm_head.weight"),
    (labels_are_dealt_out_one_rank_off, "CP2", "lm_head.weight"),
    (key_gradients_stay_local, "CP2", "model.layers.0.self_attn.k_proj.weight"),
    (gradients_are_summed_over_data_ranks_only, "CP2", "model.norm.weight"),
]
"""(fault, a layout where it bites, a tensor whose gradient must show it)."""


@pytest.mark.parametrize(
    ("fault", "layout", "name"), FAULTS, ids=[f"{fault.__name__}-{where}" for fault, where, _ in FAULTS]
)
def test_a_fault_shows_in_a_gradient(
    ranks: RankPool, case: Case, expected: Step, fault: Callable[[], Any], layout: str, name: str
) -> None:
    broken = steps.train(ranks, case, layout, fault=fault)
    error, _ = steps.worst({name: broken.gradients[name]}, {name: expected.gradients[name]})
    assert error > FAR_ABOVE_TOLERANCE, f"{name} moved by {error:.1e} only"


def test_a_local_slice_backward_loses_tens_of_percent_of_the_head_and_nothing_of_the_ratios(
    ranks: RankPool, case: Case, expected: Step
) -> None:
    broken = steps.train(ranks, case, "TP2xEP2", fault=logprob_gradients_stay_local)
    head = "lm_head.weight"
    assert steps.worst({head: broken.gradients[head]}, {head: expected.gradients[head]})[0] > 0.2
    # Nothing else than gradients can see it: the forward pass is right to the last digit.
    assert steps.worst(broken.log_ratio, expected.log_ratio)[0] < 1e-9
    assert broken.loss == pytest.approx(expected.loss, rel=1e-10)


def test_a_local_slice_of_key_gradients_leaves_the_forward_pass_right(
    ranks: RankPool, case: Case, expected: Step
) -> None:
    broken = steps.train(ranks, case, "CP2", fault=key_gradients_stay_local)
    assert steps.worst(broken.gradients, expected.gradients)[0] > FAR_ABOVE_TOLERANCE
    assert steps.worst(broken.log_ratio, expected.log_ratio)[0] < 1e-9
    assert broken.loss == pytest.approx(expected.loss, rel=1e-10)


def test_an_unmarked_shard_shows_in_the_norm_alone(ranks: RankPool, case: Case, expected: Step) -> None:
    right, broken = (steps.train(ranks, case, "TP2xEP2", fault=fault) for fault in (None, shards_are_unmarked))
    assert steps.worst(broken.gradients, expected.gradients)[0] < 1e-12
    assert broken.grad_norms[0] / right.grad_norms[0] < 1 - FAR_ABOVE_TOLERANCE


def test_a_tied_matrix_needs_the_gradients_of_both_ends(ranks: RankPool, tmp_path: Path) -> None:
    case = steps.straddling_case(str(oracle.make_tiny_qwen3(tmp_path, tie=True)))
    expected, name = steps.expected_step(case), "model.embed_tokens.weight"
    right, broken = (steps.train(ranks, case, "PP2", fault=f) for f in (None, tied_stages_keep_their_own_gradients))
    assert steps.worst(right.gradients, expected.gradients)[0] < 1e-12
    assert steps.worst(broken.gradients, expected.gradients) > (FAR_ABOVE_TOLERANCE, name)


def test_without_a_fault_the_comparison_is_exact(ranks: RankPool, case: Case, expected: Step) -> None:
    for layout in ("TP1", "TP2", "DP2", "TP2xEP2", "CP2", "TP2xCP2"):
        assert steps.worst(steps.train(ranks, case, layout).gradients, expected.gradients)[0] < 1e-12
