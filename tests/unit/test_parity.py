"""The pure parts of the parity check: names of layouts, the mini-batch, naive formulas, and what fails a row."""

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from megatron_gspo.algorithm.catalog import LOSSES
from megatron_gspo.config import parse
from megatron_gspo.errors import BatchError, ConfigError
from megatron_gspo.parity.case import Case, random_samples, set_apart, straddling_old, uneven_plan
from megatron_gspo.parity.layouts import ALL, AXES, Layout, choose_layouts, layout_of, parse_layout
from megatron_gspo.parity.models import cut_model
from megatron_gspo.parity.naive import naive_term
from megatron_gspo.parity.reference import Reference, check_meaning, longest_alive, near_ties
from megatron_gspo.parity.step import Difference, Part, TokenValues
from megatron_gspo.parity.table import format_table
from megatron_gspo.parity.verdict import COLUMNS, Row, judge
from tests import oracle

# ------------------------------------------------------------------------------------------------------------- layouts


@pytest.mark.parametrize(
    ("name", "parallel", "model", "ranks"),
    [
        ("TP1", {"tensor": 1}, {}, 1),
        ("EP2", {"expert": 2}, {}, 2),
        ("TP2xEP4", {"tensor": 2, "expert": 4}, {}, 4),
        ("TP2xPP2xDP2xEP2", {"tensor": 2, "pipeline": 2, "data": 2, "expert": 2}, {}, 8),
        (
            "TP2xCP2xPP2xVPP2+recompute",
            {"tensor": 2, "context": 2, "pipeline": 2, "virtual_pipeline": 2},
            {"recompute": "full"},
            8,
        ),
        ("PP16+recompute-selective", {"pipeline": 16}, {"recompute": "selective"}, 16),
    ],
)
def test_a_layout_is_read_from_its_name(name, parallel, model, ranks):
    layout = parse_layout(name)
    assert (layout.name, layout.parallel, layout.model, layout.ranks) == (name, parallel, model, ranks)


@pytest.mark.parametrize("name", ["", "TP", "TP0", "tp2", "TP2xTP4", "TP2PP2", "XP2", "TP2+recomputed", "TP2+off"])
def test_a_name_that_is_no_layout_is_refused(name):
    with pytest.raises(ConfigError, match="is not a layout"):
        parse_layout(name)


def test_all_has_every_axis_alone_and_combinations_of_up_to_8_ranks():
    layouts = [parse_layout(name) for name in ALL]
    assert len({layout.name for layout in layouts}) == len(layouts) >= 24
    assert max(layout.ranks for layout in layouts) == 8
    alone = {next(iter(layout.parallel)) for layout in layouts if len(layout.parallel) == 1}
    assert alone == set(AXES.values()) - {"virtual_pipeline", "expert_tensor"}  # these two live on another axis
    for name in ("TP2xCP2xPP2", "TP2xPP2xEP2", "CP2xEP2xPP2xVPP2+recompute"):
        assert name in ALL


def run_config(**sections):
    return parse({"model": {"path": "m"}, "data": {"path": "d"}, "train": {"run_dir": "r"}} | sections)


def test_the_configurations_own_layout_fills_the_world():
    config = run_config(parallel={"tensor": 2, "expert": 2}, model={"path": "m", "recompute": "full"})
    assert layout_of(config).name == "TP2xEP2+recompute"
    assert layout_of(config).model == {"recompute": "full"}
    assert layout_of(config, world=8).parallel == {"tensor": 2, "expert": 2, "data": 4}
    assert layout_of(run_config()) == Layout("TP1", {}, {})


def test_layouts_are_chosen_by_name_and_by_what_fits():
    layouts, named = choose_layouts("all,TP2,EP8", None, max_ranks=8)
    assert [layout.name for layout in layouts] == [*ALL, "EP8"]
    assert named == {"TP2", "EP8"}
    few, _ = choose_layouts("all", None, max_ranks=2)
    assert max(layout.ranks for layout in few) == 2
    fitting, _ = choose_layouts("all", None, max_ranks=2, world=8)
    assert {layout.ranks for layout in fitting} == {8}
    with pytest.raises(ConfigError, match="needs 16 ranks, more than --max-ranks 8"):
        choose_layouts("PP16", None, max_ranks=8)
    with pytest.raises(ConfigError, match="needs a configuration file"):
        choose_layouts("config", None, max_ranks=8)
    with pytest.raises(ConfigError, match="leaves no layout"):
        choose_layouts(" , ", None, max_ranks=8)


