"""Virtual and uneven pipeline stages, experts over tensor ranks, recompute, and models that stress them.

Every layout's plain step is in ``test_policy``; here is what is particular to these. Each test of equality stands
beside a fault that it sees.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from tests import oracle
from tests.distributed import steps
from tests.distributed.checks import MOVED, NORM, assert_same_step
from tests.distributed.steps import LAYOUTS, Case, Step
from tests.distributed.test_loss_faults import FAR_ABOVE_TOLERANCE, after_marking, experts_are_unmarked
from tests.pool import RankPool

pytestmark = pytest.mark.distributed


@pytest.fixture(scope="module")
def case(tmp_path_factory: pytest.TempPathFactory) -> Case:
    """A dense layer, then three of experts."""
    return steps.straddling_case(str(oracle.make_tiny_qwen3_moe(tmp_path_factory.mktemp("moe"), mlp_only_layers=[0])))


@pytest.fixture(scope="module")
def expected(case: Case) -> Step:
    return steps.expected_step(case)


# ------------------------------------------------------------------------------------------------------ virtual stages


def calls_of_the_objective(case: Case, parallel: dict[str, int], plan: steps.Plan) -> dict[str, Any]:
    policy, groups = steps.make_policy(case, parallel)
    batches = [steps.pack_samples(case, part, groups.shard) for part in plan[groups.data_rank]]
    calls: list[tuple[int, int]] = []

    def objective(index: int, logprobs_T: torch.Tensor, entropy_T: torch.Tensor) -> torch.Tensor:
        calls.append((index, logprobs_T.numel() - batches[index].num_tokens))
        return logprobs_T.sum()

    policy.gradients(batches, objective)
    return {
        "calls": calls,
        "scored": len(policy.logprobs(batches)),
        "stages": [(chunk.layer_offset, len(chunk.decoder.layers)) for chunk in policy.chunks],
    }


def test_the_objective_is_called_once_a_micro_batch_on_the_last_virtual_stage(ranks: RankPool, case: Case) -> None:
    plan = [[[0, 1], [2], [], [3, 4, 5], [6], [7, 8, 9, 10, 11]]]
    first, last = ranks.run(2, calls_of_the_objective, case, LAYOUTS["PP2xVPP2"][1], plan)
    assert (first["calls"], first["scored"]) == ([], 0)
    assert last["calls"] == [(index, 0) for index in range(6)]
    assert last["scored"] == 6
    assert (first["stages"], last["stages"]) == ([(0, 1), (2, 1)], [(1, 1), (3, 1)])


def refusal_of_micro_batches(case: Case, parallel: dict[str, int]) -> str:
    from megatron_gspo.errors import BatchError

    policy, groups = steps.make_policy(case, parallel)
    with pytest.raises(BatchError) as error:
        policy.logprobs([steps.pack_samples(case, [0], groups.shard)] * 3)
    return str(error.value)


def test_micro_batches_that_are_no_multiple_of_the_stages_are_refused(ranks: RankPool, case: Case) -> None:
    for message in ranks.run(2, refusal_of_micro_batches, case, LAYOUTS["PP2xVPP2"][1]):
        assert message.startswith("3 micro-batches over parallel.pipeline = 2 with virtual stages")


@contextmanager
def virtual_stages_are_numbered_rank_by_rank() -> Iterator[None]:
    """Stage 1 is taken to be the first rank's second piece, not the second rank's first."""
    from megatron_gspo.megatron import model

    def contiguous(config: Any, vp_stage: int, pp_rank: int) -> int:
        return pp_rank * config.virtual_pipeline_model_parallel_size + vp_stage  # a layer a stage

    with mock.patch.object(model, "get_transformer_layer_offset", contiguous):
        yield


@contextmanager
def an_expert_is_dropped() -> Iterator[None]:
    """The first expert of every rank gives zeros."""
    from megatron_gspo.megatron.experts import GroupedExperts

    forward = GroupedExperts.forward

    def dropped(self: Any, hidden: torch.Tensor, tokens_per_expert: torch.Tensor, probs: torch.Tensor) -> Any:
        output, bias = forward(self, hidden, tokens_per_expert, probs)
        kept = torch.arange(len(output))[:, None] >= int(tokens_per_expert[0])
        return output * kept, bias

    with mock.patch.object(GroupedExperts, "forward", dropped):
        yield


FAULTS: list[tuple[Callable[[], Any], str]] = [
    (virtual_stages_are_numbered_rank_by_rank, "PP2xVPP2"),
    (an_expert_is_dropped, "PP2xVPP2"),
    (experts_are_unmarked, "DP2xETP2"),
]


@pytest.mark.parametrize(("fault", "layout"), FAULTS, ids=[fault.__name__ for fault, _ in FAULTS])
def test_a_fault_of_a_layout_shows_in_the_step(
    ranks: RankPool, tmp_path: Path, fault: Callable[[], Any], layout: str
) -> None:
    case = steps.straddling_case(str(oracle.make_tiny_qwen3_moe(tmp_path)))
    broken = steps.train(ranks, case, layout, fault=fault)
    assert steps.worst(broken.gradients, steps.expected_step(case).gradients)[0] > FAR_ABOVE_TOLERANCE


def placed(case: Case, parallel: dict[str, int], budget: int) -> list[tuple[int, ...]]:
    """The samples of each micro-batch of a mini-batch, as the trainer plans it from one rank's rollouts."""
    from megatron_gspo import config
    from megatron_gspo.megatron.groups import make_groups
    from megatron_gspo.train.batch import place

    train = {"run_dir": "nowhere", "prompts_per_step": 4, "minibatches": 1, "microbatch_tokens": budget}
    settings = config.parse(
        {
            "model": {"path": case.path},
            "data": {"path": "unused"},
            "train": train | {"oversize": "own"},
            "parallel": parallel,
        }
    )
    [minibatch] = place(case.samples, settings, make_groups(settings.parallel))
    return [tuple(sample.length for sample in samples) for samples in minibatch.samples]


