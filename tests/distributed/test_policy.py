"""The Megatron policy computes, on every layout, the step that transformers and a naive loss compute in one process.

All in float64, where a wrong reduction cannot hide in rounding. With Megatron's float32 router softmax taken out
(``steps.exact_router``), what is left between the two is 1e-14; the tolerances below are about a hundred times what
was measured.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from tests import oracle
from tests.distributed import steps
from tests.distributed.checks import MOVED, NORM, assert_same_step, norm_of
from tests.distributed.steps import LAYOUTS, Case, Step
from tests.pool import RankPool

pytestmark = pytest.mark.distributed


@pytest.fixture(scope="module")
def moe_dir(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(oracle.make_tiny_qwen3_moe(tmp_path_factory.mktemp("moe")))


@pytest.fixture(scope="module")
def case(moe_dir: str) -> Case:
    return steps.straddling_case(moe_dir)


@pytest.fixture(scope="module")
def expected(case: Case) -> Step:
    return steps.expected_step(case)


@pytest.fixture(scope="module")
def one_rank(ranks: RankPool, case: Case) -> Step:
    step = steps.train(ranks, replace(case, updates=2))
    assert step.grad_norms[1] > 0.1 * step.grad_norms[0], "the second update has next to no gradient"
    return step


# ------------------------------------------------------------------------------------------ layouts, mixture of experts


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_gspo_step_is_that_of_one_process(
    ranks: RankPool, case: Case, expected: Step, one_rank: Step, layout: str
) -> None:
    assert_sums_over_ranks_matter(case, expected, layout)
    step = steps.train(ranks, replace(case, updates=2), layout)
    assert_same_step(step, expected)
    assert step.grad_norms == pytest.approx(one_rank.grad_norms, rel=NORM)
    error, where = steps.worst(step.moved, one_rank.moved)
    assert error < MOVED, f"two updates moved {where} by {error:.1e} more or less"


def assert_sums_over_ranks_matter(case: Case, expected: Step, layout: str) -> None:
    """On each axis that cuts tokens, an unclipped response lies on more than one rank."""
    sizes = [LAYOUTS[layout][1].get(axis, 1) for axis in ("tensor", "context")]
    homes = steps.ranks_of_responses(case, steps.uneven_plan(12, steps.data_size(layout)), *sizes)
    unclipped = [ranks for key, ranks in homes.items() if not expected.clipped[key]]
    for size, rank in zip(sizes, ("tensor_rank", "context_rank"), strict=True):
        assert max(len({getattr(home, rank) for home in ranks}) for ranks in unclipped) == size


@pytest.mark.parametrize("layout", ["TP1", "TP2xPP2xEP2"])
def test_an_update_is_adamw_on_clipped_gradients_with_norms_exempt_from_decay(
    ranks: RankPool, case: Case, expected: Step, layout: str
) -> None:
    settings = case.optimizer
    step = steps.train(ranks, replace(case, updates=1), layout)
    factor = settings["clip_grad"] / norm_of(expected.gradients.values())
    assert factor < 0.5, "gradients are hardly scaled"
    moved = {}
    for name, weight in stored(case.path).items():
        gradient = expected.gradients[name] * factor
        decay = settings["weight_decay"] * weight.numpy() if weight.ndim > 1 else 0.0
        # Adam's first step: both moments, without their bias, are the gradient and its square.
        moved[name] = -settings["lr"] * (gradient / (np.abs(gradient) + 1e-8) + decay)
    error, where = steps.worst(step.moved, moved)
    assert error < MOVED, f"{where} is off by {error:.1e}"


def test_megatrons_own_float32_router_costs_less_than_1e_5(ranks: RankPool, moe_dir: str) -> None:
    case = steps.straddling_case(moe_dir, exact=False)
    expected, step = steps.expected_step(case), steps.train(ranks, case, "TP2xEP2")
    assert 1e-9 < steps.worst(step.logprobs, expected.logprobs)[0] < 1e-6
    assert steps.worst(step.gradients, expected.gradients)[0] < 1e-5


# ----------------------------------------------------------------------------- micro-batches, padding, order, recompute


def split(order: Sequence[int], microbatches: int) -> list[list[list[int]]]:
    return [[part.tolist() for part in np.array_split(np.array(order), microbatches)]]


PLANS = {
    "one micro-batch": split(range(12), 1),
    "two": split(range(12), 2),
    "four": split(range(12), 4),
    "twelve, of one sequence each": split(range(12), 12),
    "another order": split([5, 11, 0, 7, 2, 9, 4, 1, 10, 3, 8, 6], 2),
    "dummies before, between and after": [[[], [3, 1, 4, 0, 2], [], [11, 5, 6, 7, 8, 9, 10], []]],
}


@pytest.mark.parametrize("layout", ["TP1", "CP2", "TP2xPP2xEP2", "PP2xVPP2"])
@pytest.mark.parametrize("plan", PLANS)
def test_splitting_and_packing_cannot_change_a_step(
    ranks: RankPool, case: Case, expected: Step, layout: str, plan: str
) -> None:
    assert_same_step(steps.train(ranks, case, layout, plan=PLANS[plan]), expected)


@pytest.mark.parametrize("pad_to", [16, 96])
@pytest.mark.parametrize("layout", ["TP1", "CP2", "TP2xPP2xEP2"])
def test_a_padding_tail_cannot_change_a_step(
    ranks: RankPool, case: Case, expected: Step, layout: str, pad_to: int
) -> None:
    assert_same_step(steps.train(ranks, replace(case, pad_to=pad_to), layout), expected)


def test_a_rank_without_any_response_still_takes_part(ranks: RankPool, case: Case, expected: Step) -> None:
    plan = [split(range(12), 3)[0], [[], [], []]]
    assert_same_step(steps.train(ranks, case, "DP2", plan=plan), expected)
    assert_same_step(steps.train(ranks, case, "EP2", plan=plan[::-1]), expected)


@pytest.mark.parametrize("chunk", [1, 7, 10_000])
def test_the_logprob_chunk_cannot_change_a_step(ranks: RankPool, case: Case, expected: Step, chunk: int) -> None:
    assert_same_step(steps.train(ranks, replace(case, chunk=chunk), "TP2xPP2xEP2"), expected)


# --------------------------------------------------------------------------------------------------------------- pi_old


def old_and_new_logprobs(case: Case, parallel: dict[str, int], plan: steps.Plan) -> list[tuple[bool, int]]:
    """Of each micro-batch on the last stage: whether the pi_old pass equals training's forward, and its tokens."""
    policy, groups = steps.make_policy(case, parallel)
    batches = [steps.pack_samples(case, part, groups.shard) for part in plan[groups.data_rank]]
    old = policy.logprobs(batches)
    equal = []

    def objective(index: int, logprobs_T: torch.Tensor, entropy_T: torch.Tensor) -> torch.Tensor:
        same = torch.equal(old[index][0], logprobs_T.detach()) and torch.equal(old[index][1], entropy_T)
        equal.append((same and not old[index][0].requires_grad, logprobs_T.numel()))
        return logprobs_T.sum()

    policy.gradients(batches, objective)
    assert len(old) == len(equal)
    return equal


