"""The optimizer step over ranks: on a GPU's settings, overlapped with what surrounds it, with states elsewhere."""

from __future__ import annotations

import json
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch

from tests import oracle
from tests.distributed import steps
from tests.distributed.steps import LAYOUTS, Case
from tests.pool import RankPool

pytestmark = pytest.mark.distributed

SETTINGS = {"lr": 1e-3, "weight_decay": 0.1, "clip_grad": 0.5, "betas": [0.9, 0.95]}


@pytest.fixture(scope="module")
def case(tmp_path_factory: pytest.TempPathFactory) -> Case:
    path = oracle.make_tiny_qwen3_moe(tmp_path_factory.mktemp("moe"), layers=4, mlp_only_layers=[0])
    return Case(str(path), tuple(oracle.random_samples(seed=3)), (), dtype="float32", optimizer=SETTINGS)


def batches_of(policy: Any, case: Case, parallel: dict[str, Any]) -> list[Any]:
    groups = policy.groups
    layout = {name: size for name, size in parallel.items() if name != "overlap"}
    plan = steps.filled_up(steps.uneven_plan(len(case.samples), groups.data_size), layout)
    return [steps.pack_samples(case, part, groups.shard) for part in plan[groups.data_rank]]


def sum_of_logprobs(index: int, logprobs_T: torch.Tensor, entropy_T: torch.Tensor) -> torch.Tensor:
    return logprobs_T.sum()


# ------------------------------------------------------------------------------------------------------ on a GPU


def built_where_cuda_is(case: Case) -> int:
    from megatron_gspo.megatron.optimizer import Optimizer

    policy, groups = steps.make_policy(case, {})
    with mock.patch.object(torch.cuda, "is_available", return_value=True):
        return len(Optimizer(policy.optimizer.config, policy.modules, groups).parts())


def test_an_optimizer_is_built_where_there_is_cuda(ranks: RankPool, case: Case) -> None:
    """Megatron refuses gloo groups beside groups of ours, and nothing else has to do with the device."""
    assert ranks.run(1, built_where_cuda_is, case) == [2]


# ------------------------------------------------------------------------------------------------------- overlap

SMALL = 2000
"""Parameters of a bucket: with Megatron's 40 million the model is one, and nothing is reduced before the end."""


def trained_in_buckets(case: Case, parallel: dict[str, Any]) -> tuple[dict[str, torch.Tensor], list[float], list[int]]:
    """Weights after each of three steps and logprobs between them, norms, and what was under way: buckets whose
    reduction had begun when backward ended, and whose weights were still being gathered when a step had ended."""
    from megatron_gspo.megatron import network, optimizer

    under_way = []
    finalize = network._finalize_gradients

    def noting(modules: Any, *args: Any, **kwargs: Any) -> None:
        under_way.append(sum(group.grad_reduce_handle is not None for group in buckets_of(modules)))
        finalize(modules, *args, **kwargs)

    small = partial(optimizer.DistributedDataParallelConfig, bucket_size=SMALL)
    found, norms = {}, []
    with (
        mock.patch.object(optimizer, "DistributedDataParallelConfig", small),
        mock.patch.object(network, "_finalize_gradients", noting),
    ):
        policy, _ = steps.make_policy(case, parallel)
        batches = batches_of(policy, case, parallel)
        for step in range(3):
            policy.gradients(batches, sum_of_logprobs)
            found |= {f"{step} gradient of {name}": tensor for name, tensor in policy.named_gradients()}
            norms.append(policy.step(step, 3)[0])
            under_way.append(sum(group.param_gather_handle is not None for group in buckets_of(policy.modules)))
            if step == 1:  # at once, else after a forward pass
                found |= {f"{step} {name}": tensor for name, tensor in policy.weights()}
            for index, (logprobs_T, _) in enumerate(policy.logprobs(batches)):
                found[f"{step} micro-batch {index} of rank {torch.distributed.get_rank()}"] = logprobs_T
            found |= {f"{step} {name} afterwards": tensor for name, tensor in policy.weights()}
    return found, norms, under_way


def buckets_of(modules: Any) -> list[Any]:
    return [group for module in modules for group in (*module.bucket_groups, *module.expert_parallel_bucket_groups)]


@pytest.mark.parametrize("layout", ["DP2", "EP2", "CP2", "TP2xEP2", "PP2xVPP2xDP2xEP2"])
def test_overlapped_reductions_and_gathers_change_no_bit(ranks: RankPool, case: Case, layout: str) -> None:
    """Of two data ranks, whose sum is the same in either order, and without clipping: the norm adds up each rank's
    shards, and smaller buckets make other shards."""
    world, parallel = LAYOUTS[layout]
    case = replace(case, optimizer={**SETTINGS, "clip_grad": 0.0})
    with_it, without = (
        ranks.run(world, trained_in_buckets, case, parallel | {"overlap": overlap}) for overlap in (True, False)
    )
    for (found, norms, under_way), (plain, plain_norms, nothing) in zip(with_it, without, strict=True):
        assert norms == pytest.approx(plain_norms, rel=1e-6)
        assert found.keys() == plain.keys()
        assert [name for name, tensor in plain.items() if not torch.equal(tensor, found[name])] == []
        assert set(nothing) == {0}
        reduced, gathered = under_way[2::2], under_way[1::2]  # the first backward counts what there is to wait for
        assert min(reduced) > 0 and min(gathered) > 0
        if layout == "DP2":
            assert min(gathered) > 10, "one bucket, and there is nothing to overlap"


