"""``megatron-gspo parity``: right layouts hold at rounding, and each fault that trainers ship is named where it is."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import pytest
import torch

from megatron_gspo.algorithm.catalog import policy_losses
from megatron_gspo.cli import main
from megatron_gspo.parity.case import Case
from megatron_gspo.parity.check import Settings, compare_layout, compare_transformers, make_reference
from megatron_gspo.parity.layouts import Layout, parse_layout
from megatron_gspo.parity.parts import Part
from megatron_gspo.parity.ranks import LocalRanks
from megatron_gspo.parity.reference import Reference
from megatron_gspo.parity.step import Fault, layout_step
from megatron_gspo.parity.verdict import COLUMNS, Row, judge
from tests.distributed import optimizer_faults as optimizer
from tests.distributed import parity_faults as faults

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
        assert row.columns[name].error < (5e-11 if name == "objectives" else 1e-11), name  # ratios of ratios
    assert row.columns["gradients"].error > 0.0, "two computations in another order agree to the last bit"
    assert row.columns["norm"].error < 1e-6  # Megatron's norm is float32's
    assert (row.straddling > 0) == ("TP2" in layout)


IN_EVERY_RUN = ("dapo", "kl-cov")
"""One whose responses have other weights than the critic's step, and one that looks at a whole mini-batch first."""


@pytest.mark.parametrize(
    "loss",
    [
        pytest.param(loss, marks=[] if loss in IN_EVERY_RUN else pytest.mark.slow_suite)
        for loss in policy_losses()
        if loss != "gspo"
    ],
)
def test_every_loss_holds_over_tensor_context_and_data_ranks(tmp_path: Any, loss: str) -> None:
    of_loss = bench(tmp_path, loss=loss)
    for layout in ("TP2", "CP2xDP2"):
        row = of_loss.row(layout)
        assert (row.verdict, row.reason) == ("held", "")
        assert 0.0 < row.columns["gradients"].error < 1e-11


def test_the_reference_is_transformers_to_its_float32_roundings(tiny: Bench) -> None:
    row = compare_transformers(tiny.reference, tiny.ranks, tiny.directory)
    assert row.verdict == "held"
    assert 1e-9 < row.columns["logprobs"].error < 5e-6
    assert 1e-9 < row.columns["gradients"].error < 1e-5


def test_in_float32_two_steps_hold_at_1e_5_with_an_expert_that_gets_no_token(tmp_path: Any) -> None:
    float32 = bench(tmp_path, dtype="float32", loss="gspo-token", model="idle-expert")
    row = float32.row("TP2xEP2", tolerance=1e-5)
    assert (row.verdict, row.reason) == ("held", "")
    assert 1e-8 < row.columns["gradients"].error < 1e-5
    starved = {name for name in float32.reference.steps[0].idle if ".experts." in name}
    assert {name.split(".experts.")[1].split(".")[0] for name in starved} == {"0"}
    assert len(starved) == 3 * 3, "expert 0 of three layers, three matrices each"


def test_in_bfloat16_responses_that_a_near_tie_routes_otherwise_are_named_and_left_out(
    tmp_path: Any,
) -> None:
    bfloat16 = bench(tmp_path, dtype="bfloat16")
    row = bfloat16.row("TP2", tolerance=0.1)
    assert (row.verdict, row.reason) == ("held", "")
    assert row.near_ties and not row.route_flips
    assert 1e-3 < row.columns["gradients"].error < 0.1


def test_a_layout_that_the_model_does_not_divide_over_is_refused_and_does_not_hold(tiny: Bench) -> None:
    row = tiny.row("TP3")
    assert row.verdict == "refused"
    assert "8 attention heads / parallel.tensor 3" in row.reason
    assert not row.columns


# -------------------------------------------------------------------------------------------------------------- faults


def steps_with(case: Case, layout: Layout, directory: str, faults: Sequence[Fault]) -> list[Part]:
    """A layout's steps with one fault after the other, on ranks that were forked once."""
    return [layout_step(case, layout, directory, fault) for fault in faults]


class Faulty:
    """A layout's rows with each of its faults of FAULTS, every time's or the others."""

    def __init__(self, bench: Bench) -> None:
        self._bench, self._rows = bench, dict[tuple[str, bool], dict[str, Row]]()

    def row(self, fault: Fault, layout: str) -> Row:
        key = layout, fault in EVERY_TIME
        if key not in self._rows:
            faults = [each for each, where, *_ in FAULTS if (where, each in EVERY_TIME) == key]
            of_ranks = self._bench.ranks.run(
                parse_layout(layout).ranks,
                steps_with,
                self._bench.reference.case,
                parse_layout(layout),
                self._bench.directory,
                faults,
            )
            self._rows[key] = {
                each.__name__: judge(Row(layout, len(of_ranks)), parts, self._bench.reference, 1e-10, 1e-6)
                for each, parts in zip(faults, zip(*of_ranks, strict=True), strict=True)
            }
        return self._rows[key][fault.__name__]