@pytest.mark.parametrize("dtype", ["float64", "float32", "bfloat16"])
@pytest.mark.parametrize("layout", ["TP1", "DP2", "TP2xCP2", "TP2xPP2xEP2", "PP2xVPP2"])
def test_the_pi_old_pass_is_bitwise_the_first_training_forward(
    ranks: RankPool, case: Case, layout: str, dtype: str
) -> None:
    case = replace(case, dtype=dtype, recompute="full" if dtype == "float32" else "off")
    world, parallel = LAYOUTS[layout]
    plan = steps.filled_up(steps.uneven_plan(12, steps.data_size(layout)), parallel)
    results = ranks.run(world, old_and_new_logprobs, case, parallel, plan)
    compared = [entry for result in results for entry in result]
    assert sum(tokens for _, tokens in compared) >= sum(sample.length for sample in case.samples)
    assert all(equal for equal, _ in compared)


def test_a_pass_without_gradient_adds_up_the_weights_of_many_experts_in_trainings_order(
    ranks: RankPool, tmp_path: Path
) -> None:
    """The pi_old pass, and the first pass under recompute. Of five experts a token: two weights add up the same either
    way. (Megatron-Core 0.19.2 sorts them in training only.)"""
    path = str(oracle.make_tiny_qwen3_moe(tmp_path, experts=16, top_k=5))
    case = replace(steps.straddling_case(path), dtype="float32")
    (results,) = ranks.run(1, old_and_new_logprobs, case, {}, steps.uneven_plan(len(case.samples), 1))
    assert results and all(equal for equal, _ in results)
    off, full = (steps.train(ranks, replace(case, recompute=recompute)).gradients for recompute in ("off", "full"))
    assert all(np.array_equal(off[name], full[name]) for name in off)


