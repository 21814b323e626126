"""Silent faults that users reported of Megatron-Core and of converters: none of them reaches a step of ours.

``docs/megatron-faults.md`` lists them, each with the test that holds it; many of those tests are elsewhere. What is
here: gradient norms that leave experts out, auxiliary losses that a checkpoint brings along, code that a step must not
enter, and experts that are sent in pieces. Each fault is also put in once, and must show.
"""

from __future__ import annotations

import inspect
import json
import pkgutil
import shutil
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from megatron_gspo.parity.models import make_model
from megatron_gspo.types import PackedBatch, Shard, TokenShard
from tests import oracle
from tests.distributed import steps
from tests.distributed.checks import norm_of
from tests.distributed.steps import LAYOUTS, Case
from tests.distributed.test_loss_faults import after_marking
from tests.pool import RankError, RankPool

pytestmark = pytest.mark.distributed

Make = Callable[[str], str]


@pytest.fixture(scope="module")
def make(tmp_path_factory: pytest.TempPathFactory) -> Make:
    """The directory of a tiny model of ``parity.models``, written once."""

    def once(name: str) -> str:
        path: Path = root / name
        return str(path if path.exists() else make_model(name, path, seed=0))

    root = tmp_path_factory.mktemp("reported")
    return once


def case_of(path: str, **settings: Any) -> Case:
    """Responses without old log-probabilities: for objectives that need none."""
    return Case(path, tuple(oracle.random_samples(seed=3)), (), **settings)


def sum_of_logprobs(index: int, logprobs_T: torch.Tensor, entropy_T: torch.Tensor) -> torch.Tensor:
    return logprobs_T.sum()


def differentiate(case: Case, parallel: dict[str, int]) -> Any:
    """A policy with the gradients of one pass over its data rank's samples."""
    policy, groups = steps.make_policy(case, parallel)
    plan = steps.filled_up(steps.uneven_plan(len(case.samples), groups.data_size), parallel)
    policy.gradients([steps.pack_samples(case, part, groups.shard) for part in plan[groups.data_rank]], sum_of_logprobs)
    return policy


# --------------------------------------------------------------------------------- gradient norms (Megatron-LM #5916)

FAMILIES = [
    "tiny-moe",
    "tiny-mixtral",
    "tiny-qwen2-moe",
    "tiny-olmoe",
    "tiny-deepseek-v3",
    "tiny-moonlight",
    "tiny-glm4-moe",
]
NORMS = {
    "tiny-moe": "TP2xDP2xEP2xETP2",
    "tiny-qwen2-moe": "TP2xEP2",
    "tiny-olmoe": "TP2xEP2",
    "tiny-deepseek-v3": "TP2xEP2",
    "tiny-glm4-moe": "TP2xEP2",
}
"""One a kind of parameter: the others' are among theirs. In float64 Qwen3-MoE is at every layout in test_policy."""


def norms(case: Case, parallel: dict[str, int], fault: Callable[[], Any] | None) -> tuple[float, list[np.ndarray]]:
    """The optimizer's norm, and the whole gradients that this rank owns."""
    with (fault or nullcontext)():
        policy = differentiate(case, parallel)
        gradients = [gradient.double().numpy() for _, gradient in policy.named_gradients()]
        return policy.step(0, 1)[0], gradients


def counted(ranks: RankPool, case: Case, layout: str, fault: Callable[[], Any] | None = None) -> tuple[float, float]:
    """(The norm that clipping divides by, the norm of every whole gradient, each once.)"""
    world, parallel = LAYOUTS[layout]
    parts = ranks.run(world, norms, case, parallel, fault)
    [norm] = {norm for norm, _ in parts}
    return norm, norm_of(gradient for _, gradients in parts for gradient in gradients)


def experts_have_megatrons_own_marks() -> Any:
    """What Megatron leaves on an expert whose weights it did not initialise: nothing that calls it a shard."""

    def change(parameter: Any, named: Any) -> None:
        if named.rule.is_expert:
            parameter.tensor_model_parallel = False

    return after_marking(change)


def megatron_asks_for_an_experts_own_group() -> bool:
    from megatron.core.tensor_parallel import param_is_not_tensor_parallel_duplicate

    return "expert_tp_group" in inspect.signature(param_is_not_tensor_parallel_duplicate).parameters


@pytest.mark.parametrize("name", NORMS)
def test_a_gradient_norm_counts_every_whole_gradient_once(ranks: RankPool, make: Make, name: str) -> None:
    """In bfloat16, where the optimizer's parameters are float32 copies that could have lost their marks."""
    norm, whole = counted(ranks, case_of(make(name), dtype="bfloat16"), NORMS[name])
    assert norm == pytest.approx(whole, rel=1e-5)