def test_the_plan_fills_up_virtual_stages_and_leaves_a_long_sequence_alone(ranks: RankPool, case: Case) -> None:
    lengths = sorted(sample.length for sample in case.samples)
    budget = 20
    assert [length for length in lengths if length > budget] == [21, 23]
    for parallel, count in (({}, 11), (LAYOUTS["PP2xVPP2"][1], 12)):
        for microbatches in ranks.run(parallel.get("pipeline", 1), placed, case, parallel, budget):
            assert len(microbatches) == count
            assert sorted(length for part in microbatches for length in part) == lengths
            assert {(21,), (23,)} <= set(microbatches)
            assert all(sum(part) <= budget or len(part) == 1 for part in microbatches)


# -------------------------------------------------------------------------------------- experts over tensor ranks (ETP)


def expert_shards_are_unmarked() -> Any:
    def change(parameter: Any, named: Any) -> None:
        if named.rule.is_expert:
            parameter.tensor_model_parallel = False

    return after_marking(change)


def test_an_unmarked_shard_of_an_expert_shows_in_the_norm(ranks: RankPool, case: Case, expected: Step) -> None:
    case = replace(case, updates=1)
    broken = steps.train(ranks, case, "TP2xETP2", fault=expert_shards_are_unmarked)
    with pytest.raises(AssertionError):
        assert_same_step(broken, expected)
    assert steps.worst(broken.gradients, expected.gradients)[0] < 1e-12


# ----------------------------------------------------------------------------------------------------------- recompute

RECOMPUTE: dict[str, dict[str, Any]] = {
    "full": {"recompute": "full"},
    "feed-forward": {"recompute": "selective"},
    "attention scores": {"recompute": "selective", "recompute_modules": ("core_attn",)},
}


@pytest.mark.parametrize("layout", ["TP1", "PP2xVPP2", "TP2xPP2xEP2"])
def test_recompute_changes_no_bit_of_a_gradient(ranks: RankPool, case: Case, expected: Step, layout: str) -> None:
    plain = steps.train(ranks, case, layout)
    assert_same_step(plain, expected)
    for name, settings in RECOMPUTE.items():
        step = steps.train(ranks, replace(case, **settings), layout)
        assert steps.worst(step.gradients, plain.gradients)[0] == 0.0, name
        assert steps.worst(step.logprobs, plain.logprobs)[0] == 0.0, name


@contextmanager
def recompute_sees_other_inputs() -> Iterator[None]:
    from megatron.core.tensor_parallel import random

    detach = random.detach_variable

    def other(inputs: tuple[Any, ...]) -> tuple[Any, ...]:
        return tuple(x.flip(0).detach().requires_grad_() if i == 0 else x for i, x in enumerate(detach(inputs)))

    with mock.patch.object(random, "detach_variable", other):
        yield


@pytest.mark.parametrize("settings", RECOMPUTE)
def test_a_recompute_of_other_inputs_shows_in_a_gradient(
    ranks: RankPool, case: Case, expected: Step, settings: str
) -> None:
    broken = steps.train(ranks, replace(case, **RECOMPUTE[settings]), fault=recompute_sees_other_inputs)
    assert steps.worst(broken.logprobs, expected.logprobs)[0] < 1e-12
    assert steps.worst(broken.gradients, expected.gradients)[0] > FAR_ABOVE_TOLERANCE


def expert_load(case: Case, parallel: dict[str, int]) -> np.ndarray:
    policy, _ = steps.make_policy(case, parallel)
    batches = [steps.pack_samples(case, part, policy.groups.shard) for part in ([0, 1, 2], [3, 4])]
    policy.gradients(batches, lambda index, logprobs_T, entropy_T: logprobs_T.sum())
    return policy.expert_load.stop().numpy()


def test_a_token_that_is_routed_again_in_backward_counts_once(ranks: RankPool, case: Case) -> None:
    [plain] = ranks.run(1, expert_load, case, {})
    tokens = sum(sample.length for sample in case.samples[:5])
    assert plain.sum(axis=1).tolist() == [2 * tokens] * 3
    for settings in RECOMPUTE.values():
        [again] = ranks.run(1, expert_load, replace(case, **settings), {})
        assert np.array_equal(again, plain)


