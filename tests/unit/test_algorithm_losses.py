"""Each policy loss against the naive float64 formulas of the papers, and the identities between them."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_gspo.algorithm.base import Algorithm, algorithm_class, make_algorithm
from megatron_gspo.algorithm.catalog import policy_losses
from megatron_gspo.algorithm.objective import find_non_finite, objective
from megatron_gspo.algorithm.ratios import segment_sum
from megatron_gspo.batching.packing import dummy_batch, shard_tokens
from megatron_gspo.errors import BatchError, ConfigError
from megatron_gspo.parity.naive import Response, naive_term
from megatron_gspo.types import LossOutput, PlacedSample, Shard, TokenShard
from tests.oracle import NaiveLoss, naive_kl, naive_loss
from tests.unit.algorithm_cases import Case, cases, shard_of, token_shard

NAMES = ["gspo", "gspo-token", "grpo", "ppo"]


def clipping(name: str, clip_low: float, clip_high: float, **settings: Any) -> Algorithm:
    return make_algorithm(name, clip_low=clip_low, clip_high=clip_high, allow_wide_clip=True, **settings)


def run(name: str, shard: TokenShard, new_T: torch.Tensor, clip_low: float, clip_high: float) -> LossOutput:
    return clipping(name, clip_low, clip_high).loss(shard, new_T, segment_sum)


def gradients(loss: torch.Tensor, case: Case) -> torch.Tensor:
    """d loss / d new at every response token, in order."""
    return torch.cat(torch.autograd.grad(loss, case.new, retain_graph=True, materialize_grads=True))


def naive(name: str, case: Case) -> NaiveLoss:
    return naive_loss(name, case.new, case.old, case.token_advantages, case.weights, case.clip_low, case.clip_high)


def flat(decisions: list[list[bool]]) -> torch.Tensor:
    return torch.tensor([value for row in decisions for value in row])


def assert_both_kinds(clipped: torch.Tensor) -> None:
    assert clipped.any(), "nothing is clipped: the comparison is meaningless"
    assert not clipped.all(), "everything is clipped: the comparison is meaningless"


@pytest.mark.parametrize("name", NAMES)
@given(case=cases())
@settings(deadline=None, max_examples=40)
def test_value_gradient_and_clip_decisions_are_those_of_the_paper(name: str, case: Case) -> None:
    shard, new_T = case.shard(multiple=4)
    output, expected = run(name, shard, new_T, case.clip_low, case.clip_high), naive(name, case)

    low, high = output.clipped_low_T[shard.mask_T], output.clipped_high_T[shard.mask_T]
    assert torch.equal(low, flat(expected.clipped_low))
    assert torch.equal(high, flat(expected.clipped_high))
    assert_both_kinds(low)
    assert_both_kinds(high)
    assert not (output.clipped_low_T | output.clipped_high_T)[~shard.mask_T].any()
    assert output.clipped_S.tolist() == [any(row) for row in expected.clipped]

    torch.testing.assert_close(output.loss, expected.loss, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(output.loss_S, torch.stack(expected.loss_S).detach(), rtol=1e-12, atol=1e-12)
    expected_log_ratio_S = torch.tensor(expected.log_ratio_S, dtype=torch.float64)
    torch.testing.assert_close(output.log_ratio_S, expected_log_ratio_S, rtol=1e-10, atol=1e-13)
    torch.testing.assert_close(gradients(output.loss, case), gradients(expected.loss, case), rtol=1e-11, atol=1e-13)


@pytest.mark.parametrize("name", ["gspo-token", "grpo", "ppo"])
@given(case=cases(per_token_advantages=True))
@settings(deadline=None, max_examples=40)
def test_token_losses_take_an_advantage_for_each_token(name: str, case: Case) -> None:
    shard, new_T = case.shard()
    output, expected = run(name, shard, new_T, case.clip_low, case.clip_high), naive(name, case)
    assert_both_kinds((output.clipped_low_T | output.clipped_high_T)[shard.mask_T])
    torch.testing.assert_close(output.loss, expected.loss, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(gradients(output.loss, case), gradients(expected.loss, case), rtol=1e-11, atol=1e-13)


@pytest.mark.parametrize("name", policy_losses())
@given(case=cases(per_token_advantages=True), data=st.data())
@settings(deadline=None, max_examples=25)
def test_every_algorithm_is_the_formula_of_its_paper(name: str, case: Case, data: st.DataObject) -> None:
    """Over lengths, masks, groups and ranges; values, gradients, clip decisions, and each response's part."""
    cls = algorithm_class(name)
    drawn = dict(zip(cls.clip_settings, (case.clip_low, case.clip_high), strict=True))
    drawn |= {"allow_wide_clip": True, "dual_clip": data.draw(st.sampled_from([None, 1.01, 3.0]))}
    algorithm = make_algorithm(name, **{key: value for key, value in drawn.items() if key in cls.model_fields})
    shard, new_T = case.shard(multiple=4, masked_value=data.draw(st.sampled_from([0.0, float("nan")])))
    marks = data.draw(st.lists(st.booleans(), min_size=int(shard.mask_T.sum()), max_size=int(shard.mask_T.sum())))
    shard = shard.replace(chosen_T=torch.zeros_like(shard.mask_T).masked_scatter(shard.mask_T, torch.tensor(marks)))
    output = objective(algorithm, shard, new_T, segment_sum)
    values, rest = algorithm.model_dump(), iter(marks)
    terms = []
    for sample, response in naive_responses(case, algorithm):
        marked = replace(response, chosen=[next(rest) for _ in range(sample.num_trained)])
        terms.append(naive_term(name, marked, values, sample.weight, 0.0))
    expected = torch.stack([term.loss for term in terms])
    torch.testing.assert_close(output.loss_S, expected.detach(), rtol=1e-11, atol=1e-12)
    torch.testing.assert_close(gradients(output.loss, case), gradients(expected.sum(), case), rtol=1e-10, atol=1e-12)
    assert output.clipped_low_T[shard.mask_T].tolist() == [low for term in terms for low in term.low]
    assert output.clipped_high_T[shard.mask_T].tolist() == [high for term in terms for high in term.high]
    assert output.clipped_S.tolist() == [any(term.clipped) for term in terms]
    torch.testing.assert_close(output.log_ratio_S, torch.tensor([t.log_ratio for t in terms], dtype=torch.float64))