def test_experts_that_are_left_out_of_a_gradient_norm_show(ranks: RankPool, make: Make) -> None:
    """Whole experts are left out by a Megatron-Core that asks for the tensor rank of a dense weight (0.16.1), and cut
    ones by any."""
    [mended] = ranks.run(1, megatron_asks_for_an_experts_own_group)
    case = case_of(make("tiny-moe"), dtype="bfloat16")
    for layout, left_out in (("TP2xEP2", not mended), ("TP2xETP2", True)):
        norm, whole = counted(ranks, case, layout, experts_have_megatrons_own_marks)
        assert (norm < 0.99 * whole) is left_out, layout


# --------------------------------------------------------------- settings of a checkpoint (Megatron-LM #5694, #7452)

RATE = "moe_router_bias_update_rate"
SETTINGS = {
    "moe_router_load_balancing_type": "none",
    "moe_aux_loss_coeff": 0.0,
    "moe_z_loss_coeff": None,
    "moe_input_jitter_eps": None,
    "moe_expert_capacity_factor": None,
    "mtp_num_layers": None,
    "softmax_type": "vanilla",
    "calculate_per_token_loss": True,
    "distribute_saved_activations": False,
    "hidden_dropout": 0.0,
    "attention_dropout": 0.0,
}
"""Of every family, whatever its config.json says."""
ASKED_FOR = {"router_aux_loss_coef": 0.5, "aux_loss_alpha": 0.5, "seq_aux": True}
"""What model cards carry of auxiliary losses, louder."""
SIGMOID = ("tiny-deepseek-v3", "tiny-moonlight", "tiny-glm4-moe")
"""Have expert biases, which Megatron-Core would move by counts in which padding is."""


def megatron_settings(paths: list[str]) -> list[dict[str, Any]]:
    configs = [steps.make_policy(case_of(path), {})[0].chunks[0].config for path in paths]
    return [{name: getattr(config, name) for name in (*SETTINGS, RATE)} for config in configs]


def asking(path: str, directory: Path, **settings: Any) -> str:
    """A copy of a model whose config.json says more."""
    shutil.copytree(path, directory)
    config = json.loads((directory / "config.json").read_text())
    (directory / "config.json").write_text(json.dumps(config | settings))
    return str(directory)


def test_no_familys_checkpoint_can_ask_for_another_loss(ranks: RankPool, make: Make, tmp_path: Path) -> None:
    paths = [asking(make(name), tmp_path / name, **ASKED_FOR) for name in FAMILIES]
    [found] = ranks.run(1, megatron_settings, paths)
    for name, settings in zip(FAMILIES, found, strict=True):
        rate = settings.pop(RATE)
        assert settings == SETTINGS, name
        assert rate == 0.0 or name not in SIGMOID, name


@contextmanager
def the_auxiliary_loss_is_inherited() -> Iterator[None]:
    """What config.json says of an auxiliary loss is done, as in supervised pretraining."""
    from megatron_gspo.megatron import model

    settings = model._moe_settings

    def inherited(*args: Any) -> dict[str, object]:
        return settings(*args) | {"moe_router_load_balancing_type": "aux_loss", "moe_aux_loss_coeff": 0.001}

    with mock.patch.object(model, "_moe_settings", inherited):
        yield


@contextmanager
def and_not_refused() -> Iterator[None]:
    from megatron_gspo.megatron import replay

    with the_auxiliary_loss_is_inherited(), mock.patch.object(replay, "refuse_unreplayable", return_value=None):
        yield


def test_an_auxiliary_loss_in_config_json_changes_no_bit_of_a_step(ranks: RankPool, make: Make, tmp_path: Path) -> None:
    path = make("tiny-moe")
    quiet, loud = (asking(path, tmp_path / str(c), router_aux_loss_coef=c) for c in (0.0, 5.0))
    world, parallel = LAYOUTS["TP2xEP2"]
    first, second = (ranks.run(world, norms, case_of(directory), parallel, None) for directory in (quiet, loud))
    for (norm, gradients), (other_norm, others) in zip(first, second, strict=True):
        assert norm == other_norm
        assert all(np.array_equal(a, b) for a, b in zip(gradients, others, strict=True))


def test_an_inherited_auxiliary_loss_is_refused_and_would_show_in_the_norm(ranks: RankPool, make: Make) -> None:
    case = replace(steps.straddling_case(make("tiny-moe")), updates=1)
    with pytest.raises(RankError, match=r"moe_aux_loss_coeff = 0\.001"):
        steps.train(ranks, case, fault=the_auxiliary_loss_is_inherited)
    right, broken = (steps.train(ranks, case, fault=fault).grad_norms[0] for fault in (None, and_not_refused))
    assert broken > 1.01 * right, broken / right