@pytest.fixture(scope="module")
def faulty(tiny: Bench) -> Faulty:
    return Faulty(tiny)


OF_ALL = {"objectives", "critic"}
"""Columns beside the step's own."""
EVERYTHING = set(COLUMNS) - OF_ALL
UPDATE = {"gradients", "norm", "parameters"}
EXPERTS = ".experts."
FAULTS: list[tuple[Any, str, set[str], str, str]] = [
    # what a run's own sums, objective and metrics are
    (faults.losses_are_doubled, "TP2", {"loss", "gradients", "norm"}, "loss", "total, step 1"),  # clipped alike
    (faults.the_clip_range_is_wider, "DP2", {"loss", "metrics"} | UPDATE, "loss", "response"),
    (faults.a_micro_batch_gives_no_gradient, "TP2", UPDATE, "gradients", "step 1"),
    (
        faults.a_run_sums_sequences_over_tensor_ranks_only,
        "CP2",
        EVERYTHING - {"logprobs", "entropy"},
        "ratio",
        "response",
    ),
    (faults.the_kl_term_is_counted_by_every_tensor_rank, "TP2", {"loss", "metrics"} | UPDATE, "loss", "total, step 1"),
    (faults.metrics_of_sequences_are_summed_over_tensor_ranks_too, "TP2", {"metrics"}, "metrics", "loss, step 1"),
    (faults.metrics_of_tokens_stay_on_their_data_rank, "DP2", {"metrics"}, "metrics", "step 1"),
    (faults.quantiles_are_of_one_data_rank, "DP2", {"metrics"}, "metrics", "ratio/p"),
    (faults.entropy_is_at_temperature_1, "TP2", {"entropy", "metrics"}, "metrics", "entropy, step 1"),
    # placement, masks, passes
    (faults.dropped_responses_still_count_in_their_group, "DP2", {"loss", "metrics"} | UPDATE, "loss", "response 3/2"),
    (faults.masks_are_shifted, "DP2", {"ratio", "loss", "gradients", "norm"}, "ratio", "response"),  # a NaN: no step
    (faults.token_slices_begin_one_late, "TP2", EVERYTHING - {"metrics", "parameters"}, "logprobs", "response"),
    (
        faults.reference_logprobs_come_one_token_late,
        "PP2",
        {"logprobs", "loss", "metrics"} | UPDATE,
        "logprobs",
        "of the reference policy",
    ),
    (faults.an_expert_is_dropped, "EP2", EVERYTHING, "parameters", "model.layers.3.mlp.experts.3.down_proj.weight"),
    # gradients over ranks
    (faults.gradients_are_averaged_over_data_ranks, "DP2", {"gradients", "norm"}, "gradients", ".weight, step 1"),
    (faults.expert_gradients_stay_on_their_data_rank, "DP2", UPDATE, "gradients", EXPERTS),
    (faults.input_norms_are_not_all_reduced, "TP2", UPDATE, "gradients", "input_layernorm.weight"),
    (
        faults.tensor_rank_1_has_the_final_norms_gradient_negated,
        "TP2",
        {"gradients", "parameters"},
        "gradients",
        "model.norm.weight, step 1, rank 1",
    ),
    (faults.key_gradients_stay_on_their_context_rank, "CP2", UPDATE, "gradients", ".self_attn."),
    (faults.gradients_are_summed_over_data_ranks_only, "CP2", UPDATE, "gradients", "step 1"),
    (faults.router_gradients_are_detached, "EP2", UPDATE, "gradients", ".mlp.gate.weight, step 1"),
    (faults.gradients_pile_up_over_mini_batches, "EP2", UPDATE, "gradients", "step 2"),
    # the optimizer
    (faults.shards_are_unmarked, "TP2", {"norm", "parameters"}, "norm", "gradient norm"),
    (faults.everything_is_marked_a_shard, "TP2", {"norm", "parameters"}, "norm", "gradient norm"),
    (optimizer.the_norm_leaves_experts_out, "EP2", {"norm", "parameters"}, "norm", "gradient norm, step 1"),
    (optimizer.everything_decays, "PP2", {"parameters"}, "parameters", "norm.weight"),
    (optimizer.gradients_are_clipped_by_twice_the_norm, "PP2", {"parameters"}, "parameters", "step 1"),
    (optimizer.data_rank_1_keeps_its_old_weights, "DP2", {"parameters"}, "parameters", "step 1, rank 1"),
    (optimizer.expert_weights_are_not_gathered, "DP2", {"parameters"}, "parameters", EXPERTS),
    (optimizer.moments_are_lost_before_the_second_step, "PP2", {"parameters"}, "parameters", "step 2"),
    (optimizer.bias_correction_begins_anew, "PP2", {"parameters"}, "parameters", "step 2"),
    (optimizer.the_schedule_is_one_step_ahead, "PP2", {"metrics", "parameters"}, "metrics", "lr, step 1"),
    (optimizer.betas_are_swapped, "EP2", {"parameters"}, "parameters", "step 2"),  # the first corrects for them
    (optimizer.eps_is_added_before_the_bias_correction, "EP2", {"parameters"}, "parameters", "step 1"),
    (optimizer.a_sync_sends_the_weights_before_the_last_step, "DP2", {"parameters"}, "parameters", "as sent, step 1"),
    # every loss, corrections, the critic
    (faults.tokens_are_chosen_on_each_rank_alone, "DP2", {"objectives"}, "objectives", "-cov"),
    (faults.value_heads_are_not_all_reduced, "TP2", {"critic"}, "critic", "gradient of score."),
    (faults.advantages_see_a_ranks_own_tokens_alone, "CP2", {"critic"}, "critic", "response"),
    (faults.a_reward_within_a_response_is_a_nan, "DP2", {"critic"}, "critic", "a critic's value is not finite"),
    (faults.advantages_are_whitened_by_data_rank, "DP2", {"critic"}, "critic", "advantages, response"),
]
"""(fault, a layout where it bites, the columns that must fail, one of them, what it must name)."""
EVERY_TIME = {
    faults.losses_are_doubled,
    faults.the_clip_range_is_wider,
    faults.a_run_sums_sequences_over_tensor_ranks_only,
    faults.the_kl_term_is_counted_by_every_tensor_rank,
    faults.metrics_of_sequences_are_summed_over_tensor_ranks_too,
    faults.an_expert_is_dropped,
    faults.expert_gradients_stay_on_their_data_rank,
    faults.tensor_rank_1_has_the_final_norms_gradient_negated,
    faults.tokens_are_chosen_on_each_rank_alone,
    faults.value_heads_are_not_all_reduced,
    optimizer.everything_decays,
    optimizer.gradients_are_clipped_by_twice_the_norm,
    optimizer.data_rank_1_keeps_its_old_weights,
    optimizer.moments_are_lost_before_the_second_step,
}
"""Of each kind one, and those that an earlier parity did not see; `make test-slow` has the others."""