# -------------------------------------------------------------------------------------------------------------- models


def test_five_layers_with_tied_embeddings_lie_on_any_stages(ranks: RankPool, tmp_path: Path) -> None:
    case = steps.straddling_case(str(oracle.make_tiny_qwen3_moe(tmp_path, layers=5, tie=True)), updates=2)
    expected, one_rank = steps.expected_step(case), steps.train(ranks, case)
    layouts: dict[str, dict[str, Any]] = {
        "3 + 2": {"pipeline": 2},
        "2 + 1 + 1 + 1": {"pipeline": 2, "virtual_pipeline": 2},
        "the head has a stage of its own": {"pipeline": 2, "virtual_pipeline": 2, "stage_layers": [1, 2, 2, 0]},
        "so has the embedding": {"pipeline": 2, "stage_layers": [0, 5]},
    }
    for name, parallel in layouts.items():
        with mock.patch.dict(LAYOUTS, {name: (2, parallel)}):
            step = steps.train(ranks, case, name)
        assert_same_step(step, expected)
        assert step.grad_norms == pytest.approx(one_rank.grad_norms, rel=NORM), name
        assert steps.worst(step.moved, one_rank.moved)[0] < MOVED, name


def test_three_hundred_experts_are_more_than_a_byte_counts(ranks: RankPool, tmp_path: Path) -> None:
    path = oracle.make_tiny_qwen3_moe(tmp_path, experts=300, top_k=4, layers=1)
    case = steps.straddling_case(str(path))
    expected = steps.expected_step(case, idle=".experts.")  # too few tokens for all of them
    late = [name for name in expected.gradients if ".experts.2" in name and int(name.split(".")[5]) > 255]
    assert any(expected.gradients[name].any() for name in late), "no expert above the 256th is chosen"
    assert_same_step(steps.train(ranks, case, "EP2"), expected)


def test_an_expert_that_gets_nothing_gets_no_gradient(ranks: RankPool, tmp_path: Path) -> None:
    """With one expert a token, the mean of the other experts' gates never has the highest score."""
    path = oracle.make_tiny_qwen3_moe(tmp_path, experts=4, top_k=1, norm_topk_prob=False)
    tensors = load_file(path / "model.safetensors")
    gate = tensors["model.layers.1.mlp.gate.weight"]
    gate[2] = gate[[0, 1, 3]].mean(0)
    save_file(tensors, path / "model.safetensors", metadata={"format": "pt"})
    case = steps.straddling_case(str(path), updates=1)
    expected = steps.expected_step(case, idle="layers.1.mlp.experts.2.")
    assert not expected.gradients["model.layers.1.mlp.experts.2.up_proj.weight"].any()
    for layout in ("TP1", "EP2", "TP2xETP2", "PP2xVPP2"):
        step = steps.train(ranks, case, layout)
        assert_same_step(step, expected)
        assert not step.gradients["model.layers.1.mlp.experts.2.up_proj.weight"].any()


# ---------------------------------------------------------------------------------------------------- optimizer states


def bytes_of_states(case: Case, parallel: dict[str, int]) -> tuple[int, int]:
    """(bytes of this rank's moments and master weights, elements of its parameters)."""
    policy, _ = steps.make_policy(case, parallel)
    plan = steps.uneven_plan(len(case.samples), policy.groups.data_size)
    batches = [steps.pack_samples(case, part, policy.groups.shard) for part in plan[policy.groups.data_rank]]
    policy.gradients(batches, lambda index, logprobs_T, entropy_T: logprobs_T.sum())
    policy.step(0, 1)
    inner = [part.optimizer for part in policy.optimizer.megatron.chained_optimizers]
    names = ("param", "exp_avg", "exp_avg_sq")
    states = [state[name] for one in inner for state in one.state.values() for name in names]
    held = sum(tensor.numel() * tensor.element_size() for tensor in states)
    return held, sum(p.numel() for chunk in policy.chunks for p in chunk.parameters())


@pytest.mark.parametrize(("world", "parallel"), [(2, {}), (3, {}), (2, {"expert": 2})])
def test_each_data_parallel_rank_keeps_its_share_of_the_optimizer_states_only(
    ranks: RankPool, case: Case, world: int, parallel: dict[str, int]
) -> None:
    """12 bytes a parameter of a bfloat16 model (two moments and a master weight), once over all ranks."""
    parts = ranks.run(world, bytes_of_states, replace(case, dtype="bfloat16"), parallel)
    whole = sum(weight.numel() for weight in load_file(f"{case.path}/model.safetensors").values())
    assert sum(held for held, _ in parts) == 12 * whole
    for held, _ in parts:
        assert held == pytest.approx(12 * whole / world, rel=0.02)
    if not parallel:
        assert all(parameters == whole for _, parameters in parts)