def naive_responses(case: Case, algorithm: Algorithm) -> Iterator[tuple[PlacedSample, Response]]:
    for sample, new, old, ref in zip(case.samples, case.new, case.old, case.ref, strict=True):
        per_token = sample.token_advantages.tolist()
        advantages = per_token if algorithm.per_token else [sample.advantage] * sample.num_trained
        rollout = sample.rollout_logprobs.astype(np.float64).tolist()
        yield sample, Response(list(new.unbind()), old.tolist(), ref.tolist(), rollout, advantages)


@given(case=cases())
@settings(deadline=None, max_examples=40)
def test_gspo_token_is_gspo_when_a_response_has_one_advantage(case: Case) -> None:
    shard, new_T = case.shard()
    whole, token = (run(name, shard, new_T, case.clip_low, case.clip_high) for name in ("gspo", "gspo-token"))
    assert_both_kinds(whole.clipped_S)
    assert torch.equal(whole.clipped_low_T, token.clipped_low_T)
    assert torch.equal(whole.clipped_high_T, token.clipped_high_T)
    torch.testing.assert_close(token.loss_S, whole.loss_S, rtol=1e-13, atol=1e-14)
    torch.testing.assert_close(gradients(token.loss, case), gradients(whole.loss, case), rtol=1e-12, atol=1e-14)


def test_gspo_unclipped_gradient_is_the_same_for_every_token_of_a_response() -> None:
    # d/d new_t of -w s A is -w s A / |y|: with w = 1, A = 2, |y| = 4, log s = 0.01.
    shard, new_T = one_response(log_ratio=[0.04, 0.0, -0.02, 0.02], advantage=2.0)
    output = run("gspo", shard, new_T, 0.1, 0.1)
    (gradient,) = torch.autograd.grad(output.loss, new_T)
    expected = -np.exp(0.01) * 2.0 / 4
    assert gradient[shard.mask_T].tolist() == pytest.approx([expected] * 4, rel=1e-14)
    assert gradient[~shard.mask_T].tolist() == [0.0]


@pytest.mark.parametrize("name", NAMES)
def test_the_clip_range_is_asymmetric(name: str) -> None:
    # Ratios of +-0.15 in the log against a range of [1 - 0.2, 1 + 0.1]: only the upper edge is crossed.
    high = run(name, *one_response([0.15], advantage=1.0), 0.2, 0.1)
    low = run(name, *one_response([-0.15], advantage=-1.0), 0.2, 0.1)
    assert (high.clipped_S.item(), low.clipped_S.item()) == (True, False)
    assert high.loss.item() == pytest.approx(-1.1, rel=1e-14)
    assert low.loss.item() == pytest.approx(np.exp(-0.15), rel=1e-14)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize(("log_ratio", "advantage"), [(0.5, -1.0), (-0.5, 1.0), (0.5, 0.0)])
def test_the_pessimistic_branch_is_never_clipped(name: str, log_ratio: float, advantage: float) -> None:
    output = run(name, *one_response([log_ratio], advantage), 0.2, 0.2)
    assert not output.clipped_S.any()
    assert output.loss.item() == pytest.approx(-advantage * np.exp(log_ratio), rel=1e-14)