# --------------------------------------------------------------------------------------------------------- other shapes


@pytest.mark.parametrize("tie", [False, True], ids=["untied", "tied"])
def test_a_dense_qwen3_step_is_that_of_one_process(ranks: RankPool, tmp_path: Path, tie: bool) -> None:
    case = steps.straddling_case(str(oracle.make_tiny_qwen3(tmp_path, tie=tie)), updates=2)
    expected, one_rank = steps.expected_step(case), steps.train(ranks, case)
    assert ("lm_head.weight" in expected.gradients) is not tie
    assert_same_step(one_rank, expected)
    assert one_rank.grad_norms[1] > 0.1 * one_rank.grad_norms[0], "the second update has next to no gradient"
    for layout in ("TP2", "PP2", "TP2xPP2", "PP4"):
        step = steps.train(ranks, case, layout)
        assert_same_step(step, expected)
        # The second update sees whether the first and the last stage moved a tied matrix alike.
        assert step.grad_norms == pytest.approx(one_rank.grad_norms, rel=NORM), layout
        assert steps.worst(step.moved, one_rank.moved)[0] < MOVED, layout


SHAPES: dict[str, dict[str, Any]] = {
    "dense layers between": {"mlp_only_layers": [0], "decoder_sparse_step": 2},
    "a stage without experts": {"mlp_only_layers": [0, 1]},
    "probabilities as they are": {"norm_topk_prob": False},
    "tied embeddings": {"tie": True},
    "one expert a token": {"experts": 4, "top_k": 1, "norm_topk_prob": False},
    "one key-value head a query head": {"num_key_value_heads": 4},
}


@pytest.mark.parametrize("shape", SHAPES)
def test_every_shape_of_the_family_is_computed(ranks: RankPool, tmp_path: Path, shape: str) -> None:
    case = steps.straddling_case(str(oracle.make_tiny_qwen3_moe(tmp_path, **SHAPES[shape])), updates=1)
    expected = steps.expected_step(case)
    for layout in ("TP1", "PP2", "TP2xPP2xEP2"):
        assert_same_step(steps.train(ranks, case, layout), expected)


LOSSES: dict[str, dict[str, Any]] = {
    "grpo": {"loss": "grpo"},
    "ppo, an advantage a token": {"loss": "ppo", "per_token": True},
    "gspo-token": {"loss": "gspo-token"},
    "gspo-token, an advantage a token": {"loss": "gspo-token", "per_token": True},
    "gspo with a KL": {"kl": 0.3},
    "grpo with a KL": {"loss": "grpo", "kl": 0.3},
}


@pytest.mark.parametrize("loss", LOSSES)
def test_every_loss_gives_the_step_of_one_process(ranks: RankPool, moe_dir: str, loss: str) -> None:
    case = steps.straddling_case(moe_dir, **LOSSES[loss])
    expected = steps.expected_step(case)
    for layout in ("TP1", "CP2xEP2", "TP2xPP2xEP2"):
        assert_same_step(steps.train(ranks, case, layout), expected)


