"""The parity check: what fails a row, and what it names."""

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import pytest

from megatron_gspo.errors import BatchError
from megatron_gspo.parity.case import Case, random_samples
from megatron_gspo.parity.naive_metrics import Metric
from megatron_gspo.parity.parts import Choices, Difference, Part, StepPart, TokenValues
from megatron_gspo.parity.reference import Reference, Routing, StepReference, check_meaning, near_ties
from megatron_gspo.parity.table import format_table
from megatron_gspo.parity.verdict import COLUMNS, Row, judge

NAMES = ("model.norm.weight", "model.layers.0.mlp.experts.0.up_proj.weight")


def reference_of(case: Case) -> Reference:
    """A made-up reference: logprobs by token number, one router of two experts out of four, a step of 4 responses."""
    old = {index: np.full(s.num_trained, -3.0) for index, s in enumerate(case.samples)}
    case = replace(case, old=old, ref=old, clip_grad=1.0)
    clipped = np.zeros(case.tokens, dtype=bool)
    clipped[case.predicting(0)] = True

    def routing() -> Routing:
        return Routing({1: np.tile([0, 2], (case.tokens, 1))}, {1: np.ones(case.tokens)})

    step = StepReference(
        logprobs=-1.0 - np.arange(case.tokens),
        entropy=1.0 + np.arange(case.tokens) / 7,
        clipped=clipped,
        routing=routing(),
        sequences={key: (2e-3 * (-1) ** i, 0.1 + i) for i, key in enumerate(case.keys)},
        loss=3.0,
        kl=0.1,
        metrics={"lr": Metric(0.5, 0.5), "clip/frac_low": Metric(0.25, 1.0), "entropy": Metric(4.0, 4.0)},
        norm=2.0,
        gradient_scale=1.0,
        parameter_scale=1.0,
        names=set(NAMES),
        weights=set(NAMES),
        trained=set(NAMES),
    )
    return Reference(case, step.logprobs.copy(), step.logprobs - 0.5, routing(), [step])


def part_of(reference: Reference) -> Part:
    """One rank's answer that is the reference's."""
    case, (step,) = reference.case, reference.steps
    numbers = np.concatenate([case.predicting(index) for index in range(len(case.samples))])
    every = np.arange(case.tokens)

    def choices() -> Choices:
        return Choices({layer: (every, experts.copy()) for layer, experts in step.routing.experts.items()})

    def differences() -> dict[str, Difference]:
        return {name: Difference(0.0, 1.0) for name in NAMES}

    return Part(
        old_pass=TokenValues([numbers], [reference.logprobs[numbers]]),
        ref_pass=TokenValues([numbers], [reference.ref_logprobs[numbers]]),
        choices=choices(),
        steps=[
            StepPart(
                training=TokenValues(
                    [numbers], [step.logprobs[numbers]], [step.entropy[numbers]], [step.clipped[numbers]]
                ),
                loss=step.loss,
                sequences=dict(step.sequences),
                choices=choices(),
                metrics={name: metric.value for name, metric in step.metrics.items()} | {"grad_norm": step.norm},
                gradients=differences(),
                parameters=differences(),
                sent=differences(),
            )
        ],
    )


def last_and_first_stage(reference: Reference) -> tuple[Part, Part]:
    """Two ranks' answers; both hold copies of everything, and one sends it."""
    last, first = part_of(reference), part_of(reference)
    last.stage = 1
    first.old_pass, first.ref_pass = TokenValues(), TokenValues()
    first.steps[0] = replace(first.steps[0], training=TokenValues(), loss=0.0, sequences={}, sent={})
    return last, first


@pytest.fixture
def reference() -> Reference:
    return reference_of(Case("", random_samples(67, 0)[:4]))


def verdict(parts: Sequence[Part], reference: Reference) -> Row:
    return judge(Row("layout", 1), parts, reference, 1e-10, 1e-6)


def test_what_is_equal_holds_with_an_error_of_zero(reference):
    row = verdict([part_of(reference)], reference)
    assert (row.verdict, row.reason) == ("held", "")
    assert set(COLUMNS) - row.columns.keys() == {"objectives", "critic"}  # of a layout of the tests below
    assert [worst.error for worst in row.columns.values()] == [0.0] * (len(COLUMNS) - 2)


@pytest.mark.parametrize("name", ["old_pass", "ref_pass"])
def test_a_token_that_no_rank_or_two_ranks_have_is_infinitely_wrong(reference, name):
    suffix = " of the reference policy" if name == "ref_pass" else ""
    part = part_of(reference)
    values = getattr(part, name)
    setattr(part, name, TokenValues([values.numbers[0][:-1]], [values.logprobs[0][:-1]]))
    worst = verdict([part], reference).columns["logprobs"]
    assert (worst.error, worst.where) == (np.inf, "response 0/3" + suffix)
    twice = part_of(reference)
    getattr(twice, name).numbers.append(values.numbers[0][:1])
    getattr(twice, name).logprobs.append(values.logprobs[0][:1])
    worst = verdict([twice], reference).columns["logprobs"]
    assert (worst.error, worst.where) == (np.inf, "response 0/0" + suffix)


