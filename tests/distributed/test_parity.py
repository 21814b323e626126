"""``megatron-gspo parity``: right layouts hold at rounding, and each fault that trainers ship is named where it is."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any
from unittest import mock

import pytest
import torch

from megatron_gspo.cli import main
from megatron_gspo.parity.check import Settings, compare_layout, compare_transformers, make_reference
from megatron_gspo.parity.layouts import parse_layout
from megatron_gspo.parity.ranks import LocalRanks
from megatron_gspo.parity.reference import Reference
from megatron_gspo.parity.verdict import COLUMNS, Row

pytestmark = pytest.mark.distributed


@dataclass(frozen=True)
class Bench:
    """A reference, and where its files are."""

    reference: Reference
    ranks: LocalRanks
    directory: str

    def row(self, layout: str, fault: Callable[[], Any] | None = None, tolerance: float = 1e-10) -> Row:
        arguments = (parse_layout(layout), self.reference, self.ranks, self.directory)
        return compare_layout(*arguments, tolerance=tolerance, fault=fault)


def bench(directory: Any, **settings: Any) -> Bench:
    ranks = LocalRanks()
    return Bench(make_reference(Settings(layouts=[], **settings), ranks, str(directory)), ranks, str(directory))


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Bench:
    return bench(tmp_path_factory.mktemp("parity"))


# ----------------------------------------------------------------------------------------------------- what is right


@pytest.mark.parametrize("layout", ["TP1", "PP2", "TP2xPP2xEP2", "TP2xDP2xEP2+recompute"])
def test_a_right_layout_holds_at_the_rounding_of_float64(tiny: Bench, layout: str) -> None:
    row = tiny.row(layout)
    assert (row.verdict, row.reason) == ("held", "")
    assert set(row.columns) == set(COLUMNS)
    for name in set(COLUMNS) - {"norm"}:
        assert row.columns[name].error < 1e-13, name
    assert row.columns["gradients"].error > 0.0, "two computations in another order agree to the last bit"
    assert row.columns["norm"].error < 1e-6  # Megatron's norm is float32's
    assert (row.straddling > 0) == ("TP2" in layout)


def test_the_reference_is_transformers_to_its_float32_roundings(tiny: Bench) -> None:
    row = compare_transformers(tiny.reference, tiny.ranks, tiny.directory)
    assert row.verdict == "held"
    assert 1e-9 < row.columns["logprobs"].error < 5e-6
    assert 1e-9 < row.columns["gradients"].error < 1e-5


def test_in_float32_an_update_is_that_of_sgd_and_holds_at_1e_5(tmp_path: Any) -> None:
    float32 = bench(tmp_path, dtype="float32", loss="gspo-token", model="idle-expert")
    row = float32.row("TP2xEP2", tolerance=1e-5)
    assert (row.verdict, row.reason) == ("held", "")
    assert 1e-8 < row.columns["gradients"].error < 1e-5
    starved = {name for name in float32.reference.idle if ".experts." in name}
    assert {name.split(".experts.")[1].split(".")[0] for name in starved} == {"0"}
    assert len(starved) == 3 * 3, "expert 0 of three layers, three matrices each"


def test_in_bfloat16_responses_that_a_near_tie_routes_otherwise_are_named_and_leave_the_gradients(
    tmp_path: Any,
) -> None:
    bfloat16 = bench(tmp_path, dtype="bfloat16")
    row = bfloat16.row("TP2", tolerance=0.1)
    assert (row.verdict, row.reason) == ("held", "")
    assert row.near_ties and not row.route_flips
    assert 1e-3 < row.columns["gradients"].error < 0.1, "with such responses in the loss it is 0.7"


def test_a_layout_that_the_model_does_not_divide_over_is_refused_and_does_not_hold(tiny: Bench) -> None:
    row = tiny.row("TP3")
    assert row.verdict == "refused"
    assert "8 attention heads / parallel.tensor 3" in row.reason
    assert not row.columns


# ------------------------------------------------------------------------ faults; each is entered by every layout rank


@contextmanager
def losses_are_doubled() -> Iterator[None]:
    """A factor that belongs to a layout (of context or data ranks) stays in what is differentiated."""
    from megatron_gspo.parity import step

    objective = step.policy_objective

    def doubled(*args: Any, **kwargs: Any) -> Any:
        output = objective(*args, **kwargs)
        return replace(output, loss=2 * output.loss)

    with mock.patch.object(step, "policy_objective", doubled):
        yield


@contextmanager
def gradients_are_averaged_over_data_ranks() -> Iterator[None]:
    from megatron_gspo.policy import optimizer

    ddp = optimizer.DistributedDataParallel

    def build(config: Any, *args: Any, **kwargs: Any) -> Any:
        with mock.patch.object(config, "calculate_per_token_loss", False):
            return ddp(config, *args, **kwargs)

    with mock.patch.object(optimizer, "DistributedDataParallel", build):
        yield


@contextmanager
def input_norms_are_not_all_reduced() -> Iterator[None]:
    """Each tensor rank keeps the part of a replicated norm's gradient that its own tokens gave."""
    from megatron_gspo.policy import model

    mark = model._mark_parameters

    def unmark(policy: Any, family: Any) -> None:
        mark(policy, family)
        for parameter, named in policy.rules(family):
            if "input_layernorm" in named.rule.megatron:
                parameter.sequence_parallel = False

    with mock.patch.object(model, "_mark_parameters", unmark):
        yield