# ---------------------------------------------------------------------------------------------------------- mini-batch


def test_every_sample_has_one_place_in_packs_of_uneven_length_and_the_last_rank_a_dummy():
    for ranks in (1, 2, 4):
        plan = uneven_plan(16, ranks, multiple=3)
        assert sorted(index for share in plan for part in share for index in part) == list(range(16))
        assert {len(share) for share in plan} == {6}
    assert [] not in [part for share in uneven_plan(16, 1, 1) for part in share]
    plan = uneven_plan(16, 2, 1)
    assert plan[-1][-1] == [] and [] not in plan[0]
    assert len({len(part) for part in plan[0]}) > 1
    assert sum(map(len, plan[0])) > sum(map(len, plan[1]))
    assert uneven_plan(16, 2, 1, alone=11)[0][0] == [11]


def test_the_sample_alone_is_one_that_a_cut_in_the_middle_goes_through(reference):
    case, clipped = reference.case, reference.clipped
    alone = longest_alive(case, clipped)
    assert not clipped[case.predicting(alone)].any()
    assert len(case.samples[alone].response_ids) > len(case.samples[alone].prompt_ids) + 1
    assert longest_alive(set_apart(case, [alone]), clipped) != alone


@pytest.mark.parametrize("loss", LOSSES)
def test_old_logprobs_put_ratios_on_both_sides_of_both_ends_and_none_near_one(loss):
    case = Case("", random_samples(67, 0), loss=loss)
    new = [np.random.default_rng(1).normal(-3, 1, len(s.response_ids)) for s in case.samples]
    old = straddling_old(case, new)
    log_w = [n - o for n, o in zip(new, old, strict=True)]
    if LOSSES[loss].ratio == "sequence":
        ratios = np.array([row.mean() for row in log_w])
        assert any(np.abs(row).max() > 1.5 * abs(row.mean()) for row in log_w), "tokens vary within a response"
    else:
        ratios = np.concatenate(log_w)
    np.testing.assert_allclose(np.unique(ratios.round(9)), 1e-3 * np.array([-3, -1 / 3, 1 / 3, 3]), rtol=1e-5)


@pytest.mark.parametrize("loss", LOSSES)
def test_the_naive_formulas_are_those_of_the_tests_oracle(loss):
    case = Case("", random_samples(67, 0), loss=loss)
    new = [torch.randn(len(s.response_ids), dtype=torch.float64).requires_grad_() for s in case.samples]
    case = replace(case, old=straddling_old(case, [row.detach().numpy() for row in new]))
    terms = [
        naive_term(loss, n, torch.from_numpy(o), case.advantages(i), case.samples[i].weight, 1e-3, 1e-3)
        for i, (n, o) in enumerate(zip(new, case.old, strict=True))
    ]
    advantages = [case.advantages(i) for i in range(16)]
    weights = [sample.weight for sample in case.samples]
    expected = oracle.naive_loss(loss, new, [torch.from_numpy(o) for o in case.old], advantages, weights, 1e-3, 1e-3)
    assert [term.clipped for term in terms] == expected.clipped
    assert [term.log_ratio for term in terms] == pytest.approx(expected.log_ratio_S, rel=1e-12)
    assert [float(term.loss) for term in terms] == pytest.approx([float(x) for x in expected.loss_S], rel=1e-12)
    mine = torch.autograd.grad(sum(term.loss for term in terms), new)
    theirs = torch.autograd.grad(expected.loss, new, allow_unused=True, materialize_grads=True)
    torch.testing.assert_close(mine, theirs, rtol=1e-12, atol=1e-15)


def test_a_cut_model_keeps_its_files_and_has_fewer_layers(tmp_path: Path):
    source = tmp_path / "source"
    source.mkdir()
    (source / "config.json").write_text(json.dumps({"num_hidden_layers": 3, "layer_types": ["a", "b", "c"]}))
    (source / "model.safetensors").write_bytes(b"weights")
    cut = cut_model(source, tmp_path / "cut", 2)
    assert json.loads((cut / "config.json").read_text()) == {"num_hidden_layers": 2, "layer_types": ["a", "b"]}
    assert (cut / "model.safetensors").read_bytes() == b"weights"
    with pytest.raises(ConfigError, match=r"--layers 4: .* has 3 layers"):
        cut_model(source, tmp_path / "more", 4)


# -------------------------------------------------------------------------------------------------------------- verdict

