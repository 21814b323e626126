"""Adapters in every layout: the same step as one process and as transformers, saved alone, and taken up again."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from safetensors.torch import load_file, save_file

from megatron_gspo.errors import WeightError
from megatron_gspo.parity.case import STEPS, Case
from megatron_gspo.parity.check import compare_transformers
from megatron_gspo.parity.layouts import Layout, parse_layout
from megatron_gspo.parity.parts import Part
from megatron_gspo.parity.step import build, old_pass
from megatron_gspo.parity.verdict import Row, judge
from tests.distributed.test_parity import Bench, bench, steps_with

pytestmark = pytest.mark.distributed
RANK = 4


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Bench:
    """A dense layer below three of 8 experts, grouped-query attention."""
    return bench(tmp_path_factory.mktemp("lora"), lora=RANK)


# ------------------------------------------------------------------------------------------------------------- parity


LAYOUTS = ("TP2xPP2xEP2", "TP2xDP2xEP2xETP2+recompute")
MORE_LAYOUTS = ("TP1", "TP2", "TP2xETP2", "PP2xVPP2", "CP2", "DP4xEP2", "CP2xEP2xPP2xVPP2+recompute")
SLOW = pytest.mark.slow_suite


@pytest.mark.parametrize("layout", [*LAYOUTS, *(pytest.param(each, marks=SLOW) for each in MORE_LAYOUTS)])
def test_gradients_and_steps_of_adapters_are_those_of_one_process(tiny: Bench, layout: str) -> None:
    row = tiny.row(layout)
    assert (row.verdict, row.reason) == ("held", "")
    assert row.columns["gradients"].error < 1e-11
    assert row.columns["parameters"].error < 1e-11
    assert row.columns["norm"].error < 1e-6


def test_one_process_is_transformers_with_the_adapters_merged_and_the_chain_rule(tiny: Bench) -> None:
    row = compare_transformers(tiny.reference, tiny.ranks, tiny.directory)
    assert (row.verdict, row.reason) == ("held", "")
    names = tiny.reference.steps[0].names
    assert all(name.endswith(("lora_A.weight", "lora_B.weight")) for name in names)
    moe, dense, attention = 3 * 8 * 3, 3, 4 * 4
    assert len(names) == 2 * (moe + dense + attention), "two matrices for each that is adapted"


def test_experts_one_by_one_have_adapters_too(tmp_path: Path) -> None:
    row = bench(tmp_path, lora=RANK, kernels="reference").row("TP2xEP2")
    assert (row.verdict, row.reason) == ("held", "")
    assert row.columns["gradients"].error < 1e-11


@pytest.mark.slow_suite
@pytest.mark.parametrize("model", ["dense", "mixtral", "qwen2-moe", "olmoe", "deepseek-v3", "moonlight", "glm4-moe"])
def test_every_familys_matrices_have_adapters(tmp_path: Path, model: str) -> None:
    """Latent attention with its down projections, shared experts, biases beside the matrices, one head tied."""
    of_family = bench(tmp_path, lora=RANK, model=f"tiny-{model}")
    assert compare_transformers(of_family.reference, of_family.ranks, of_family.directory).verdict == "held"
    row = of_family.row("TP2xPP2" if model == "dense" else "TP2xPP2xEP2")
    assert (row.verdict, row.reason) == ("held", "")


# ------------------------------------------------------------------------------------------------------------- faults


@contextmanager
def the_scale_is_left_out() -> Iterator[None]:
    from megatron_gspo.config import LoraConfig

    with mock.patch.object(LoraConfig, "scale", 1.0):
        yield


@contextmanager
def no_gradient_is_summed_over_tensor_ranks() -> Iterator[None]:
    from megatron_gspo.megatron import network

    mark = network.mark_adapters

    def unmarked(policy: Any) -> None:
        mark(policy)
        for own, _ in policy.adapter_rules():
            own.parameter.sequence_parallel = False

    with mock.patch.object(network, "mark_adapters", unmarked):
        yield


@contextmanager
def every_rank_has_the_first_rows_of_b() -> Iterator[None]:
    from megatron_gspo.megatron import lora

    take = lora.take_piece
    with mock.patch.object(lora, "take_piece", lambda tensor, cut, rank, size: take(tensor, cut, 0, size)):
        yield


@contextmanager
def a_rank_keeps_its_own_heads_part_of_the_gradient() -> Iterator[None]:
    """The backward of the gather is a slice, and no sum."""
    from megatron_gspo.megatron import lora

    class Sliced(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, rows: torch.Tensor, group: Any) -> torch.Tensor:
            ctx.group = group
            return gather(rows.detach(), group)

        @staticmethod
        def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor, None]:
            return grads[0].chunk(ctx.group.size())[ctx.group.rank()], None

    gather = lora.gather_rows
    with mock.patch.object(lora, "gather_rows", Sliced.apply):
        yield


@contextmanager
def expert_tensor_ranks_keep_their_own_gradients() -> Iterator[None]:
    from megatron_gspo.megatron import network

    with mock.patch.object(network, "sum_shared_gradients", return_value=None):
        yield


@contextmanager
def the_norm_counts_what_expert_tensor_ranks_share_twice() -> Iterator[None]:
    from megatron_gspo.megatron import network

    mark = network.mark_adapters

    def marked(policy: Any) -> None:
        mark(policy)
        for own, _ in policy.adapter_rules():
            own.parameter.shared = False

    with mock.patch.object(network, "mark_adapters", marked):
        yield


@contextmanager
def the_reference_has_the_adapters() -> Iterator[None]:
    from megatron_gspo.megatron.lora import Lora

    with mock.patch.object(Lora, "off", return_value=nullcontext()):
        yield


@contextmanager
def nothing_comes_out_of_a_recomputed_layer() -> Iterator[None]:
    from megatron_gspo.megatron import lora

    with mock.patch.object(lora, "_let_gradients_through", return_value=None):
        yield


@contextmanager
def weights_are_sent_without_adapters() -> Iterator[None]:
    from megatron_gspo.megatron.lora import Lora

    with mock.patch.object(Lora, "merged", lambda self, name, piece: piece):
        yield


FAULTS: dict[str, list[tuple[Any, str, str]]] = {
    "TP2": [
        (the_scale_is_left_out, "logprobs", "response"),
        (no_gradient_is_summed_over_tensor_ranks, "gradients", "lora_"),
        (every_rank_has_the_first_rows_of_b, "logprobs", "response"),
    ],
    "TP2+recompute": [
        (a_rank_keeps_its_own_heads_part_of_the_gradient, "gradients", "lora_A.weight"),
        (weights_are_sent_without_adapters, "parameters", "as sent"),
        (the_reference_has_the_adapters, "logprobs", "of the reference policy"),
    ],
    "TP2xETP2": [
        (expert_tensor_ranks_keep_their_own_gradients, "gradients", ".experts."),
        (the_norm_counts_what_expert_tensor_ranks_share_twice, "norm", "gradient norm"),
    ],
}


@pytest.mark.parametrize("layout", ["TP2", *(pytest.param(each, marks=SLOW) for each in ("TP2+recompute", "TP2xETP2"))])
def test_each_fault_of_adapters_is_named_where_it_is(tiny: Bench, layout: str) -> None:
    mine = FAULTS[layout]
    of_ranks = tiny.ranks.run(
        parse_layout(layout).ranks,
        steps_with,
        tiny.reference.case,
        parse_layout(layout),
        tiny.directory,
        [fault for fault, *_ in mine],
    )
    for (fault, column, where), parts in zip(mine, zip(*of_ranks, strict=True), strict=True):
        row = judge(Row(layout, len(parts)), parts, tiny.reference, 1e-10, 1e-6)
        assert row.verdict == "failed", fault.__name__
        assert row.columns[column].error > row.columns[column].tolerance, fault.__name__
        assert where in row.columns[column].where, (fault.__name__, row.columns[column].where)


@pytest.mark.slow_suite
def test_under_recompute_adapters_need_an_embedding_that_lets_gradients_through(tiny: Bench) -> None:
    row = tiny.row("TP1+recompute", nothing_comes_out_of_a_recomputed_layer)
    assert row.verdict == "failed"
    assert tiny.row("TP1+recompute").verdict == "held"


# -------------------------------------------------------------------------------------------------------- checkpoints


def second_step(
    case: Case, layout: Layout, directory: str, *, resumed: bool, run_dir: str = ""
) -> dict[str, torch.Tensor]:
    """What this rank owns of the adapters and of the weights after two steps: the second after the first and a save, or
    by a new policy that loads what was saved."""
    from megatron_gspo.megatron.checkpoint import load_checkpoint, save_checkpoint
    from megatron_gspo.parity import shards
    from megatron_gspo.runs.adapters import save_adapters
    from megatron_gspo.train import step as training
    from megatron_gspo.train.batch import place

    learner = build(case, layout)
    groups, policy = learner.groups, learner.policy
    samples = shards.routed_samples(case, policy.shape.routes)
    mine = samples[groups.data_rank :: groups.data_size] if groups.is_leader else []
    first, second = old_pass(case, learner, mine, place(mine, learner.config, groups), Part(0, 0, 0))

    def take(minibatch: Any, number: int) -> None:
        _, sums, _ = training.minibatch_gradients(learner, minibatch)
        training.take_step(learner, sums, STEPS[number])

    if resumed:
        load_checkpoint({"policy": policy}, Path(directory))
    else:
        take(first, 0)
        save_checkpoint({"policy": policy}, Path(directory), {})
    take(second, 1)
    if run_dir:
        train = learner.config.train.model_copy(update={"run_dir": run_dir})
        save_adapters(policy, learner.config.model_copy(update={"train": train}), groups)
    return dict(policy.trained_weights()) | dict(policy.weights())


def both_steps(bench: Bench, layout: str, directory: Path, *, resumed: bool, **changes: Any) -> dict[str, torch.Tensor]:
    case = replace(bench.reference.case, **{name: value for name, value in changes.items() if name != "run_dir"})
    parts = bench.ranks.run(
        parse_layout(layout).ranks,
        _second_step,
        (case, parse_layout(layout), str(directory)),
        {"resumed": resumed, "run_dir": changes.get("run_dir", "")},
    )
    return {name: tensor for part in parts for name, tensor in part.items()}


def _second_step(arguments: tuple[Any, ...], named: dict[str, Any]) -> dict[str, torch.Tensor]:
    return second_step(*arguments, **named)


@pytest.fixture(scope="module")
def saved(tiny: Bench, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path, dict[str, torch.Tensor]]:
    """A checkpoint of TP2xEP2 after the first step; where the adapters lie after the second; and what is there then."""
    directory, run = tmp_path_factory.mktemp("saved") / "checkpoint", tmp_path_factory.mktemp("run")
    return directory, run, both_steps(tiny, "TP2xEP2", directory, resumed=False, run_dir=str(run))


def largest_error(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> float:
    assert one.keys() == other.keys()
    return max(float((one[name] - other[name]).abs().max()) for name in one)


def test_a_resumed_step_is_the_same_to_the_last_bit(tiny: Bench, saved: Any) -> None:
    directory, _, expected = saved
    assert largest_error(both_steps(tiny, "TP2xEP2", directory, resumed=True), expected) == 0.0


def test_adapters_go_on_in_another_layout_with_experts_one_by_one(tiny: Bench, saved: Any) -> None:
    directory, _, expected = saved
    alone = both_steps(tiny, "PP2", directory, resumed=True, model={"logprob_chunk": 24, "kernels": "reference"})
    assert largest_error(alone, expected) < 1e-13


def test_a_checkpoint_holds_adapters_and_their_states_and_no_weight_of_the_model(tiny: Bench, saved: Any) -> None:
    from megatron_gspo.megatron.checkpoint_stream import DistributedReader

    directory, _, expected = saved
    reader = DistributedReader(directory)
    keys = reader.keys()
    assert all(key.startswith("lora.") or ".lora." in key for key in keys)
    per_layer = {f"lora.model.layers.1.mlp.experts.up_proj.lora_{part}.weight" for part in "AB"}
    assert per_layer <= keys and {f"optimizer.state.exp_avg.{key}" for key in per_layer} <= keys
    stored = sum(math.prod(reader.shape(key)) for key in keys if key.startswith("lora."))
    assert stored == sum(tensor.numel() for name, tensor in expected.items() if "lora_" in name)


def test_a_checkpoint_on_other_weights_is_refused(tiny: Bench, saved: Any, tmp_path: Path) -> None:
    directory, _, _ = saved
    other = tmp_path / "model"
    shutil.copytree(tiny.reference.case.path, other)
    tensors = load_file(other / "model.safetensors")
    tensors["model.norm.weight"] = tensors["model.norm.weight"] + 1
    save_file(tensors, other / "model.safetensors", {"format": "pt"})
    with pytest.raises(WeightError, match=r"adapters on other weights than .* has"):
        both_steps(tiny, "TP1", directory, resumed=True, path=str(other))


def test_adapters_of_another_rank_are_refused(tiny: Bench, saved: Any) -> None:
    directory, _, _ = saved
    with pytest.raises(WeightError, match="other adapters: rank 4 then, 2 now"):
        both_steps(tiny, "TP1", directory, resumed=True, lora={"rank": 2, "alpha": 3.0})


def test_a_policy_without_adapters_does_not_load_them(tiny: Bench, saved: Any) -> None:
    directory, _, _ = saved
    with pytest.raises(WeightError, match="holds adapters of rank 4 alone"):
        both_steps(tiny, "TP1", directory, resumed=True, lora={})


def test_adapters_are_saved_alone_in_pefts_layout(tiny: Bench, saved: Any) -> None:
    _, run, expected = saved
    stored = load_file(run / "adapter" / "adapter_model.safetensors")
    assert {path.name for path in (run / "adapter").iterdir()} == {"adapter_config.json", "adapter_model.safetensors"}
    trained = {f"base_model.model.{name}": tensor for name, tensor in expected.items() if "lora_" in name}
    assert largest_error(stored, trained) == 0.0
    settings = json.loads((run / "adapter" / "adapter_config.json").read_text())
    assert settings["target_modules"] == sorted(
        ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    )
    a, b = (stored[f"base_model.model.model.layers.2.mlp.experts.5.up_proj.lora_{part}.weight"] for part in "AB")
    base = load_weights(tiny.reference.case.path, "model.layers.2.mlp.experts.5.up_proj.weight")
    merged = base + settings["lora_alpha"] / settings["r"] * b @ a
    assert float((merged - expected["model.layers.2.mlp.experts.5.up_proj.weight"]).abs().max()) < 1e-15


def load_weights(path: str, name: str) -> torch.Tensor:
    from megatron_gspo.hf.checkpoint import HfReader

    return HfReader(path).read(name)