@contextmanager
def an_expert_is_dropped() -> Iterator[None]:
    """Expert 3 of the last layer gives nothing."""
    from megatron_gspo.policy import policy

    load = policy.load_weights

    def drop(model: Any, family: Any, reader: Any) -> None:
        load(model, family, reader)
        for parameter, named in model.rules(family):
            if "model.layers.3.mlp.experts.3.down_proj.weight" in named.hf_names:
                parameter.data.zero_()

    with mock.patch.object(policy, "load_weights", drop):
        yield


@contextmanager
def masks_are_shifted() -> Iterator[None]:
    """The response's own positions instead of those that predict it."""
    from megatron_gspo.parity import shards

    pack = shards.pack

    def shifted(*args: Any) -> Any:
        batch = pack(*args)
        return replace(batch, mask_T=batch.mask_T.roll(1))

    with mock.patch.object(shards, "pack", shifted):
        yield


@contextmanager
def token_slices_begin_one_late() -> Iterator[None]:
    from megatron_gspo.algorithm import packing

    shard_tokens = packing.shard_tokens

    def late(batch: Any, *place: Any) -> Any:
        fields = ("labels_T", "mask_T", "sequence_T", "rollout_logprobs_T", "advantages_T")
        return shard_tokens(replace(batch, **{name: getattr(batch, name).roll(-1) for name in fields}), *place)

    with mock.patch.object(packing, "shard_tokens", late):
        yield


@contextmanager
def the_clip_range_is_wider() -> Iterator[None]:
    from megatron_gspo.parity import step

    objective = step.policy_objective

    def wider(*args: Any, **kwargs: Any) -> Any:
        return objective(*args, **kwargs | {"clip_high": 10 * kwargs["clip_high"]})

    with mock.patch.object(step, "policy_objective", wider):
        yield


@contextmanager
def norms_decay() -> Iterator[None]:
    """Weight decay on norms, from which Megatron exempts them only where its own scheduler runs."""
    from megatron_gspo.policy.optimizer import Optimizer

    step = Optimizer.step

    def decaying(self: Any, lr: float) -> float:
        for group in self.megatron.param_groups:
            group["wd_mult"] = 1.0
        return step(self, lr)

    with mock.patch.object(Optimizer, "step", decaying):
        yield


@contextmanager
def shards_are_unmarked() -> Iterator[None]:
    """The norm counts a tensor-parallel parameter on tensor rank 0 only."""
    from megatron_gspo.policy import model

    mark = model._mark_parameters

    def unmark(policy: Any, family: Any) -> None:
        mark(policy, family)
        for parameter, _ in policy.rules(family):
            if hasattr(parameter, "tensor_model_parallel"):
                parameter.tensor_model_parallel = False

    with mock.patch.object(model, "_mark_parameters", unmark):
        yield


@contextmanager
def a_rank_raises() -> Iterator[None]:
    import torch.distributed as dist

    if dist.get_rank() == 1:
        raise ValueError("rank 1 has had enough")
    yield


EVERYTHING = set(COLUMNS)
FAULTS: list[tuple[Callable[[], Any], str, set[str], str, str]] = [
    (losses_are_doubled, "TP2", {"loss", "gradients", "norm", "parameters"}, "loss", "total"),
    (gradients_are_averaged_over_data_ranks, "DP2", {"gradients", "norm", "parameters"}, "gradients", ".weight"),
    (
        input_norms_are_not_all_reduced,
        "TP2",
        {"gradients", "norm", "parameters"},
        "gradients",
        "input_layernorm.weight",
    ),
    (an_expert_is_dropped, "EP2", EVERYTHING, "parameters", "model.layers.3.mlp.experts.3.down_proj.weight"),
    (masks_are_shifted, "DP2", EVERYTHING - {"logprobs", "entropy"}, "ratio", "response"),
    (token_slices_begin_one_late, "TP2", EVERYTHING, "logprobs", "response"),
    (the_clip_range_is_wider, "DP2", {"loss", "gradients", "norm", "parameters"}, "loss", "response"),
    (norms_decay, "PP2", {"parameters"}, "parameters", "norm.weight"),
    (shards_are_unmarked, "TP2", {"norm"}, "norm", "gradient norm"),
]
"""(fault, a layout where it bites, the columns that must fail, one of them, what it must name)."""