NAMES = ("model.norm.weight", "model.layers.0.mlp.experts.0.up_proj.weight")


def reference_of(case: Case) -> Reference:
    """A made-up reference: logprobs by token number, one router of two experts out of four."""
    total = int(case.starts[-1])
    case = replace(case, old=tuple(np.full(len(s.response_ids), -3.0) for s in case.samples))
    clipped = np.zeros(total, dtype=bool)
    clipped[case.predicting(0)] = True
    return Reference(
        case=case,
        logprobs=-1.0 - np.arange(total),
        entropy=1.0 + np.arange(total) / 7,
        clipped=clipped,
        routes={1: np.tile([0, 2], (total, 1))},
        margins={1: np.ones(total)},
        sequences={key: (2e-3 * (-1) ** i, 0.1 + i) for i, key in enumerate(case.keys)},
        loss=3.0,
        norm=2.0,
        gradient_scale=1.0,
        parameter_scale=1.0,
        names=set(NAMES),
        weights=set(NAMES),
    )


def part_of(reference: Reference) -> Part:
    """One rank's answer that is the reference's."""
    case = reference.case
    numbers = np.concatenate([np.arange(own.start, own.stop) for own in map(case.predicting, range(len(case.samples)))])
    values = TokenValues(
        [numbers], [reference.logprobs[numbers]], [reference.entropy[numbers]], [reference.clipped[numbers]]
    )
    every = np.arange(int(case.starts[-1]))
    return Part(
        stage=0,
        token_rank=0,
        data_rank=0,
        norm=reference.norm,
        old_pass=values,
        training=values,
        loss=reference.loss,
        sequences=dict(reference.sequences),
        routes={layer: (every, experts.copy()) for layer, experts in reference.routes.items()},
        gradients={name: Difference(0.0, 1.0) for name in NAMES},
        parameters={name: Difference(0.0, 1.0) for name in NAMES},
    )


@pytest.fixture
def reference() -> Reference:
    return reference_of(Case("", random_samples(67, 0, groups=2, group_size=2)))


def verdict(parts: Sequence[Part], reference: Reference) -> Row:
    return judge(Row("layout", 1), parts, reference, 1e-10, 1e-6)


def test_what_is_equal_holds_with_an_error_of_zero(reference):
    row = verdict([part_of(reference)], reference)
    assert (row.verdict, row.reason) == ("held", "")
    assert [row.columns[name].error for name in COLUMNS] == [0.0] * len(COLUMNS)


def test_a_token_that_no_rank_or_two_ranks_have_is_infinitely_wrong(reference):
    part = part_of(reference)
    part.old_pass = replace(part.old_pass, **{k: [v[0][:-1]] for k, v in vars(part.old_pass).items()})
    row = verdict([part], reference)
    assert (row.columns["logprobs"].error, row.columns["logprobs"].where) == (np.inf, "response 1/1")
    twice = part_of(reference)
    twice.old_pass = replace(twice.old_pass, **{k: [v[0], v[0][:1]] for k, v in vars(twice.old_pass).items()})
    row = verdict([twice], reference)
    assert (row.columns["logprobs"].error, row.columns["logprobs"].where) == (np.inf, "response 0/0")


def test_a_tensor_without_owner_with_two_or_unknown_fails_and_is_named(reference):
    missing, unknown = part_of(reference), part_of(reference)
    del missing.gradients[NAMES[0]]
    unknown.gradients["model.extra.weight"] = Difference(0.0, 0.0)
    assert verdict([missing], reference).columns["gradients"].where == f"{NAMES[0]} (on one side only)"
    assert "model.extra.weight (on one side only)" in verdict([unknown], reference).reason
    both = [part_of(reference), replace(part_of(reference), old_pass=TokenValues(), training=TokenValues())]
    assert "(owned by two ranks)" in verdict(both, reference).columns["gradients"].where


def test_errors_are_relative_to_a_tensors_largest_entry_or_to_the_floor(reference):
    part = part_of(reference)
    part.gradients = {NAMES[0]: Difference(1e-3, 0.5), NAMES[1]: Difference(1e-14, 0.0)}
    worst = verdict([part], reference).columns["gradients"]
    assert (worst.error, worst.where) == (pytest.approx(2e-3), NAMES[0])
    part.gradients[NAMES[0]] = Difference(0.0, 0.5)
    worst = verdict([part], reference).columns["gradients"]
    assert (worst.error, worst.where) == (pytest.approx(1e-14 / 1e-6), NAMES[1]), "zero by theory: against the floor"