def test_a_tensor_that_no_rank_has_or_that_is_unknown_fails_and_is_named(reference):
    missing, unknown = part_of(reference), part_of(reference)
    del missing.steps[0].gradients[NAMES[0]]
    unknown.steps[0].gradients["model.extra.weight"] = Difference(0.0, 0.0)
    assert verdict([missing], reference).columns["gradients"].where == f"{NAMES[0]} (on one side only), step 1"
    assert "model.extra.weight (on one side only)" in verdict([unknown], reference).reason


def test_what_is_sent_comes_once_and_from_somewhere(reference):
    missing = part_of(reference)
    del missing.steps[0].sent[NAMES[0]]
    where = verdict([missing], reference).columns["parameters"].where
    assert where == f"{NAMES[0]} (sent on one side only), step 1"
    last, first = last_and_first_stage(reference)
    first.steps[0].sent = {NAMES[0]: Difference(0.0, 1.0)}
    both = verdict([last, first], reference)
    assert "(sent by two ranks), step 1" in both.columns["parameters"].where


@pytest.mark.parametrize("column", ["gradients", "parameters"])
def test_every_ranks_own_copy_counts_and_a_wrong_one_is_named_with_its_rank(reference, column):
    first, second = last_and_first_stage(reference)
    assert verdict([first, second], reference).verdict == "held"
    getattr(second.steps[0], column)[NAMES[0]] = Difference(2e-3, 1.0)
    row = verdict([first, second], reference)
    assert row.columns[column].where == f"{NAMES[0]}, step 1, rank 1"
    assert row.reason == f"{column} 2.0e-03 at {NAMES[0]}, step 1, rank 1 (tolerance 1e-10)"


def test_errors_are_relative_to_a_tensors_largest_entry_or_to_the_floor(reference):
    part = part_of(reference)
    part.steps[0].gradients = {NAMES[0]: Difference(1e-3, 0.5), NAMES[1]: Difference(1e-14, 0.0)}
    worst = verdict([part], reference).columns["gradients"]
    assert (worst.error, worst.where) == (pytest.approx(2e-3), f"{NAMES[0]}, step 1, rank 0")
    part.steps[0].gradients[NAMES[0]] = Difference(0.0, 0.5)
    worst = verdict([part], reference).columns["gradients"]
    assert (worst.error, worst.where) == (pytest.approx(1e-14 / 1e-6), f"{NAMES[1]}, step 1, rank 0")


def test_a_parameter_is_not_held_to_more_than_the_float32_norm_allows_of_a_step(reference):
    """Of a bias near 0 a step of lr = 1e-6 is all: within 1e-6 of the norm, 2e-12 of it is no fault."""
    part = part_of(reference)
    part.steps[0].parameters = {NAMES[0]: Difference(2e-12, 1e-6), NAMES[1]: Difference(0.0, 1.0)}
    row = verdict([part], reference)
    assert row.verdict == "held"
    assert row.columns["parameters"].error == pytest.approx(1e-10)
    part.steps[0].parameters[NAMES[0]] = Difference(3e-12, 1e-6)
    assert verdict([part], reference).verdict == "failed"


def test_metrics_are_compared_on_every_rank_by_name(reference):
    first, second = last_and_first_stage(reference)
    second.steps[0].metrics["entropy"] += 4e-9
    worst = verdict([first, second], reference).columns["metrics"]
    assert (worst.error, worst.where) == (pytest.approx(1e-9), "entropy, step 1, rank 1")
    del first.steps[0].metrics["lr"]
    assert "lr (on one side only), step 1, rank 0" in verdict([first, second], reference).reason
    first.steps[0].metrics |= {"lr": 0.5, "unknown": 0.0}
    assert "unknown (on one side only), step 1, rank 0" in verdict([first, second], reference).reason


