"""Metrics against naive numbers, and their sums over micro-batches and ranks."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import fields, replace
from itertools import chain

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from megatron_gspo.algorithm.base import make_algorithm
from megatron_gspo.algorithm.metrics import (
    MetricSums,
    engine_gap_sums,
    finish,
    minibatch_sums,
    noise_floor,
    rollout_metrics,
)
from megatron_gspo.algorithm.ratios import segment_sum
from megatron_gspo.batching.packing import dummy_batch, shard_tokens
from megatron_gspo.report.metrics import clean
from megatron_gspo.types import LossOutput, Shard, TokenShard
from tests.oracle import naive_loss
from tests.unit.algorithm_cases import Case, cases, shard_of, token_shard

PER_TOKEN = {"labels_T", "mask_T", "sequence_T", "rollout_logprobs_T", "advantages_T", "old_logprobs_T"}


def loss_of(name: str, case: Case) -> Callable[..., LossOutput]:
    return make_algorithm(name, clip_low=case.clip_low, clip_high=case.clip_high, allow_wide_clip=True).loss


def sums_of(shard: TokenShard, new_T: torch.Tensor, case: Case, name: str) -> MetricSums:
    output = loss_of(name, case)(shard, new_T, segment_sum)
    return minibatch_sums(shard, output, entropy(shard))


def entropy(shard: TokenShard) -> torch.Tensor:
    return torch.where(shard.mask_T, shard.rollout_logprobs_T.double().abs(), float("nan"))


def naive_metrics(case: Case, name: str) -> dict[str, float]:
    new = [values.detach() for values in case.new]
    result = naive_loss(name, new, case.old, case.token_advantages, case.weights, case.clip_low, case.clip_high)
    low, high = list(chain(*result.clipped_low)), list(chain(*result.clipped_high))
    clipped, clipped_S = list(chain(*result.clipped)), [any(row) for row in result.clipped]
    assert any(clipped), "nothing is clipped: the comparison is meaningless"
    assert not all(clipped), "everything is clipped: the comparison is meaningless"
    n, m = len(low), len(case.samples)
    s = [math.exp(value) for value in result.log_ratio_S]
    log_w = torch.cat(new) - torch.cat(case.old)
    log_mu = np.concatenate([x.rollout_logprobs for x in case.samples]).astype(np.float64)
    rho = np.exp(torch.cat(case.old).numpy() - log_mu)
    advantages = list(chain(*case.token_advantages))
    return {
        "loss": float(result.loss),
        "ratio/mean": sum(s) / m,
        "ratio/p01": float(np.quantile(s, 0.01)),
        "ratio/p05": float(np.quantile(s, 0.05)),
        "ratio/p50": float(np.quantile(s, 0.50)),
        "ratio/p95": float(np.quantile(s, 0.95)),
        "ratio/p99": float(np.quantile(s, 0.99)),
        "ratio/abs_log_mean": sum(abs(value) for value in result.log_ratio_S) / m,
        "ratio/token_log_rms": math.sqrt(sum(float(x) ** 2 for x in log_w) / n),
        "ratio/ess": sum(s) ** 2 / (m * sum(x * x for x in s)),
        "clip/frac_tokens": sum(clipped) / n,
        "clip/frac_low": sum(low) / n,
        "clip/frac_high": sum(high) / n,
        "clip/frac_sequences": sum(clipped_S) / m,
        "clip/frac_tokens_nonzero_adv": sum(clipped) / sum(a != 0 for a in advantages),
        "entropy": float(np.abs(log_mu).mean()),
        "kl/engine_k1": float(-np.log(rho).mean()),
        "kl/engine_k3": float((rho - 1 - np.log(rho)).mean()),
        "kl/engine_tail": float((np.maximum(rho, 1 / rho) > 2).mean()),
    }


@pytest.mark.parametrize("name", ["gspo", "gspo-token", "grpo"])
@given(case=cases())
@settings(deadline=None, max_examples=30)
def test_every_number_is_its_formula(name: str, case: Case) -> None:
    sums = sums_of(*case.shard(multiple=4), case, name)
    expected = naive_metrics(case, name)
    assert finish(sums) == {key: pytest.approx(value, rel=1e-9, abs=1e-12) for key, value in expected.items()}


@pytest.mark.parametrize("name", ["gspo", "grpo"])
@given(case=cases(), data=st.data())
@settings(deadline=None, max_examples=20)
def test_micro_batches_and_dummies_add_up_to_the_whole(name: str, case: Case, data: st.DataObject) -> None:
    whole = finish(sums_of(*case.shard(), case, name))
    total = MetricSums.zeros()
    cut = data.draw(st.integers(1, len(case.samples) - 1))
    for part in (slice(None, cut), slice(cut, None)):
        pieces = (values[part] for values in (case.samples, case.new, case.old, case.ref))
        total += sums_of(*shard_of(*pieces, 16), case, name)
    dummy = shard_tokens(dummy_batch(torch.float64, tensor=4), Shard()).replace(
        old_logprobs_T=torch.full((4,), float("nan"))
    )
    total += sums_of(dummy, torch.zeros(4, dtype=torch.float64), case, name)
    assert whole["clip/frac_tokens"] > 0
    assert finish(total) == {key: pytest.approx(value, rel=1e-12, abs=1e-14) for key, value in whole.items()}


@given(case=cases())
@settings(deadline=None, max_examples=20)
def test_token_sums_add_over_tensor_ranks_while_sequence_sums_are_equal_on_each(case: Case) -> None:
    shard, new_T = case.shard(multiple=2)
    output = loss_of("grpo", case)(shard, new_T, segment_sum)
    whole = minibatch_sums(shard, output, entropy(shard))
    half = new_T.numel() // 2
    parts = []
    for own in (slice(None, half), slice(half, None)):
        local = shard.replace(**{name: getattr(shard, name)[own] for name in PER_TOKEN})
        local_output = replace(
            output, **{f.name: getattr(output, f.name)[own] for f in fields(LossOutput) if f.name.endswith("_T")}
        )
        parts.append(minibatch_sums(local, local_output, entropy(local)))
    torch.testing.assert_close(parts[0].token + parts[1].token, whole.token, rtol=1e-13, atol=1e-14)
    for part in parts:
        assert torch.equal(part.sequence, whole.sequence)
        assert torch.equal(part.log_ratio_S, whole.log_ratio_S)


@given(case=cases())
@settings(deadline=None, max_examples=10)
def test_the_first_mini_batch_reports_ratios_of_exactly_one_and_no_clipping(case: Case) -> None:
    shard, new_T = case.shard()
    shard = shard.replace(old_logprobs_T=new_T.detach().clone())
    metrics = finish(sums_of(shard, new_T, case, "gspo"))
    exact = {f"ratio/{name}": 1.0 for name in ("mean", "p01", "p05", "p50", "p95", "p99", "ess")}
    exact |= dict.fromkeys([name for name in metrics if name.startswith("clip/")], 0.0)
    exact |= {"ratio/abs_log_mean": 0.0, "ratio/token_log_rms": 0.0}
    assert {name: metrics[name] for name in exact} == exact


@given(case=cases())
@settings(deadline=None, max_examples=10)
def test_garbage_at_masked_positions_reaches_no_metric(case: Case) -> None:
    clean = finish(sums_of(*case.shard(multiple=4), case, "gspo"))
    dirty = finish(sums_of(*case.shard(multiple=4, masked_value=float("nan")), case, "gspo"))
    assert clean == dirty


def test_the_engine_gap_keeps_its_digits_at_1e_7() -> None:
    shard = shard_tokens(dummy_batch(torch.float64, tensor=2), Shard()).replace(
        mask_T=torch.tensor([True, True]),
        weights_S=torch.ones(1, dtype=torch.float64),
        rollout_logprobs_T=torch.tensor([0.0, 0.0]),
        old_logprobs_T=torch.tensor([-1e-7, -3e-8], dtype=torch.float64),
    )
    tokens, k1, k3, tail = engine_gap_sums(shard).tolist()
    assert (tokens, tail) == (2.0, 0.0)
    assert k1 == pytest.approx(1.3e-7, rel=1e-12, abs=0)
    assert k3 == pytest.approx((1e-14 + 9e-16) / 2, rel=1e-6, abs=0)  # exp(x) - 1 - x would be off by 1e-16


@given(case=cases())
@settings(deadline=None, max_examples=10)
def test_a_response_of_weight_zero_is_not_counted(case: Case) -> None:
    weightless = [replace(s, weight=0.0) if i == 1 else s for i, s in enumerate(case.samples)]
    others = [i for i in range(len(case.samples)) if i != 1]
    pieces = ([values[i] for i in others] for values in (case.samples, case.new, case.old, case.ref))
    counted = finish(sums_of(*shard_of(weightless, case.new, case.old, case.ref), case, "grpo"))
    assert counted == pytest.approx(finish(sums_of(*shard_of(*pieces), case, "grpo")), rel=1e-12, abs=1e-14)


def test_nothing_measured_gives_no_numbers() -> None:
    assert finish(MetricSums.zeros()) == {}


def test_the_noise_floor_is_of_absolute_log_ratios() -> None:
    log_ratio = torch.linspace(-1, 0, 101, dtype=torch.float64)
    expected = {"noise/abs_log_ratio_p50": pytest.approx(0.5), "noise/abs_log_ratio_p99": pytest.approx(0.99)}
    assert noise_floor(log_ratio) == expected


def test_rollout_metrics() -> None:
    metrics = rollout_metrics(
        rewards_P=[np.array([1.0, 0.0]), np.array([0.5, 0.5, 0.5])],
        advantages_P=[np.array([1.0, -1.0]), np.zeros(3)],
        lengths_P=[np.array([10, 20]), np.array([1, 2, 3])],
        truncated_P=[np.array([False, True]), np.zeros(3, dtype=bool)],
        dropped=4,
    )
    assert metrics == {
        "reward/mean": 0.5,
        "reward/std": pytest.approx(math.sqrt(0.1)),
        "reward/zero_std_groups": 0.5,
        "length/mean": pytest.approx(7.2),
        "length/mean_positive": 10.0,
        "length/mean_negative": 20.0,
        "length/truncated": pytest.approx(0.2),
        "dropped/responses": 4.0,
    }


def test_lengths_by_sign_are_absent_when_no_response_has_that_sign() -> None:
    metrics = rollout_metrics([np.ones(2)], [np.zeros(2)], [np.array([3, 4])], [np.zeros(2, dtype=bool)], 0)
    assert not {"length/mean_positive", "length/mean_negative"} & metrics.keys()
    assert rollout_metrics([], [], [], [], 3) == {"dropped/responses": 3.0}


# ------------------------------------------------------------------------------------------------- a reference policy


@given(case=cases())
@settings(deadline=None, max_examples=20)
def test_the_distance_from_the_reference_is_its_formula_over_response_tokens(case: Case) -> None:
    """k1 and k3 in float64, each token with the same weight, whatever padding and whichever loss."""
    shard, new_T = case.shard(multiple=4, masked_value=float("nan"))
    output = loss_of("gspo", case)(shard, new_T, segment_sum)
    metrics = finish(minibatch_sums(shard, output, entropy(shard), new_T))
    log_r = np.concatenate([(ref - new).detach().numpy() for new, ref in zip(case.new, case.ref, strict=True)])
    assert metrics["kl/ref_k1"] == pytest.approx(float(np.mean(-log_r)), rel=1e-12, abs=1e-15)
    assert metrics["kl/ref_k3"] == pytest.approx(float(np.mean(np.exp(log_r) - 1 - log_r)), rel=1e-9, abs=1e-15)
    without = finish(minibatch_sums(shard.replace(ref_logprobs_T=None), output, entropy(shard), new_T))
    assert metrics.keys() - without.keys() == {"kl/ref_k1", "kl/ref_k3"}
    assert without == {name: value for name, value in metrics.items() if name in without}


def test_a_policy_that_is_its_own_reference_is_at_no_distance_from_it() -> None:
    shard, new_T = two_tokens([-1.0, -2.0], [-1.0, -2.0], reference=[-1.0, -2.0])
    metrics = metrics_of("gspo", shard, new_T)
    assert (metrics["kl/ref_k1"], metrics["kl/ref_k3"]) == (0.0, 0.0)


# ------------------------------------------------------------------------------------------------------ extreme values


def two_tokens(
    new: list[float], old: list[float], reference: list[float] | None = None, sequences: int = 1
) -> tuple[TokenShard, torch.Tensor]:
    """One response of all the tokens, or one a token."""
    tokens = len(new)
    sequence_T = torch.arange(tokens) if sequences > 1 else torch.zeros(tokens, dtype=torch.long)
    count = tokens if sequences > 1 else 1
    ones = torch.ones(count, dtype=torch.float64)
    shard = token_shard(
        labels_T=torch.zeros(tokens, dtype=torch.long),
        mask_T=torch.ones(tokens, dtype=torch.bool),
        sequence_T=sequence_T,
        rollout_logprobs_T=torch.tensor(old, dtype=torch.float64),
        advantages_T=torch.ones(tokens, dtype=torch.float64),
        advantages_S=ones,
        weights_S=ones,
        lengths_S=torch.bincount(sequence_T),
        samples=tuple((index, 0) for index in range(count)),
        old_logprobs_T=torch.tensor(old, dtype=torch.float64),
        ref_logprobs_T=None if reference is None else torch.tensor(reference, dtype=torch.float64),
    )
    return shard, torch.tensor(new, dtype=torch.float64)


def metrics_of(name: str, shard: TokenShard, new_T: torch.Tensor) -> dict[str, float]:
    output = make_algorithm(name, clip_low=3e-4, clip_high=4e-4).loss(shard, new_T, segment_sum)
    return finish(minibatch_sums(shard, output, torch.zeros_like(new_T), new_T))


EXTREME = st.one_of(
    st.floats(-1e4, 1e4),
    st.sampled_from([0.0, -372.0, -400.0, -746.0, 355.0, 710.0, -1e300, -math.inf, math.inf, math.nan]),
)


@given(values=st.lists(st.tuples(EXTREME, EXTREME, EXTREME), min_size=1, max_size=6), several=st.booleans())
@example(values=[(-400.0, 0.0, 0.0)], several=False)
@settings(deadline=None, max_examples=60)
@pytest.mark.parametrize("name", ["gspo", "gspo-token", "grpo"])
def test_no_logprob_ends_the_metrics(name: str, values: list[tuple[float, float, float]], several: bool) -> None:
    new, old, reference = (list(column) for column in zip(*values, strict=True))
    metrics = metrics_of(name, *two_tokens(new, old, reference, sequences=2 if several else 1))
    assert json.loads(json.dumps(clean(metrics), allow_nan=False)) == clean(metrics)
    finite = np.isfinite(new).all() and np.isfinite(old).all() and max(map(abs, new + old)) < 1e5
    assert not finite or 0 < metrics["ratio/ess"] <= 1 + 1e-12


@given(shift=st.floats(-1e4, 1e4), logs=st.lists(st.floats(-5, 5), min_size=2, max_size=6))
@settings(deadline=None, max_examples=100)
def test_the_effective_sample_size_does_not_depend_on_the_level_of_the_ratios(shift: float, logs: list[float]) -> None:
    s = np.exp(np.array(logs))
    metrics = metrics_of("gspo", *two_tokens([log + shift for log in logs], [0.0] * len(logs), sequences=2))
    assert metrics["ratio/ess"] == pytest.approx(float(s.sum() ** 2 / (len(s) * (s * s).sum())), rel=1e-6)


def test_a_noise_floor_of_no_response_has_no_numbers() -> None:
    assert noise_floor(torch.empty(0)) == {}
