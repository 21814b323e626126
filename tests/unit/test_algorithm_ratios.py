"""Sums over sequences and log-ratios."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_gspo.algorithm.kl import k3
from megatron_gspo.algorithm.ratios import expand, masked_log_ratio, segment_sum, sequence_log_ratio


@given(owners=st.lists(st.integers(0, 4), max_size=30), seed=st.integers(0, 1000))
@settings(deadline=None)
def test_segment_sum_adds_each_sequence_and_drops_the_padding(owners: list[int], seed: int) -> None:
    values = torch.randn(3, len(owners), generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    values.requires_grad_()
    sums = segment_sum(values, torch.tensor(owners, dtype=torch.int64), 4)
    for row in range(3):
        for s in range(4):
            expected = sum(values[row, t].item() for t, owner in enumerate(owners) if owner == s)
            assert sums[row, s].item() == pytest.approx(expected, abs=1e-14)
    coefficients = torch.arange(12, dtype=torch.float64).reshape(3, 4) + 1
    (gradient,) = torch.autograd.grad((sums * coefficients).sum(), values)
    expected_gradient = [[4 * row + owner + 1 if owner < 4 else 0 for owner in owners] for row in range(3)]
    assert gradient.tolist() == expected_gradient


def test_segment_sum_passes_gradcheck() -> None:
    values = torch.randn(2, 6, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x: segment_sum(x, torch.tensor([0, 0, 1, 2, 2, 3]), 3), values)


def test_segment_sum_accumulates_in_more_than_the_dtype_of_its_values() -> None:
    # In fp32 each of the million additions of 1e-8 to 1 would be lost.
    values = torch.full((1_000_001,), 1e-8)
    values[0] = 1.0
    total = segment_sum(values, torch.zeros(1_000_001, dtype=torch.int64), 1)
    assert total.dtype == torch.float32
    assert total.item() == pytest.approx(1.01, rel=1e-6)
    assert segment_sum(values.bfloat16(), torch.zeros(1_000_001, dtype=torch.int64), 1).dtype == torch.float32


def test_expand_gives_tokens_their_sequences_value_and_padding_nothing() -> None:
    owners = torch.tensor([0, 1, 1, 2])
    assert expand(torch.tensor([5.0, 7.0]), owners).tolist() == [5.0, 7.0, 7.0, 0.0]
    assert expand(torch.tensor([True, True]), owners).tolist() == [True, True, True, False]


def test_a_sequence_log_ratio_is_the_mean_over_its_own_response_tokens() -> None:
    log_ratio = torch.tensor([0.0, 0.1, 0.3, 0.0, -0.5, 0.0, 0.0], dtype=torch.float64)
    mask = torch.tensor([False, True, True, False, True, False, False])
    owners = torch.tensor([0, 0, 0, 1, 1, 2, 3])  # sequence 2 has no response token, index 3 is padding
    result = sequence_log_ratio(log_ratio, mask, owners, 3, segment_sum)
    assert result.tolist() == pytest.approx([0.2, -0.5, 0.0], abs=1e-16)


def test_one_collective_sums_both_ratios_and_counts() -> None:
    calls = []

    def counting(values: torch.Tensor, owners: torch.Tensor, size: int) -> torch.Tensor:
        calls.append(tuple(values.shape))
        return segment_sum(values, owners, size)

    sequence_log_ratio(torch.zeros(5), torch.ones(5, dtype=torch.bool), torch.zeros(5, dtype=torch.int64), 1, counting)
    assert calls == [(2, 5)]


@pytest.mark.parametrize("garbage", [float("nan"), float("inf"), float("-inf")])
def test_masked_log_ratio_never_sees_masked_positions(garbage: float) -> None:
    new = torch.tensor([garbage, -1.0, garbage], requires_grad=True)
    old = torch.tensor([garbage, -1.5, garbage])
    ratio = masked_log_ratio(new, old, torch.tensor([False, True, False]))
    assert ratio.tolist() == [0.0, 0.5, 0.0]
    (gradient,) = torch.autograd.grad((ratio.exp() * ratio).sum(), new)
    assert gradient.tolist() == pytest.approx([0.0, 1.5 * math.exp(0.5), 0.0])


def test_old_logprobs_are_constants() -> None:
    new, old = torch.tensor([-1.0], requires_grad=True), torch.tensor([-2.0], requires_grad=True)
    masked_log_ratio(new, old, torch.tensor([True])).sum().backward()
    assert new.grad is not None
    assert old.grad is None


def test_k3_is_an_unbiased_estimate_and_keeps_its_digits_near_one() -> None:
    p, q = torch.tensor([0.5, 0.3, 0.2], dtype=torch.float64), torch.tensor([0.4, 0.4, 0.2], dtype=torch.float64)
    kl = (p * (p / q).log()).sum().item()
    log_r = (q / p).log()
    assert (p * k3(log_r)).sum().item() == pytest.approx(kl, rel=1e-12)
    assert (k3(log_r) >= 0).all()
    # At log r = 1e-7, k3 is 5e-15, and exp(log r) - 1 - log r would be off by 1e-16.
    for tiny in (1e-7, -1e-7, 1e-8, 3e-8):
        assert k3(torch.tensor(tiny, dtype=torch.float64)).item() == pytest.approx(tiny**2 / 2, rel=1e-6, abs=0)