# ------------------------------------------------------------------------ code that no step enters (Megatron-LM #7452)

TRAPS = {
    "the vocabulary of one rank's label smoothing; gathered logits taken for a shard": (
        ("megatron.core.models.common.language_module.language_module.LanguageModule", "compute_language_model_loss"),
        ("megatron.core.tensor_parallel.cross_entropy.VocabParallelCrossEntropy", "calculate_cross_entropy_loss"),
        ("megatron.core.fusions.fused_cross_entropy", "calculate_logits_max"),
    ),
    "prediction layers: counts of one rank, recompute over another tensor group": (
        ("megatron.core.transformer.multi_token_prediction.MultiTokenPredictionLayer", "__init__"),
        ("megatron.core.transformer.multi_token_prediction.MTPLossAutoScaler", "forward"),
        ("megatron.core.tensor_parallel.random", "gather_split_1d_tensor"),
    ),
    "queries and keys of cross attention from another tensor group": (
        ("megatron.core.transformer.attention.CrossAttention", "__init__"),
    ),
    "attention sinks without a mark": (
        ("megatron.core.transformer.dot_product_attention.DotProductAttention", "__init__"),
    ),
    "router counts with padding masks": (
        ("megatron.core.transformer.moe.router", "get_tokens_per_expert_and_token_count"),
        ("megatron.core.transformer.moe.router.TopKRouter", "attach_and_log_load_balancing_loss"),
    ),
}
"""What is wrong -> (module or class, name) of the code in which it is wrong."""
LLAVA = "megatron.core.models.multimodal.llava_model"
SEES_IT = ("megatron.core.transformer.moe.router.TopKRouter", "routing")
"""What every step does enter."""


@contextmanager
def trapped(traps: list[tuple[str, str]]) -> Iterator[None]:
    """Within it the named code raises; a name that this Megatron-Core lacks does too, at once."""

    def raising(where: str) -> Callable[..., Any]:
        def trap(*args: Any, **kwargs: Any) -> Any:
            raise AssertionError(f"a step entered {where}")

        return trap

    with ExitStack() as stack:
        for owner, name in traps:
            stack.enter_context(mock.patch.object(pkgutil.resolve_name(owner), name, raising(f"{owner}.{name}")))
        yield


def step_past(traps: list[tuple[str, str]], case: Case, parallel: dict[str, int]) -> tuple[set[str], bool]:
    """Takes a step; the packages that the model's modules are of, and whether a multimodal model was imported."""
    from megatron.core.transformer.moe.router import TopKRouter

    forward, masks = TopKRouter.forward, []

    def noting(self: Any, hidden: torch.Tensor, padding_mask: Any = None, *args: Any, **kwargs: Any) -> Any:
        masks.append(padding_mask)
        return forward(self, hidden, padding_mask, *args, **kwargs)

    with trapped(traps), mock.patch.object(TopKRouter, "forward", noting):
        policy = differentiate(case, parallel)
        policy.step(0, 1)
    assert masks and all(mask is None for mask in masks), "a router was handed a padding mask"
    built = {type(module).__module__ for chunk in policy.chunks for module in chunk.modules()}
    packages = {name if ".extensions." in name else name.split(".")[0] for name in built}
    return packages, LLAVA in sys.modules


def test_a_step_enters_none_of_the_code_that_was_reported(ranks: RankPool, make: Make) -> None:
    traps = [trap for places in TRAPS.values() for trap in places]
    for name, layout in (("tiny-moe", "TP2xCP2xEP2"), ("tiny-glm4-moe", "TP2xPP2xEP2")):
        world, parallel = LAYOUTS[layout]
        case = case_of(make(name), recompute="full")
        for packages, multimodal in ranks.run(world, step_past, traps, case, parallel):
            assert packages <= {"megatron", "megatron_gspo", "torch"}
            assert not multimodal


def test_a_trap_springs(ranks: RankPool, make: Make) -> None:
    with pytest.raises(RankError, match=r"a step entered .*TopKRouter\.routing"):
        ranks.run(1, step_past, [SEES_IT], case_of(make("tiny-moe")), {})


def same_groups(parallel: dict[str, int]) -> dict[str, bool]:
    """By field of what Megatron is handed: whether it is the group that its global state has."""
    from megatron.core import parallel_state
    from megatron.core.process_groups_config import ProcessGroupCollection

    from megatron_gspo import config
    from megatron_gspo.megatron.groups import make_groups

    settings = config.parse(
        {"model": {"path": "unused"}, "data": {"path": "unused"}, "train": {"run_dir": "nowhere"}, "parallel": parallel}
    )
    handed = make_groups(settings.parallel).megatron
    theirs = ProcessGroupCollection.use_mpu_process_groups()
    assert handed.tp is parallel_state.get_tensor_model_parallel_group()
    assert handed.cp is parallel_state.get_context_parallel_group()
    assert handed.expt_tp is parallel_state.get_expert_tensor_parallel_group()
    fields = [name for name in vars(theirs) if isinstance(getattr(theirs, name), torch.distributed.ProcessGroup)]
    return {name: getattr(handed, name) is getattr(theirs, name) for name in fields}