def logprobs_with_padding_row(case: Case, parallel: dict[str, int], value: float) -> list[np.ndarray]:
    """Log-probabilities after the vocabulary's padding rows, on the last tensor rank, are set to ``value``."""
    policy, groups = steps.make_policy(case, parallel)
    padding = policy.chunks[-1].output_layer.weight.shape[0] * groups.tensor.size() - policy.shape.vocab_size
    assert padding == 1
    if groups.tensor.rank() == groups.tensor.size() - 1:
        policy.chunks[-1].output_layer.weight.data[-padding:] = value
    batch = steps.pack_samples(case, range(len(case.samples)), groups.shard)
    return [values.numpy() for pair in policy.logprobs([batch]) for values in pair]


def test_a_padding_row_of_the_vocabulary_takes_no_probability(ranks: RankPool, case: Case) -> None:
    world, parallel = LAYOUTS["TP2"]
    plain, loud = (ranks.run(world, logprobs_with_padding_row, case, parallel, value) for value in (0.0, 1e3))
    for a, b in zip(plain, loud, strict=True):
        assert all(np.array_equal(x, y) for x, y in zip(a, b, strict=True))


# -------------------------------------------------------------------------------------------------------------- weights


def exported(path: str, dtype: str, parallel: dict[str, int]) -> dict[str, tuple[str, tuple[int, ...], bytes]]:
    """What the model was before it is zeroed: copies keep it, and views are read before."""
    policy, _ = steps.make_policy(Case(path, (), (), dtype=dtype), parallel)
    views = {name: fingerprint(tensor) for name, tensor in policy.weights(copies=False)}
    copies = dict(policy.weights())
    for chunk in policy.chunks:
        for parameter in chunk.parameters():
            parameter.data.zero_()
    kept = {name: fingerprint(tensor) for name, tensor in copies.items()}
    assert kept == views
    return kept


def fingerprint(tensor: torch.Tensor) -> tuple[str, tuple[int, ...], bytes]:
    return str(tensor.dtype), tuple(tensor.shape), tensor.contiguous().view(torch.uint8).numpy().tobytes()


def stored(path: str | Path) -> dict[str, torch.Tensor]:
    return load_file(Path(path) / "model.safetensors")


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("maker", ["mixture", "tied dense"])
def test_loading_and_exporting_gives_the_files_bytes_back(
    ranks: RankPool, tmp_path: Path, dtype: str, maker: str
) -> None:
    if maker == "mixture":
        path = str(oracle.make_tiny_qwen3_moe(tmp_path, dtype=getattr(torch, dtype), mlp_only_layers=[1]))
    else:
        path = str(oracle.make_tiny_qwen3(tmp_path, dtype=getattr(torch, dtype), tie=True))
    expected = {name: fingerprint(tensor) for name, tensor in stored(path).items()}
    layouts = ["TP1", "TP2", "TP2xPP2", "DP2"]
    if (maker, dtype) == ("mixture", "float32"):  # every axis, and experts over each of the others
        layouts += ["PP4", "EP2", "CP2", "TP2xDP2xEP4", "TP2xCP2xEP2", "CP2xDP2xEP4", "TP2xPP2xDP2xEP2"]
    for layout in layouts:
        world, parallel = LAYOUTS[layout]
        parts = ranks.run(world, exported, path, dtype, parallel)
        assert sum(len(part) for part in parts) == len(expected), f"{layout}: a tensor has no owner, or two"
        assert {name: value for part in parts for name, value in part.items()} == expected, layout


# ------------------------------------------------------------------------------------------- a reference, and metrics


