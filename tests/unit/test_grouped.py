"""One product for all experts is a product an expert, whichever form computes it; and a token's rows add in order."""

from __future__ import annotations

import pytest
import torch

from megatron_gspo.parallel.dispatch import ordered_sum
from megatron_gspo.parallel.grouped import Runs, grouped_linear, product_form

COUNTS = torch.tensor([3, 0, 5, 1])
"""Rows of each expert; one has none."""


def inputs(dtype: torch.dtype, outputs: int = 16, width: int = 8) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Rows, weights, and a gradient of the output."""
    generator = torch.Generator().manual_seed(0)
    shapes = ((int(COUNTS.sum()), width), (len(COUNTS), outputs, width), (int(COUNTS.sum()), outputs))
    x, weight, grad = (torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype) for shape in shapes)
    return x, weight, grad


def by_definition(
    x: torch.Tensor, weight: torch.Tensor, grad: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(y, dx, dW) in float64, an expert at a time."""
    x, weight, grad = x.double(), weight.double(), grad.double()
    expert_of = torch.arange(len(COUNTS)).repeat_interleave(COUNTS)
    y = torch.stack([weight[e] @ row for row, e in zip(x, expert_of, strict=True)])
    dx = torch.stack([row @ weight[e] for row, e in zip(grad, expert_of, strict=True)])
    dw = torch.stack([grad[expert_of == e].T @ x[expert_of == e] for e in range(len(COUNTS))])
    return y, dx, dw


@pytest.mark.parametrize(
    ("form", "dtype", "tolerance"),
    [
        ("loop", torch.float64, 1e-14),
        ("loop", torch.float32, 1e-6),
        ("loop", torch.bfloat16, 2e-2),
        ("grouped_mm", torch.float32, 1e-6),
        ("grouped_mm", torch.bfloat16, 2e-2),
    ],
)
@pytest.mark.parametrize("accumulated", [False, True])
def test_both_forms_are_a_product_an_expert(form, dtype, tolerance, accumulated):
    x, weight, grad = inputs(dtype)
    x, weight = x.requires_grad_(), torch.nn.Parameter(weight)
    if accumulated:  # as Megatron's DDP has it
        weight.main_grad = torch.ones(weight.shape, dtype=torch.promote_types(dtype, torch.float32))
        weight.grad_added_to_main_grad = False
    y = grouped_linear(x, weight, Runs(COUNTS), form)
    y.backward(grad)
    assert weight.grad is not None, "DDP's hook runs when a gradient arrives"
    dw = weight.main_grad - 1 if accumulated else weight.grad
    for found, expected in zip((y, x.grad, dw), by_definition(x, weight, grad), strict=True):
        assert (found - expected).abs().max() <= tolerance * expected.abs().max()
    assert not accumulated or weight.grad_added_to_main_grad


def test_an_expert_without_rows_has_no_gradient():
    x, weight, grad = inputs(torch.float32)
    weight.requires_grad_()
    grouped_linear(x, weight, Runs(COUNTS), "grouped_mm").backward(grad)
    assert weight.grad[1].count_nonzero() == 0
    assert all(weight.grad[expert].count_nonzero() for expert in (0, 2, 3))


def test_a_layer_may_get_no_rows_at_all():
    _, weight, _ = inputs(torch.float32)
    x = torch.zeros(0, 8, requires_grad=True)
    for form in ("loop", "grouped_mm"):
        y = grouped_linear(x, weight.requires_grad_(), Runs(torch.zeros(4, dtype=torch.int64)), form)
        y.sum().backward()
        assert y.shape == (0, 16)
        assert weight.grad.count_nonzero() == 0


@pytest.mark.parametrize(
    ("outputs", "width", "dtype", "device", "form"),
    [
        (1536, 2048, torch.bfloat16, "cuda", "grouped_mm"),
        (1536, 2048, torch.float32, "cuda", "grouped_mm"),
        (1536, 2048, torch.float64, "cuda", "loop"),
        (1536, 2047, torch.bfloat16, "cuda", "loop"),  # rows of no whole 16 bytes
        (1536, 2048, torch.float32, "cpu", "loop"),  # calls cost little there, and a loop is as fast
        (64, 64, torch.float32, "cpu", "grouped_mm"),
        (64, 64, torch.float64, "cpu", "loop"),
        (64, 6, torch.float32, "cpu", "loop"),
    ],
)
def test_the_form_follows_device_dtype_and_size(outputs, width, dtype, device, form):
    assert product_form(outputs, width, dtype, device) == form


def test_where_torch_has_no_grouped_product_a_loop_computes_it(monkeypatch):
    monkeypatch.delattr(torch.nn.functional, "grouped_mm")
    assert product_form(64, 64, torch.bfloat16, "cuda") == "loop"


def test_rows_of_a_token_are_added_in_float32_and_rounded_once():
    """Eight bfloat16 numbers: added in bfloat16, the ones behind 256 are lost."""
    rows = torch.tensor([256.0] + [1.0] * 7, dtype=torch.bfloat16)[:, None]
    order = torch.arange(8)[None]
    assert ordered_sum(rows, order).item() == 264.0  # 263 rounded to bfloat16
    assert sum(rows).item() == 256.0


def test_a_sum_of_halves_is_rounded_once_and_not_on_the_way():
    """The CPU's bag of bfloat16 embeddings rounds otherwise by itself, by one last bit here and there."""
    generator = torch.Generator().manual_seed(2)
    rows = torch.randn(512, 16, generator=generator).bfloat16()
    order = torch.randperm(512, generator=generator).view(64, 8)
    exact = rows.float()[order].double().sum(dim=1)
    assert ((ordered_sum(rows, order).double() - exact).abs() <= exact.abs() * 2.0**-8 + 1e-6).all()
    assert torch.equal(ordered_sum(rows, order), ordered_sum(rows.float(), order).bfloat16())


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_where_a_tokens_rows_lie_changes_no_bit_of_their_sum(dtype):
    generator = torch.Generator().manual_seed(1)
    rows = torch.randn(40, 16, generator=generator, dtype=torch.float64).to(dtype)
    order = torch.randperm(40, generator=generator).view(5, 8)
    moved = torch.randperm(40, generator=generator)
    elsewhere = torch.empty_like(rows)
    elsewhere[moved] = rows
    assert torch.equal(ordered_sum(rows, order), ordered_sum(elsewhere, moved[order]))
