"""The micro-batch planner: every invariant that plan_microbatches promises, on generated and on realistic lengths."""

import subprocess
import sys
import time

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from megatron_gspo.batching.planning import ATTENTION_COST, plan_microbatches
from megatron_gspo.bench.packing import MIXES
from megatron_gspo.errors import BatchError, DependencyError

BUDGET = 64


@st.composite
def problems(draw):
    """Lengths with many ties and some above the budget, with the arguments to plan them."""
    return {
        "lengths": draw(st.lists(st.integers(1, 90) | st.sampled_from([1, 32, 33, 64, 65]), max_size=60)),
        "token_budget": BUDGET,
        "num_ranks": draw(st.integers(1, 6)),
        "oversize": "own",
        "multiple_of": draw(st.integers(1, 5)),
        "attention_cost": draw(st.sampled_from([0.0, ATTENTION_COST, 0.1])),
    }


def costs(lengths, attention_cost=ATTENTION_COST):
    lengths = np.asarray(lengths, dtype=np.float64)
    return lengths + attention_cost * lengths**2


def cost_bound(lengths, num_ranks):
    return max(costs(lengths).sum() / num_ranks, costs(lengths).max())


def count_bound(lengths, token_budget, num_ranks):
    bins = max(-(-lengths.sum() // token_budget), (2 * lengths > token_budget).sum())
    return -(-bins // num_ranks)


def mix(name, count, seed=0):
    """Sequence lengths as RL batches have them, within the budget of 16,384 that the tests below plan for."""
    return np.minimum(MIXES[name](np.random.default_rng(seed), count), 16384)


@given(problems())
def test_every_sequence_has_exactly_one_place(problem):
    plan = plan_microbatches(**problem)
    placed = [index for rank in range(plan.num_ranks) for part in plan.microbatches(rank) for index in part]
    assert sorted(placed) == list(range(len(problem["lengths"])))


@given(problems())
@example({"lengths": [33, 32], "token_budget": BUDGET, "num_ranks": 1, "oversize": "own"})  # one token too many
def test_a_microbatch_keeps_to_the_budget_or_is_one_oversize_sequence(problem):
    lengths = np.asarray(problem["lengths"], dtype=np.int64)
    plan = plan_microbatches(**problem)
    for rank in range(plan.num_ranks):
        for part in plan.microbatches(rank):
            assert lengths[part].sum() <= BUDGET or len(part) == 1


@given(problems())
def test_every_rank_has_the_same_number_of_microbatches_and_it_is_a_multiple(problem):
    plan = plan_microbatches(**problem)
    assert [len(plan.microbatches(rank)) for rank in range(plan.num_ranks)] == [plan.num_microbatches] * plan.num_ranks
    needed = plan_microbatches(**{**problem, "multiple_of": 1}).num_microbatches
    assert plan.num_microbatches == -(-needed // problem["multiple_of"]) * problem["multiple_of"]


@given(problems())
def test_sequences_stay_in_index_order_and_microbatches_run_from_costly_to_cheap(problem):
    plan = plan_microbatches(**problem)
    cost_S = costs(problem["lengths"], problem["attention_cost"])
    for rank in range(plan.num_ranks):
        parts = plan.microbatches(rank)
        assert all(np.all(np.diff(part) > 0) for part in parts)
        assert np.all(np.diff([cost_S[part].sum() for part in parts]) <= 1e-9)


@given(problems())
def test_rank_costs_are_the_sums_of_what_the_ranks_hold(problem):
    plan = plan_microbatches(**problem)
    cost_S = costs(problem["lengths"], problem["attention_cost"])
    expected = np.bincount(plan.rank_S, weights=cost_S, minlength=plan.num_ranks)
    np.testing.assert_allclose(plan.rank_costs, expected, rtol=1e-12)


@given(problems())
@example({"lengths": [7] * 40, "token_budget": BUDGET, "num_ranks": 4, "oversize": "own"})
def test_the_same_arguments_give_the_same_plan(problem):
    first, second = plan_microbatches(**problem), plan_microbatches(**problem)
    np.testing.assert_array_equal(first.rank_S, second.rank_S)
    np.testing.assert_array_equal(first.microbatch_S, second.microbatch_S)


@given(problems())
def test_no_rank_carries_more_than_the_longest_first_guarantee(problem):
    lengths = problem["lengths"]
    if not lengths:
        return
    plan = plan_microbatches(**problem)
    cost_S = costs(lengths, problem["attention_cost"])
    guarantee = cost_S.sum() / plan.num_ranks + cost_S.max() * (1 - 1 / plan.num_ranks)  # Graham 1969
    assert plan.rank_costs.max() <= guarantee * (1 + 1e-12)


def test_equal_lengths_go_round_the_ranks_by_index():
    plan = plan_microbatches([10] * 6, token_budget=20, num_ranks=3)
    assert plan.rank_S.tolist() == [0, 1, 2, 0, 1, 2]
    assert plan.num_microbatches == 1


def test_an_exchange_finds_the_even_split_that_longest_first_misses():
    """Longest first ends with 3 + 2 + 2 against 3 + 2."""
    plan = plan_microbatches([3, 3, 2, 2, 2], token_budget=10, num_ranks=2, attention_cost=0.0)
    assert plan.rank_costs.tolist() == [6.0, 6.0]


def test_attention_makes_one_long_sequence_weigh_as_much_as_many_short_ones():
    """100 + 0.1 * 100**2 = 1100 against 20 * (10 + 0.1 * 10**2) = 400: the long one has a rank for itself."""
    lengths = [100] + [10] * 20
    by_cost = plan_microbatches(lengths, token_budget=1000, num_ranks=2, attention_cost=0.1)
    by_tokens = plan_microbatches(lengths, token_budget=1000, num_ranks=2, attention_cost=0.0)
    assert sorted(by_cost.rank_costs.tolist()) == [400.0, 1100.0]
    assert by_tokens.rank_costs.tolist() == [150.0, 150.0]


def test_an_oversize_sequence_is_an_error_that_names_it():
    with pytest.raises(BatchError, match=r"sequence 2 has 65 tokens, above the micro-batch's 64 \(and 1 more\)"):
        plan_microbatches([3, 64, 65, 1, 90], token_budget=64, num_ranks=2)


def test_an_oversize_sequence_can_have_a_microbatch_of_its_own():
    plan = plan_microbatches([100, 5, 5], token_budget=64, num_ranks=1, oversize="own")
    assert [part.tolist() for part in plan.microbatches(0)] == [[0], [1, 2]]


def test_a_rank_without_sequences_has_empty_microbatches():
    plan = plan_microbatches([8, 4], token_budget=8, num_ranks=3, multiple_of=2)
    assert [[part.tolist() for part in plan.microbatches(rank)] for rank in range(3)] == [
        [[0], []],
        [[1], []],
        [[], []],
    ]


def test_no_sequences_need_no_microbatches():
    plan = plan_microbatches([], token_budget=8, num_ranks=2, multiple_of=4)
    assert (plan.num_microbatches, plan.microbatches(1), plan.rank_costs.tolist()) == (0, [], [0.0, 0.0])


@pytest.mark.parametrize("num_ranks", [1, 8, 64])
@pytest.mark.parametrize("name", list(MIXES))
def test_the_heaviest_rank_is_within_2_percent_of_the_lower_bound(name, num_ranks):
    for seed in range(5):
        lengths = mix(name, 32 * num_ranks, seed)
        plan = plan_microbatches(lengths, token_budget=16384, num_ranks=num_ranks)
        assert plan.rank_costs.max() <= 1.02 * cost_bound(lengths, num_ranks)


@pytest.mark.parametrize("num_ranks", [1, 8, 64])
@pytest.mark.parametrize("name", list(MIXES))
def test_microbatches_are_nearly_as_few_as_the_tokens_allow(name, num_ranks):
    for seed in range(5):
        lengths = mix(name, 64 * num_ranks, seed)
        fewest = count_bound(lengths, 16384, num_ranks)
        plan = plan_microbatches(lengths, token_budget=16384, num_ranks=num_ranks)
        assert plan.num_microbatches <= max(fewest + 1, 1.05 * fewest)


def test_microbatches_that_run_together_cost_about_the_same():
    """All ranks wait for the slowest in an expert all-to-all, so the sum over micro-batches of the slowest counts."""
    lengths = mix("lognormal", 512)
    plan = plan_microbatches(lengths, token_budget=16384, num_ranks=8)
    cost_RM = np.zeros((plan.num_ranks, plan.num_microbatches))
    np.add.at(cost_RM, (plan.rank_S, plan.microbatch_S), costs(lengths))
    assert cost_RM.max(axis=0).sum() <= 1.05 * cost_bound(lengths, 8)


@pytest.mark.parametrize("name", list(MIXES))
def test_a_hundred_thousand_sequences_take_less_than_a_fifth_of_a_second(name):
    lengths = mix(name, 100_000)
    started = time.process_time()
    plan = plan_microbatches(lengths, token_budget=16384, num_ranks=64)
    assert time.process_time() - started < 0.2
    assert plan.rank_costs.max() <= 1.02 * cost_bound(lengths, 64)


@settings(max_examples=20)
@given(st.permutations(range(24)))
def test_shuffling_the_sequences_does_not_change_the_balance(order):
    lengths = mix("bimodal", 24)
    plan = plan_microbatches(lengths, token_budget=8192, num_ranks=3)
    shuffled = plan_microbatches(lengths[list(order)], token_budget=8192, num_ranks=3)
    np.testing.assert_allclose(np.sort(shuffled.rank_costs), np.sort(plan.rank_costs), rtol=1e-12)


@pytest.mark.parametrize(
    ("lengths", "arguments", "message"),
    [
        ([3, 0, 2], {}, "sequence 1 has length 0"),
        ([3, -5], {}, "sequence 1 has length -5"),
        ([1.5], {}, "dtype float64"),
        ([[1, 2]], {}, r"shape \(1, 2\)"),
        ([1], {"token_budget": 0}, "token_budget = 0"),
        ([1], {"num_ranks": 0}, "num_ranks = 0"),
        ([1], {"multiple_of": 0}, "multiple_of = 0"),
        ([1], {"attention_cost": -1.0}, "attention_cost = -1.0"),
        ([1], {"attention_cost": float("nan")}, "attention_cost = nan"),
    ],
)
def test_bad_arguments_are_named(lengths, arguments, message):
    with pytest.raises(BatchError, match=message):
        plan_microbatches(lengths, **{"token_budget": 8, "num_ranks": 1, **arguments})


def test_a_rank_outside_the_plan_is_refused():
    with pytest.raises(BatchError, match="rank 2 is not in a plan for 2"):
        plan_microbatches([1], token_budget=8, num_ranks=2).microbatches(2)


def test_a_missing_extension_says_how_to_build_it(monkeypatch):
    monkeypatch.setitem(sys.modules, "megatron_gspo._packing", None)
    monkeypatch.delattr("megatron_gspo._packing", raising=False)
    with pytest.raises(DependencyError, match="make install"):
        plan_microbatches([1], token_budget=8, num_ranks=1)


def test_another_process_makes_the_same_plan():
    code = (
        "from megatron_gspo.batching.planning import plan_microbatches as plan;"
        "p = plan([5, 9, 2, 9, 7, 5, 1] * 30, token_budget=40, num_ranks=4);"
        "print(p.rank_S.tolist(), p.microbatch_S.tolist())"
    )
    printed = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    plan = plan_microbatches([5, 9, 2, 9, 7, 5, 1] * 30, token_budget=40, num_ranks=4)
    assert printed == f"{plan.rank_S.tolist()} {plan.microbatch_S.tolist()}\n"