@pytest.mark.parametrize("name", NAMES)
def test_the_first_mini_batch_clips_nothing_and_every_ratio_is_exactly_one(name: str) -> None:
    for dtype in (torch.float32, torch.float64):
        shard, new_T = one_response([0.0] * 7, advantage=-1.3)
        new_T = new_T.detach().to(dtype)
        shard = shard.replace(old_logprobs_T=new_T.clone())
        output = run(name, shard, new_T.requires_grad_(), 1e-12, 1e-12)
        assert not output.clipped_S.any()
        assert torch.exp(output.log_ratio_S).tolist() == [1.0]
        assert output.log_ratio_T.tolist() == [0.0] * 8
        assert output.loss.item() == pytest.approx(1.3, rel=1e-6)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize(("edge", "advantage"), [(np.log1p(3e-4), 1.0), (np.log1p(-3e-4), -1.0)])
def test_clip_decisions_in_fp32_are_exact_where_ratios_are_not(name: str, edge: float, advantage: float) -> None:
    # The fp32 ratios next to 1 + 3e-4 lie 1.2e-7 apart (6e-8 next to 1 - 3e-4): these log-ratios share a few of them.
    outside = np.sign(edge)
    for distance in np.array([-2e-8, -1e-8, -5e-9, 5e-9, 1e-8, 2e-8]):
        shard, _ = one_response([0.0], advantage)
        shard = shard.replace(old_logprobs_T=torch.zeros(2, dtype=torch.float32))
        new_T = torch.full((2,), edge + outside * distance, dtype=torch.float32)
        assert run(name, shard, new_T, 3e-4, 3e-4).clipped_S.item() is bool(distance > 0)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("garbage", [float("nan"), float("inf"), float("-inf")])
@given(case=cases())
@settings(deadline=None, max_examples=5)
def test_garbage_at_masked_positions_changes_neither_value_nor_gradient(name: str, garbage: float, case: Case) -> None:
    results = []
    for value in (0.0, garbage):
        shard, new_T = case.shard(multiple=4, masked_value=value)
        leaf_T = new_T.detach().requires_grad_()
        algorithm = clipping(name, case.clip_low, case.clip_high, kl_loss_coef=0.1)
        output = objective(algorithm, shard, leaf_T, segment_sum)
        results.append((output, *torch.autograd.grad(output.loss, leaf_T)))
    (clean, clean_gradient), (dirty, dirty_gradient) = results
    assert torch.equal(clean.loss_S, dirty.loss_S)
    assert torch.equal(clean.log_ratio_T, dirty.log_ratio_T)
    assert torch.equal(clean_gradient, dirty_gradient)
    assert torch.isfinite(dirty_gradient).all()


@pytest.mark.parametrize("name", NAMES)
def test_a_clipped_ratio_that_would_overflow_leaves_a_finite_loss_and_no_gradient(name: str) -> None:
    shard, new_T = one_response([900.0], advantage=1.0)
    output = run(name, shard, new_T, 0.2, 0.2)
    (gradient,) = torch.autograd.grad(output.loss, new_T)
    assert output.loss.item() == pytest.approx(-1.2)
    assert gradient.tolist() == [0.0, 0.0]


@pytest.mark.parametrize("name", NAMES)
def test_a_zero_advantage_gives_no_loss_whatever_the_ratio(name: str) -> None:
    shard, new_T = one_response([900.0], advantage=0.0)
    output = run(name, shard, new_T, 0.2, 0.2)
    (gradient,) = torch.autograd.grad(output.loss, new_T)
    assert (output.loss.item(), gradient.tolist()) == (0.0, [0.0, 0.0])


@pytest.mark.parametrize("name", NAMES)
@given(case=cases(), data=st.data())
@settings(deadline=None, max_examples=15)
def test_any_split_into_micro_batches_and_any_padding_gives_the_same_step(
    name: str, case: Case, data: st.DataObject
) -> None:
    shard, new_T = case.shard()
    whole = run(name, shard, new_T, case.clip_low, case.clip_high)
    owner = [data.draw(st.integers(0, 2)) for _ in case.samples]
    total = torch.zeros((), dtype=torch.float64)
    for part in sorted(set(owner)):
        chosen = [i for i, o in enumerate(owner) if o == part]
        pieces = ([values[i] for i in chosen] for values in (case.samples, case.new, case.old, case.ref))
        multiple = data.draw(st.sampled_from([1, 2, 8, 64]))
        total = total + run(name, *shard_of(*pieces, multiple), case.clip_low, case.clip_high).loss
    assert_both_kinds((whole.clipped_low_T | whole.clipped_high_T)[shard.mask_T])
    torch.testing.assert_close(total, whole.loss, rtol=1e-13, atol=1e-14)
    torch.testing.assert_close(gradients(total, case), gradients(whole.loss, case), rtol=1e-13, atol=1e-14)