@pytest.mark.parametrize(
    ("fault", "layout", "failing", "column", "named"),
    [
        pytest.param(*row, id=row[0].__name__, marks=[] if row[0] in EVERY_TIME else pytest.mark.slow_suite)
        for row in FAULTS
    ],
)
def test_a_fault_fails_the_columns_that_it_reaches_and_is_named(
    faulty: Faulty, fault: Any, layout: str, failing: set[str], column: str, named: str
) -> None:
    row = faulty.row(fault, layout)
    assert row.verdict == "failed"
    failed = {name for name, worst in row.columns.items() if worst.error > worst.tolerance}
    assert (failed if failing <= OF_ALL else failed - OF_ALL) == failing
    assert named in row.columns[column].where
    assert f"{column} {row.columns[column].error:.1e} at {row.columns[column].where}" in row.reason
    assert row.columns[column].error > 100 * row.columns[column].tolerance


def test_a_wider_clip_range_shows_in_the_clip_decisions(faulty: Faulty, tiny: Bench) -> None:
    row = faulty.row(faults.the_clip_range_is_wider, "DP2")
    assert row.clip_flips and not row.near_ties
    case, clipped = tiny.reference.case, tiny.reference.steps[0].clipped
    high = [i for i, s in enumerate(case.samples) if clipped[case.predicting(i)].any() and s.advantage > 0]
    assert row.clip_flips == [f"response {case.keys[i][0]}/{case.keys[i][1]}" for i in high]


def test_a_dropped_expert_in_an_early_layer_shows_in_the_routes_above_it(faulty: Faulty, tiny: Bench) -> None:
    assert not faulty.row(faults.an_expert_is_dropped, "EP2").route_flips, "nothing routes above the last layer"
    row = tiny.row("EP2", faults.an_early_expert_is_dropped)
    assert row.route_flips
    assert all(flip.endswith(("layer 2", "layer 3")) for flip in row.route_flips)


def test_a_tied_matrix_needs_the_gradients_of_both_ends_of_a_pipeline(tmp_path: Any) -> None:
    tied = bench(tmp_path, model="tiny-dense")
    assert tied.row("PP2").verdict == "held"
    row = tied.row("PP2", faults.tied_stages_keep_their_own_gradients)
    assert {name for name, worst in row.columns.items() if worst.error > worst.tolerance} == UPDATE
    assert row.columns["gradients"].where.startswith("model.embed_tokens.weight, step 1")


def test_a_rank_that_raises_fails_its_layout_with_what_it_said(tiny: Bench) -> None:
    row = tiny.row("PP2", faults.a_rank_raises)
    assert (row.verdict, row.reason) == ("failed", "rank 1: ValueError: rank 1 has had enough")


# -------------------------------------------------------------------------------------------------- the command line


def json_under_torchrun(layouts: str) -> tuple[int, str, str]:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    command += ["-m", "megatron_gspo.cli", "parity", "--layouts", layouts, "--json"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=500, check=False)
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
    assert rows["TP2"]["columns"]["gradients"]["error"] < 1e-11
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