@pytest.mark.parametrize("layout", ["CP2xDP2", "TP2xPP2xEP2"])
def test_a_step_with_a_reference_and_its_metrics_are_those_of_one_process(
    ranks: RankPool, moe_dir: str, layout: str
) -> None:
    """``kl/ref_*`` in float64 from the oracle's logprobs; every other metric as one rank has it."""
    case = steps.straddling_case(moe_dir, kl=0.1)
    expected, one = steps.expected_step(case), steps.train(ranks, case)
    step = steps.train(ranks, case, layout)
    assert_same_step(step, expected)
    assert case.ref is not None
    keys = [(s.group, s.sample) for s in case.samples]
    log_r = np.concatenate([ref - expected.logprobs[key] for key, ref in zip(keys, case.ref, strict=True)])
    formulas = {"kl/ref_k1": np.mean(-log_r), "kl/ref_k3": np.mean(np.exp(log_r) - 1 - log_r)}
    assert formulas["kl/ref_k3"] > 1e-3
    for name, value in formulas.items():
        assert step.metrics[name] == pytest.approx(value, abs=1e-11), name
    assert step.metrics == {name: pytest.approx(value, rel=1e-9, abs=1e-11) for name, value in one.metrics.items()}


# ------------------------------------------------------------------------------------------------------------- refusals


def refusal(path: str, parallel: dict[str, int]) -> tuple[str, str]:
    torch.distributed.barrier()  # a rank that leaves before its peers have joined would break their joining
    try:
        steps.make_policy(Case(path, (), ()), parallel)
    except Exception as error:
        return type(error).__name__, str(error)
    return "", "accepted"


@pytest.mark.parametrize(
    ("world", "parallel", "message"),
    [
        (3, {"tensor": 3}, "4 attention heads / parallel.tensor 3 = 1.33333"),
        (4, {"tensor": 4}, "2 key-value heads / parallel.tensor 4 = 0.5"),
        (3, {"context": 2}, "tensor 1 x pipeline 1 x context 2 x data 1 = 2 ranks, but the world has 3"),
        (5, {"pipeline": 5}, "4 layers over pipeline 5 x virtual_pipeline 1 = 5 stages leave some without a layer"),
        (2, {"pipeline": 2, "stage_layers": [2, 3]}, "2 + 3 = 5, but the model has 4 layers"),
        (5, {"expert_tensor": 5}, "24 rows of an expert / parallel.expert_tensor 5 = 4.8"),
        (3, {"expert": 3}, "8 experts / parallel.expert 3 = 2.66667"),
        (3, {"tensor": 2}, "tensor 2 x pipeline 1 x context 1 x data 1 = 2 ranks, but the world has 3"),
        (2, {"expert": 4}, "expert 4 x expert_tensor 1 = 4 does not divide tensor 1 x context 1 x data 2 = 2"),
    ],
)
def test_a_layout_that_does_not_divide_is_refused_with_the_division(
    ranks: RankPool, moe_dir: str, world: int, parallel: dict[str, int], message: str
) -> None:
    for kind, text in ranks.run(world, refusal, moe_dir, parallel):
        assert kind == "LayoutError"
        assert message in text


def test_experts_over_ranks_are_refused_for_a_dense_model(ranks: RankPool, tmp_path: Path) -> None:
    path = str(oracle.make_tiny_qwen3(tmp_path))
    for axis in ("expert", "expert_tensor"):
        for kind, text in ranks.run(2, refusal, path, {axis: 2}):
            assert (kind, text) == ("LayoutError", f"parallel.{axis} = 2, but Qwen3ForCausalLM has no experts")


def test_a_tensor_that_is_missing_or_misshapen_is_named(ranks: RankPool, moe_dir: str, tmp_path: Path) -> None:
    name = "model.layers.2.mlp.experts.5.up_proj.weight"
    (tmp_path / "config.json").write_bytes((Path(moe_dir) / "config.json").read_bytes())
    tensors = stored(moe_dir)
    for wrong in (None, tensors[name][:-1], tensors[name][:, :-1], tensors[name].flatten()):
        save_file(
            {key: value.clone() for key, value in tensors.items() if key != name}
            | ({} if wrong is None else {name: wrong.clone()}),
            tmp_path / "model.safetensors",
        )
        [(kind, text)] = ranks.run(1, refusal, str(tmp_path), {})
        assert kind == "WeightError", text
        assert name in text and str(tmp_path) in text