@pytest.mark.parametrize("name", NAMES)
def test_a_dummy_micro_batch_runs_backward_and_adds_exactly_nothing(name: str) -> None:
    batch = dummy_batch(torch.float64, tensor=8)
    shard = shard_tokens(batch, Shard()).replace(old_logprobs_T=torch.zeros(8), ref_logprobs_T=torch.zeros(8))
    new_T = torch.randn(8, dtype=torch.float64, requires_grad=True)
    output = objective(clipping(name, 0.1, 0.1, kl_loss_coef=1.0), shard, new_T, segment_sum)
    output.loss.backward()
    assert output.loss.item() == 0.0
    assert new_T.grad is not None
    assert new_T.grad.tolist() == [0.0] * 8


@given(case=cases())
@settings(deadline=None, max_examples=40)
def test_the_kl_term_is_the_off_policy_weighted_k3(case: Case) -> None:
    shard, new_T = case.shard(multiple=4)
    plain, with_kl = (
        objective(clipping("gspo", case.clip_low, case.clip_high, kl_loss_coef=coef), shard, new_T, segment_sum)
        for coef in (0.0, 0.3)
    )
    expected = 0.3 * naive_kl(case.new, case.old, case.ref, case.weights)
    assert expected.item() > 1e-4
    torch.testing.assert_close(with_kl.loss - plain.loss, expected, rtol=1e-9, atol=1e-12)
    torch.testing.assert_close((with_kl.loss_S - plain.loss_S).sum(), expected.detach(), rtol=1e-9, atol=1e-12)
    difference = gradients(with_kl.loss, case) - gradients(plain.loss, case)
    torch.testing.assert_close(difference, gradients(expected, case), rtol=1e-9, atol=1e-12)


@given(case=cases())
@settings(deadline=None, max_examples=40)
def test_sft_is_the_weighted_negative_log_likelihood(case: Case) -> None:
    shard, new_T = case.shard(multiple=4, masked_value=float("nan"))
    output = make_algorithm("sft").loss(shard, new_T, segment_sum)
    expected = [-s.weight * values.mean() for s, values in zip(case.samples, case.new, strict=True)]
    torch.testing.assert_close(output.loss_S, torch.stack(expected).detach())
    torch.testing.assert_close(gradients(output.loss, case), gradients(torch.stack(expected).sum(), case))


def test_a_non_finite_logprob_is_traced_to_its_response() -> None:
    shard, new_T = one_response([0.1, 0.2], advantage=1.0, group=7, sample=3)
    assert find_non_finite(new_T, shard.mask_T, shard) is None
    assert find_non_finite(torch.tensor([0.0, float("inf"), 0.0]), shard.mask_T, shard) == (7, 3)
    assert find_non_finite(torch.tensor([0.0, 0.0, float("nan")]), shard.mask_T, shard) is None  # masked


@pytest.mark.parametrize("name", NAMES)
def test_a_loss_without_old_logprobs_says_which_pass_is_missing(name: str) -> None:
    shard, new_T = one_response([0.0], advantage=1.0)
    with pytest.raises(BatchError, match="pi_old pass"):
        run(name, shard.replace(old_logprobs_T=None), new_T, 0.1, 0.1)


def test_an_unknown_loss_is_the_users_mistake() -> None:
    with pytest.raises(ConfigError, match='"gspoo" is no algorithm'):
        make_algorithm("gspoo")


def one_response(
    log_ratio: list[float], advantage: float, group: int = 0, sample: int = 0
) -> tuple[TokenShard, torch.Tensor]:
    """One response of weight 1 after a prompt of one token, so that its positions are 0 ... R - 1; T = R + 1."""
    size = len(log_ratio) + 1
    mask_T = torch.arange(size) < len(log_ratio)
    shard = token_shard(
        labels_T=torch.zeros(size, dtype=torch.int64),
        mask_T=mask_T,
        sequence_T=torch.zeros(size, dtype=torch.int64),
        rollout_logprobs_T=torch.zeros(size),
        advantages_T=torch.where(mask_T, advantage, 0.0).double(),
        advantages_S=torch.tensor([advantage], dtype=torch.float64),
        weights_S=torch.ones(1, dtype=torch.float64),
        lengths_S=torch.tensor([len(log_ratio)]),
        samples=((group, sample),),
        old_logprobs_T=torch.full((size,), -1.0, dtype=torch.float64),
    )
    new_T = torch.tensor([*(value - 1.0 for value in log_ratio), -1.0], dtype=torch.float64)
    return shard, new_T.requires_grad_()