@pytest.mark.parametrize(
    ("fault", "layout", "failing", "column", "named"), FAULTS, ids=[fault.__name__ for fault, *_ in FAULTS]
)
def test_a_fault_fails_the_columns_that_it_reaches_and_is_named(
    tiny: Bench, fault: Callable[[], Any], layout: str, failing: set[str], column: str, named: str
) -> None:
    row = tiny.row(layout, fault)
    assert row.verdict == "failed"
    assert {name for name, worst in row.columns.items() if worst.error > worst.tolerance} == failing
    assert named in row.columns[column].where
    assert f"{column} {row.columns[column].error:.1e} at {row.columns[column].where}" in row.reason
    assert row.columns[column].error > 1e5 * row.columns[column].tolerance or column == "norm"


def test_a_wider_clip_range_shows_in_the_clip_decisions(tiny: Bench) -> None:
    row = tiny.row("DP2", the_clip_range_is_wider)
    assert row.clip_flips and not row.near_ties
    case, clipped = tiny.reference.case, tiny.reference.clipped
    high = [i for i, s in enumerate(case.samples) if clipped[case.predicting(i)].any() and s.advantage > 0]
    assert row.clip_flips == [f"response {case.keys[i][0]}/{case.keys[i][1]}" for i in high]


def test_a_dropped_expert_in_an_early_layer_shows_in_the_routes_above_it(tiny: Bench) -> None:
    assert not tiny.row("EP2", an_expert_is_dropped).route_flips, "nothing routes above the last layer"

    row = tiny.row("EP2", an_early_expert_is_dropped)
    assert row.route_flips
    assert all(flip.endswith(("layer 2", "layer 3")) for flip in row.route_flips)


@contextmanager
def an_early_expert_is_dropped() -> Iterator[None]:
    from megatron_gspo.policy import policy

    load = policy.load_weights

    def drop(model: Any, family: Any, reader: Any) -> None:
        load(model, family, reader)
        for parameter, named in model.rules(family):
            if "model.layers.1.mlp.experts.3.down_proj.weight" in named.hf_names:
                parameter.data.zero_()

    with mock.patch.object(policy, "load_weights", drop):
        yield


def test_a_rank_that_raises_fails_its_layout_with_what_it_said(tiny: Bench) -> None:
    row = tiny.row("PP2", a_rank_raises)
    assert (row.verdict, row.reason) == ("failed", "rank 1: ValueError: rank 1 has had enough")


# -------------------------------------------------------------------------------------------------- the command line


def json_under_torchrun(layouts: str) -> tuple[int, str, str]:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    command += ["-m", "megatron_gspo.cli", "parity", "--layouts", layouts, "--json"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=240, check=False)
    return done.returncode, done.stdout, done.stderr


def test_under_torchrun_the_world_checks_the_layouts_that_fit_it() -> None:
    status, out, err = json_under_torchrun("PP2,TP2,TP2xPP2")
    rows = {row["layout"]: row for row in json.loads(out)["layouts"]}
    assert [(name, row["verdict"]) for name, row in rows.items()] == [
        ("transformers", "held"),
        ("PP2", "held"),
        ("TP2", "held"),
        ("TP2xPP2", "refused"),
    ], err
    assert rows["TP2xPP2"]["reason"] == "needs 4 ranks, and the world has 2"
    assert rows["TP2"]["columns"]["gradients"]["error"] < 1e-13
    assert status == 1, "a layout that was named was not shown to hold"


def test_the_command_prints_a_table_and_exits_0_when_all_hold(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["parity", "--layouts", "TP2", "--model", "tiny-dense", "--device", "cpu"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].split() == ["layout", "ranks", *COLUMNS, "verdict"]
    assert [(line.split()[0], line.split()[-1]) for line in lines[1:3]] == [("transformers", "held"), ("TP2", "held")]
    assert lines[-1] == "2 held"


def test_the_command_exits_1_when_a_tolerance_is_not_met(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["parity", "--layouts", "TP1", "--tolerance", "1e-18", "--device", "cpu"]) == 1
    assert "failed: TP1: " in capsys.readouterr().out
    assert torch.get_default_dtype() == torch.float32