def test_of_a_step_that_fails_nothing_later_is_compared(reference):
    """Everything after it is wrong too, and would hide where it began."""
    reference.steps.append(reference.steps[0])
    case = replace(reference.case, samples=tuple(replace(s, group=2 * (s.sample // 2)) for s in reference.case.samples))
    reference.case = replace(case, old=reference.case.old)
    reference.steps = [replace(step, sequences=dict.fromkeys(case.keys, (0.0, 1.0))) for step in reference.steps]
    part = part_of(replace(reference, steps=reference.steps[:1]))
    part.steps.append(replace(part.steps[0], gradients={name: Difference(0.5, 1.0) for name in NAMES}))
    row = verdict([part], reference)
    assert row.columns["gradients"].where == f"{NAMES[0]}, step 2, rank 0"
    part.steps[0] = replace(part.steps[0], metrics=part.steps[0].metrics | {"lr": 1.0})
    row = verdict([part], reference)
    assert row.reason == "metrics 1.0e+00 at lr, step 1, rank 0 (tolerance 1e-10)"


def test_a_nan_fails(reference):
    part = part_of(reference)
    part.steps[0].metrics = None
    part.steps[0].sequences[(0, 1)] = (float("nan"), 0.0)
    row = verdict([part], reference)
    assert row.verdict == "failed"
    assert (row.columns["ratio"].error, row.columns["ratio"].where) == (np.inf, "response 0/1")
    assert row.columns["norm"].error == np.inf


def flip_route(part: Part, reference: Reference, index: int) -> int:
    number = int(reference.case.starts[index])
    part.choices.experts[1][1][number] = [0, 3]
    return number


def test_a_route_that_flips_fails_a_layout_unless_it_was_a_near_tie(reference):
    part = part_of(reference)
    number = flip_route(part, reference, 2)
    row = verdict([part], reference)
    assert (row.verdict, row.route_flips, row.near_ties) == ("failed", ["response 0/2 layer 1"], [])
    reference.routing.margins[1][number] = 1e-7
    row = verdict([part], reference)
    assert (row.verdict, row.route_flips, row.near_ties) == ("held", [], ["response 0/2 layer 1"])
    part.steps[0].choices.experts[1][1][number] = [0, 3]
    row = verdict([part], reference)
    assert row.route_flips == ["response 0/2 layer 1"], "what is a near-tie in one pass is none in another"
    reference.steps[0].routing.margins[1][number] = 1e-7
    assert verdict([part], reference).verdict == "held"


def test_what_follows_from_a_near_tie_below_is_excused_and_what_does_not_is_not(reference):
    part, routing = part_of(reference), reference.routing
    number = flip_route(part, reference, 2)
    routing.margins[1][number] = 1e-7
    for by_layer in (routing.experts, routing.margins):
        by_layer[2] = by_layer[1].copy()
    routing.margins[2][:] = 1.0
    part.choices.experts[2] = (part.choices.experts[1][0], part.choices.experts[1][1].copy())
    assert verdict([part], reference).verdict == "held", "a layer above a near-tie may choose otherwise"
    part.choices.experts[1] = (part.choices.experts[1][0], routing.experts[1].copy())
    assert verdict([part], reference).route_flips == ["response 0/2 layer 2"], "by itself it may not"


def test_a_clip_decision_that_flips_fails_a_layout_unless_it_was_a_near_tie(reference):
    part, (step,) = part_of(reference), reference.steps
    training = part.steps[0].training
    own = np.isin(training.numbers[0], reference.case.predicting(1))
    part.steps[0].training = replace(training, clipped=[training.clipped[0] ^ own])
    part.steps[0].metrics["clip/frac_low"] = 0.5
    row = verdict([part], reference)
    assert (row.verdict, row.clip_flips) == ("failed", ["response 0/1"])
    assert row.columns["metrics"].where == "clip/frac_low, step 1, rank 0"
    step.sequences[(0, 1)] = (float(np.log1p(-1e-3)) + 1e-12, step.sequences[(0, 1)][1])
    part.steps[0].sequences = dict(step.sequences)
    row = verdict([part], reference)
    assert (row.verdict, row.clip_flips, row.near_ties) == ("held", [], ["response 0/1"])


def test_samples_near_a_tie_are_found(reference):
    case = reference.case
    margins = {0: np.ones(case.tokens), 3: np.ones(case.tokens)}
    margins[3][int(case.starts[2])] = 1e-6
    assert near_ties(case, margins) == [2]
    assert near_ties(case, {}) == []


def test_a_mini_batch_that_could_not_tell_right_from_wrong_is_an_error(reference):
    (step,) = reference.steps
    check_meaning(reference)
    step.idle = [NAMES[1]]
    check_meaning(reference)  # an expert without a token
    step.idle = [NAMES[0]]
    with pytest.raises(BatchError, match=r"1 gradients are zero without a cause, model\.norm\.weight"):
        check_meaning(reference)
    step.idle, step.kl = [], 0.0
    with pytest.raises(BatchError, match="KL 0, gradient norm 2 with clip_grad 1"):
        check_meaning(reference)
    step.kl, step.norm = 0.1, 1.0
    with pytest.raises(BatchError, match="gradient norm 1 with clip_grad 1"):
        check_meaning(reference)
    step.clipped[:] = True
    with pytest.raises(BatchError, match="4 responses, 4 of them clipped"):
        check_meaning(reference)


def test_the_table_has_a_line_a_layout_and_says_what_failed(reference):
    part = part_of(reference)
    part.steps[0].metrics["grad_norm"] = 3.0
    rows = [verdict([part], reference), Row("CP2", 2, verdict="refused", reason="no context here")]
    lines = format_table(rows).splitlines()
    assert lines[0].split() == ["layout", "ranks", *COLUMNS, "verdict"]
    assert lines[1].split() == ["layout", "1", *["0.0e+00"] * 6, "5.0e-01", "0.0e+00", "-", "-", "failed"]
    assert lines[2].split() == ["CP2", "2", *["-"] * 10, "refused"]
    assert "failed: layout: norm 5.0e-01 at gradient norm, step 1 (tolerance 1e-06)" in lines
    assert lines[-1] == "1 failed, 1 refused"
