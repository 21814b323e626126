"""SwiGLU with probabilities, its torch form: values and gradients against autograd through the plain formula."""

from __future__ import annotations

import pytest
import torch

from megatron_gspo.kernels.swiglu import swiglu

ROWS, WIDTH = 7, 5


def inputs(dtype: torch.dtype, rows: int = ROWS) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """x [T, 2 I] with gates from about -6 to 6, probabilities [T], and the gradient [T, I] that arrives."""
    generator = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    return (3 * normal(rows, 2 * WIDTH)).to(dtype), normal(rows).sigmoid().to(dtype), normal(rows, WIDTH).to(dtype)


def plain(x: torch.Tensor, probs: torch.Tensor | None, grad: torch.Tensor) -> dict[str, torch.Tensor]:
    """The formula as it is written down, in float64, and autograd's gradients of it."""
    x = x.detach().double().requires_grad_()
    probs = torch.ones(len(x), dtype=torch.float64) if probs is None else probs.detach().double()
    probs.requires_grad_()
    y = x[:, :WIDTH] / (1 + torch.exp(-x[:, :WIDTH])) * x[:, WIDTH:] * probs[:, None]
    y.backward(grad.double())
    assert x.grad is not None and probs.grad is not None
    return {"y": y.detach(), "d x": x.grad, "d probs": probs.grad}


def product(x: torch.Tensor, probs: torch.Tensor | None, grad: torch.Tensor) -> dict[str, torch.Tensor]:
    x = x.detach().requires_grad_()
    probs = None if probs is None else probs.detach().requires_grad_()
    y = swiglu(x, probs)
    y.backward(grad)
    assert x.grad is not None and x.grad.dtype == x.dtype == y.dtype
    found = {"y": y.detach(), "d x": x.grad}
    if probs is not None:
        assert probs.grad is not None and probs.grad.dtype == probs.dtype
        found["d probs"] = probs.grad
    return found


def error(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> float:
    return max(float((found[name].double() - expected[name]).norm() / expected[name].norm()) for name in found)


@pytest.mark.parametrize("with_probs", [True, False])
def test_values_and_gradients_are_those_of_the_formula(with_probs: bool) -> None:
    x, probs, grad = inputs(torch.float64)
    given = probs if with_probs else None
    assert error(product(x, given, grad), plain(x, given, grad)) < 1e-15


def test_a_half_type_is_rounded_once() -> None:
    x, probs, grad = inputs(torch.bfloat16)
    expected = plain(x, probs, grad)
    for name, value in product(x, probs, grad).items():
        step = expected[name].abs() * 2**-8  # half a unit in the last of bfloat16's eight places
        assert ((value.double() - expected[name]).abs() <= step + 1e-6 * expected[name].abs().max()).all(), name


def test_probabilities_may_be_wider_than_the_rows() -> None:
    x, _, grad = inputs(torch.bfloat16)
    probs = inputs(torch.float32)[1]
    found = product(x, probs, grad)
    assert error({"d probs": found["d probs"]}, plain(x, probs, grad)) < 1e-6


def test_float32_is_bit_for_bit_silu_times_up_times_the_probability() -> None:
    x, probs, _ = inputs(torch.float32)
    expected = torch.nn.functional.silu(x[:, :WIDTH]) * x[:, WIDTH:] * probs[:, None]
    assert torch.equal(swiglu(x, probs), expected)


def test_rows_may_lie_anywhere_and_there_may_be_none() -> None:
    x, probs, grad = inputs(torch.float64)
    strided = x.t().contiguous().t()
    assert not strided.is_contiguous()
    assert error(product(strided, probs, grad), plain(x, probs, grad)) < 1e-15
    none = product(*inputs(torch.float64, rows=0))
    assert none["y"].shape == (0, WIDTH) and none["d x"].shape == (0, 2 * WIDTH) and none["d probs"].shape == (0,)


def test_backward_keeps_what_came_in_and_nothing_else() -> None:
    x, probs, _ = inputs(torch.float32)
    kept: list[torch.Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: kept.append(tensor) or tensor, lambda tensor: tensor):
        swiglu(x.requires_grad_(), probs.requires_grad_())
    assert [tensor.data_ptr() for tensor in kept] == [x.data_ptr(), probs.data_ptr()]