def test_megatrons_own_groups_are_the_ones_that_it_is_handed(ranks: RankPool) -> None:
    """Four of the reported faults are of code that asks the global state where it was handed another group."""
    world, parallel = LAYOUTS["TP2xCP2xEP2"]
    for fields in ranks.run(world, same_groups, parallel):
        assert {"tp", "cp", "pp", "ep", "expt_tp", "dp_cp", "tp_cp", "tp_ep"} <= fields.keys()
        assert all(fields.values())


@contextmanager
def context_ranks_normalise_by_themselves() -> Iterator[None]:
    """Each divides its part of a micro-batch's loss by its own response tokens, and what comes of it is averaged."""
    right = steps.with_old_logprobs

    def divided(case: Case, batch: PackedBatch, place: Shard) -> TokenShard:
        shard = right(case, batch, place)
        own, whole = int(shard.mask_T.sum()), int(batch.mask_T.sum())
        return shard.replace(weights_S=shard.weights_S * (whole / max(own, 1) / place.context_size))

    with mock.patch.object(steps, "with_old_logprobs", divided):
        yield


def test_a_loss_that_context_ranks_normalise_by_themselves_shows(ranks: RankPool, make: Make) -> None:
    case = steps.straddling_case(make("tiny-moe"))
    right, broken = (steps.train(ranks, case, "CP2", fault=f) for f in (None, context_ranks_normalise_by_themselves))
    assert steps.worst(broken.gradients, right.gradients)[0] > 0.1


# ------------------------------------------------------------------------------------- padding and the routers' counts


def load(case: Case, parallel: dict[str, int]) -> tuple[int, np.ndarray]:
    policy = differentiate(case, parallel)
    return policy.groups.tensor_data.rank(), policy.expert_load.stop().numpy()


def test_padding_and_dummies_are_in_no_count_of_a_router(ranks: RankPool, make: Make) -> None:
    """Micro-batches filled up for tensor and context ranks and to a multiple, and a dummy on the last data rank."""
    case = case_of(make("tiny-moe"))
    [(_, plain)] = ranks.run(1, load, case, {})
    tokens = sum(sample.length for sample in case.samples)
    assert plain.sum(axis=1).tolist() == [2 * tokens] * 3
    for layout in ("DP2", "TP2xCP2"):
        world, parallel = LAYOUTS[layout]
        padded = ranks.run(world, load, replace(case, pad_to=32), parallel)
        assert np.array_equal(sum(counts for _, counts in padded), plain), layout


# ------------------------------------------------------------------------ experts that are sent in pieces (slime #2280)


@contextmanager
def experts_are_sent_as_they_lie() -> Iterator[None]:
    """Pieces of an expert are not gathered over expert-tensor ranks."""
    from megatron_gspo.megatron import export

    with mock.patch.object(export, "gather_pieces", lambda piece, group: [piece]):
        yield


def sent(path: str, parallel: dict[str, int], fault: Callable[[], Any] | None) -> dict[str, torch.Tensor]:
    with (fault or nullcontext)():
        return dict(steps.make_policy(case_of(path), parallel)[0].weights())


@pytest.mark.parametrize("layout", ["TP2xETP2", "DP2xETP2"])
def test_experts_that_are_cut_over_ranks_are_sent_whole(ranks: RankPool, make: Make, layout: str) -> None:
    path = make("tiny-moe")
    stored, (world, parallel) = load_file(Path(path) / "model.safetensors"), LAYOUTS[layout]
    parts = ranks.run(world, sent, path, parallel, None)
    assert sorted(name for part in parts for name in part) == sorted(stored), "each once, none more"
    assert all(torch.equal(tensor, stored[name]) for part in parts for name, tensor in part.items())


def test_experts_that_are_sent_in_pieces_show(ranks: RankPool, make: Make) -> None:
    path = make("tiny-moe")
    stored, (world, parallel) = load_file(Path(path) / "model.safetensors"), LAYOUTS["DP2xETP2"]
    parts = ranks.run(world, sent, path, parallel, experts_are_sent_as_they_lie)
    wrong = {name for part in parts for name, tensor in part.items() if tensor.shape != stored[name].shape}
    assert wrong == {name for name in stored if ".experts." in name}
