"""Triton kernels, interpreted on a CPU in float32: values and gradients are those of float64."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from megatron_gspo.kernels.norm import rms_norm
from megatron_gspo.kernels.rotary import rotate
from megatron_gspo.kernels.swiglu import swiglu
from tests.interpreter import Interpreter, interpreter, needs_triton

pytestmark = needs_triton
Tensors = dict[str, torch.Tensor]


@pytest.fixture(scope="module")
def interpreted() -> Iterator[Interpreter]:
    yield from interpreter()


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def error(found: Tensors, expected: Tensors) -> float:
    """The largest |a - b| / |b| over tensors, in Frobenius norm."""
    assert found.keys() == expected.keys()
    return max(float((found[name].double() - expected[name]).norm() / expected[name].norm()) for name in expected)


# --------------------------------------------------------------------------------------------------------------- SwiGLU


def run_swiglu(rows: int, width: int, with_probs: bool, dtype: torch.dtype, kernel: str) -> Tensors:
    x = (3 * normal(rows, 2 * width)).to(dtype).requires_grad_()
    probs = normal(rows, seed=1).sigmoid().to(dtype).requires_grad_() if with_probs else None
    y = swiglu(x, probs, kernel)
    y.backward(normal(rows, width, seed=2).to(dtype))
    assert x.grad is not None
    found = {"y": y.detach(), "d x": x.grad}
    return found if probs is None or probs.grad is None else found | {"d probs": probs.grad}


@pytest.mark.parametrize("with_probs", [True, False])
@pytest.mark.parametrize(("rows", "width"), [(70, 48), (3, 1500), (1, 1)])
def test_swiglu_has_the_values_and_gradients_of_float64(
    interpreted: Interpreter, rows: int, width: int, with_probs: bool
) -> None:
    found = interpreted(run_swiglu, rows, width, with_probs, torch.float32, "triton")
    assert error(found, run_swiglu(rows, width, with_probs, torch.float64, "torch")) < 3e-7


def test_swiglu_of_no_rows_is_empty(interpreted: Interpreter) -> None:
    found = interpreted(run_swiglu, 0, 8, True, torch.float32, "triton")
    assert {name: tuple(value.shape) for name, value in found.items()} == {"y": (0, 8), "d x": (0, 16), "d probs": (0,)}


# ----------------------------------------------------------------------------------------------------------------- norm


def run_norm(shape: tuple[int, ...], dtype: torch.dtype, kernel: str) -> Tensors:
    scale = torch.logspace(-3, 3, shape[0], dtype=torch.float64).view(-1, *[1] * (len(shape) - 1))  # rows of any size
    x = (normal(*shape) * scale).to(dtype).requires_grad_()
    weight = (1 + 0.5 * normal(shape[-1], seed=1)).to(dtype).requires_grad_()
    y = rms_norm(x, weight, 1e-6, kernel)
    y.backward(normal(*shape, seed=2).to(dtype))
    assert x.grad is not None and weight.grad is not None and y.shape == x.shape
    by_row = (x.grad * scale).to(dtype)  # else the gradients of the smallest rows are all that counts
    return {"y": y.detach(), "d x": by_row, "d weight": weight.grad}


@pytest.mark.parametrize("shape", [(40, 96), (5, 3, 24), (2, 5000), (1, 1)])
def test_the_norm_has_the_values_and_gradients_of_float64(interpreted: Interpreter, shape: tuple[int, ...]) -> None:
    found = interpreted(run_norm, shape, torch.float32, "triton")
    expected = run_norm(shape, torch.float64, "torch")
    if shape == (1, 1):  # y is the sign of x: its gradient is eps alone
        del found["d x"], expected["d x"]
    assert error(found, expected) < 5e-7


def test_the_norms_plain_form_is_the_formula() -> None:
    x, weight = normal(5, 8), normal(8, seed=1)
    expected = weight * x / torch.sqrt((x * x).mean(-1, keepdim=True) + 1e-6)
    torch.testing.assert_close(rms_norm(x, weight, 1e-6), expected, rtol=1e-15, atol=1e-15)


def run_norm_with_programs(programs: int) -> Tensors:
    from megatron_gspo.kernels import triton_norm

    triton_norm.PROGRAMS, triton_norm.ELEMENTS = programs, 64  # in this process, until the next call
    return run_norm((64, 32), torch.float32, "triton")


def test_a_norm_whose_programs_take_many_rows_each_sums_all_of_them(interpreted: Interpreter) -> None:
    expected = run_norm((64, 32), torch.float64, "torch")
    for programs in (1, 3, 256):
        assert error(interpreted(run_norm_with_programs, programs), expected) < 5e-7


# --------------------------------------------------------------------------------------------------------------- rotary


def run_rotary(shape: tuple[int, int, int], half: int, neighbours: bool, dtype: torch.dtype, kernel: str) -> Tensors:
    """Of a view with whole heads, as a key is that no norm has copied."""
    tokens, heads, width = shape
    angles = 3 * normal(tokens, half, seed=2)
    cos, sin = (table.float().to(dtype) for table in (angles.cos(), angles.sin()))
    x = normal(tokens, heads, 2 * width).to(dtype).requires_grad_()
    y = rotate(x[..., width:], cos, sin, neighbours=neighbours, kernel=kernel)
    y.backward(normal(*shape, seed=1).to(dtype))
    assert x.grad is not None and y.shape == shape and y.is_contiguous()
    return {"y": y.detach(), "d x": x.grad}


@pytest.mark.parametrize("neighbours", [False, True])
@pytest.mark.parametrize(("shape", "half"), [((37, 3, 16), 8), ((5, 2, 24), 6), ((70, 40, 2), 1)])
def test_the_rotation_has_the_values_and_gradients_of_float64(
    interpreted: Interpreter, shape: tuple[int, int, int], half: int, neighbours: bool
) -> None:
    found = interpreted(run_rotary, shape, half, neighbours, torch.float32, "triton")
    assert error(found, run_rotary(shape, half, neighbours, torch.float64, "torch")) < 2e-7


@pytest.mark.parametrize("neighbours", [False, True])
def test_the_rotations_plain_form_is_multiplication_by_a_complex_number(neighbours: bool) -> None:
    shape, half = (5, 2, 10), 3
    found = run_rotary(shape, half, neighbours, torch.float64, "torch")
    x, grad = normal(5, 2, 20)[..., 10:], normal(*shape, seed=1)
    angles = 3 * normal(5, half, seed=2)
    turn = torch.complex(angles.cos().float().double(), angles.sin().float().double())[:, None]
    first, second = (x[..., 0:6:2], x[..., 1:6:2]) if neighbours else (x[..., :3], x[..., 3:6])
    y = torch.complex(first.contiguous(), second.contiguous()) * turn
    torch.testing.assert_close(found["y"], torch.cat([y.real, y.imag, x[..., 6:]], dim=-1), rtol=1e-14, atol=1e-14)
    dx = torch.complex(grad[..., :3].contiguous(), grad[..., 3:6].contiguous()) * turn.conj()
    pairs = torch.stack([dx.real, dx.imag], dim=-1).flatten(-2) if neighbours else torch.cat([dx.real, dx.imag], -1)
    expected = torch.zeros(5, 2, 20, dtype=torch.float64)
    expected[..., 10:] = torch.cat([pairs, grad[..., 6:]], dim=-1)
    torch.testing.assert_close(found["d x"], expected, rtol=1e-14, atol=1e-14)