def test_a_nan_fails(reference):
    part = part_of(reference)
    part.norm = float("nan")
    part.sequences[(0, 1)] = (float("nan"), 0.0)
    row = verdict([part], reference)
    assert row.verdict == "failed"
    assert (row.columns["ratio"].error, row.columns["ratio"].where) == (np.inf, "response 0/1")
    assert row.columns["norm"].error == np.inf


def flip_route(part: Part, reference: Reference, index: int) -> int:
    number = int(reference.case.starts[index])
    part.routes[1][1][number] = [0, 3]
    return number


def test_a_route_that_flips_fails_a_layout_unless_it_was_a_near_tie(reference):
    part = part_of(reference)
    number = flip_route(part, reference, 2)
    row = verdict([part], reference)
    assert (row.verdict, row.route_flips, row.near_ties) == ("failed", ["response 1/0 layer 1"], [])
    reference.margins[1][number] = 1e-7
    row = verdict([part], reference)
    assert (row.verdict, row.route_flips, row.near_ties) == ("held", [], ["response 1/0 layer 1"])


def test_what_follows_from_a_near_tie_below_is_excused_and_what_does_not_is_not(reference):
    part = part_of(reference)
    number = flip_route(part, reference, 2)
    reference.margins[1][number] = 1e-7
    for routes in (reference.routes, reference.margins):
        routes[2] = routes[1].copy()
    reference.margins[2][:] = 1.0
    part.routes[2] = (part.routes[1][0], part.routes[1][1].copy())
    assert verdict([part], reference).verdict == "held", "a layer above a near-tie may choose otherwise"
    part.routes[1] = (part.routes[1][0], reference.routes[1].copy())
    assert verdict([part], reference).route_flips == ["response 1/0 layer 2"], "by itself it may not"


def test_a_clip_decision_that_flips_fails_a_layout_unless_it_was_a_near_tie(reference):
    part = part_of(reference)
    own = np.isin(part.training.numbers[0], np.arange(*reference.case.predicting(1).indices(10**6)))
    part.training = replace(part.training, clipped=[part.training.clipped[0] ^ own])
    row = verdict([part], reference)
    assert (row.verdict, row.clip_flips) == ("failed", ["response 0/1"])
    reference.sequences[(0, 1)] = (float(np.log1p(-1e-3)) + 1e-12, reference.sequences[(0, 1)][1])
    part.sequences = dict(reference.sequences)
    row = verdict([part], reference)
    assert (row.verdict, row.clip_flips, row.near_ties) == ("held", [], ["response 0/1"])


def test_samples_near_a_tie_are_found_and_set_apart(reference):
    case = reference.case
    margins = {0: np.ones(int(case.starts[-1])), 3: np.ones(int(case.starts[-1]))}
    margins[3][int(case.starts[2])] = 1e-6
    assert near_ties(case, margins) == [2]
    weights = [sample.weight for sample in set_apart(case, [2]).samples]
    assert weights == [0.25, 0.25, 0.0, 0.25]
    assert near_ties(case, {}) == []


def test_a_mini_batch_that_could_not_tell_right_from_wrong_is_an_error(reference):
    check_meaning(reference)
    reference.idle = [NAMES[1]]
    check_meaning(reference)  # an expert without a token
    reference.idle = [NAMES[0]]
    with pytest.raises(BatchError, match=r"1 gradients are zero without a cause, model\.norm\.weight"):
        check_meaning(reference)
    reference.clipped[:] = True
    with pytest.raises(BatchError, match="4 responses count, 4 of them clipped"):
        check_meaning(reference)


def test_the_table_has_a_line_a_layout_and_says_what_failed(reference):
    part = part_of(reference)
    part.norm = 3.0
    rows = [verdict([part], reference), Row("CP2", 2, verdict="refused", reason="no context here")]
    lines = format_table(rows).splitlines()
    assert lines[0].split() == ["layout", "ranks", *COLUMNS, "verdict"]
    assert lines[1].split() == ["layout", "1", *["0.0e+00"] * 5, "5.0e-01", "0.0e+00", "failed"]
    assert lines[2].split() == ["CP2", "2", *["-"] * 7, "refused"]
    assert "failed: layout: norm 5.0e-01 at gradient norm (tolerance 1e-06)" in lines
    assert lines[-1] == "1 failed, 1 refused"