def logprobs_without_waiting(case: Case, parallel: dict[str, int]) -> float:
    """The largest difference that a step's new weights would make, were the head's not waited for."""
    from megatron_gspo.megatron import network

    policy, _ = steps.make_policy(case, parallel)
    batches = batches_of(policy, case, parallel)
    policy.gradients(batches, sum_of_logprobs)
    for group in buckets_of(policy.modules):
        group.start_param_sync = mock.Mock()  # never comes
    policy.step(0, 1)
    with mock.patch.object(network, "finish_gathers") as waits:
        policy.logprobs(batches)
        return waits.call_count


def test_a_head_waits_for_the_weights_that_it_reads(ranks: RankPool, case: Case) -> None:
    assert min(ranks.run(2, logprobs_without_waiting, case, {})) >= 1


# ------------------------------------------------------------------------------------------------------ the norm


def norms_asked_for(case: Case) -> int:
    from megatron_gspo.megatron.optimizer import dist

    policy, _ = steps.make_policy(case, {})
    policy.gradients(batches_of(policy, case, {}), sum_of_logprobs)
    with mock.patch.object(dist, "all_reduce", side_effect=dist.all_reduce) as asked:
        policy.step(0, 1)
    return asked.call_count


def test_a_step_reduces_one_number(ranks: RankPool, case: Case) -> None:
    """The gradient norm, once."""
    assert ranks.run(2, norms_asked_for, case) == [1, 1]


# ----------------------------------------------------------------------------------------------- where states are


def moved(case: Case, parallel: dict[str, Any]) -> tuple[dict[str, torch.Tensor], set[torch.dtype]]:
    policy, _ = steps.make_policy(case, parallel)
    batches = batches_of(policy, case, parallel)
    for step in range(3):
        policy.gradients(batches, sum_of_logprobs)
        policy.step(step, 3)
    states = [state for part in policy.optimizer.parts() for state in part.optimizer.state.values()]
    return dict(policy.weights()), {state["exp_avg_sq"].dtype for state in states}


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_offloaded_states_change_no_bit_of_a_step(ranks: RankPool, case: Case, dtype: str) -> None:
    case = replace(case, dtype=dtype)
    here, there = (
        ranks.run(2, moved, replace(case, optimizer={**SETTINGS, "offload": offload}), {"expert": 2})
        for offload in (False, True)
    )
    for (mine, _), (theirs, _) in zip(here, there, strict=True):
        assert all(torch.equal(weight, theirs[name]) for name, weight in mine.items())


def test_moments_in_bfloat16_move_weights_as_far_as_those_in_float32(ranks: RankPool, case: Case) -> None:
    narrow = replace(case, optimizer={**SETTINGS, "state_dtype": "bfloat16"})
    [(wide, wide_dtypes)], [(found, dtypes)] = ranks.run(1, moved, case, {}), ranks.run(1, moved, narrow, {})
    assert (wide_dtypes, dtypes) == ({torch.float32}, {torch.bfloat16})
    difference = max((weight - wide[name]).abs().max().item() for name, weight in found.items())
    assert 0 < difference < 3 * SETTINGS["lr"] * 0.02, "a step is about lr long, and a moment is within 1/128"


# ------------------------------------------------------------------------------------------- turns with servers


def trained_in_turns(
    case: Case, parallel: dict[str, Any], turns: bool, directory: Path
) -> tuple[list[dict[str, torch.Tensor]], set[int], str]:
    """Weights after each of three steps, between which gradients and states leave, and a checkpoint is written of them
    where they are; the sizes of the gradients' buffers meanwhile; the checkpoint's own hashes."""
    from megatron_gspo.megatron.checkpoint import save_checkpoint

    policy, _ = steps.make_policy(case, parallel)
    batches = batches_of(policy, case, parallel)
    found, sizes = [], set()
    for step in range(3):
        policy.gradients(batches, sum_of_logprobs)
        policy.step(step, 3)
        if turns:
            policy.park()
        sizes |= {buffer.grad_data.untyped_storage().nbytes() for buffer in policy.optimizer._buffers()}
        found.append({name: tensor.clone() for name, tensor in policy.weights()})
        policy.logprobs(batches)
        if step == 1:
            save_checkpoint({"policy": policy}, directory, {})
        policy.unpark()
    return found, sizes, json.dumps(json.loads((directory / "checkpoint.json").read_text())["files"])


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_what_leaves_between_steps_comes_back_bit_for_bit(
    ranks: RankPool, case: Case, dtype: str, tmp_path: Path
) -> None:
    case = replace(case, dtype=dtype)
    still, in_turns = (
        ranks.run(2, trained_in_turns, case, {"expert": 2}, turns, tmp_path / str(turns)) for turns in (False, True)
    )
    for (mine, sizes, files), (theirs, none, same) in zip(still, in_turns, strict=True):
        assert min(sizes) > 0 and none == {0}, "a gradient that is read meanwhile ends the test's process"
        for here, there in zip(mine, theirs, strict=True):
            assert all(torch.equal(tensor, there[name]) for name, tensor in here.items())
        assert files == same
