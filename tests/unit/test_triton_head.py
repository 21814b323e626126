"""The output layer's Triton kernels, interpreted on a CPU in float32: sums and gradients are those of float64."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import pytest
import torch

from tests.interpreter import Interpreter, interpreter, needs_triton

pytestmark = needs_triton
Tensors = dict[str, torch.Tensor]


@pytest.fixture(scope="module")
def interpreted() -> Iterator[Interpreter]:
    yield from interpreter()


@dataclass(frozen=True)
class Problem:
    """One rank's rows ``first`` to ``first + columns`` of a head. No size is a multiple of a block."""

    tokens: int = 37
    columns: int = 75
    hidden: int = 24
    first: int = 40
    temperature: float = 0.7
    dtype: torch.dtype = torch.float32
    scale: float = 1.0

    def tensors(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
        """h [T, H], weight [V, H], labels [T] of this rank and of others, and g [T]."""
        generator = torch.Generator().manual_seed(0)
        h, weight, g = (
            torch.randn(*shape, generator=generator, dtype=torch.float64)
            for shape in ((self.tokens, self.hidden), (self.columns, self.hidden), (self.tokens,))
        )
        labels = torch.randint(self.first - 20, self.first + self.columns + 20, (self.tokens,), generator=generator)
        labels[:3] = torch.tensor([self.first, self.first + self.columns - 1, -1])[: self.tokens]
        return (self.scale * h).to(self.dtype), weight.to(self.dtype), labels, g.float()


def by_kernels(problem: Problem) -> Tensors:
    from megatron_gspo.kernels import triton_head

    triton_head.BLOCK_T, triton_head.BLOCK_V, triton_head.BLOCK_H = 16, 16, 16  # in this process
    triton_head.SPLIT, triton_head.COLUMNS = 32, 48
    h, weight, labels, g = problem.tensors()
    head = triton_head.TritonHead(weight, problem.first, problem.temperature, problem.tokens)
    sums = head.sums(h, labels)
    lse = sums.maximum + sums.exp.log()
    dz = [(columns, rows, d.clone()) for columns, rows, d in head.gradients(h, labels, lse, g)]
    assert all(torch.equal(rows, weight[columns]) for columns, rows, _ in dz)
    found = {"lse": lse, "mean": sums.weighted / sums.exp + sums.maximum}
    found |= {"label": sums.label, "found": sums.found, "maximum": sums.maximum}
    return found | {"dz": torch.cat([d for *_, d in dz], dim=1)}


def by_formula(problem: Problem) -> Tensors:
    """In float64 on whole logits; inputs are rounded to the problem's dtype first."""
    h, weight, labels, g = problem.tensors()
    z = h.double() @ weight.double().T / problem.temperature
    local = labels - problem.first
    found = (local >= 0) & (local < problem.columns)
    at = local.where(found, 0)[:, None]
    softmax = z.softmax(dim=1)
    hit = torch.zeros_like(z).scatter_(1, at, found.double()[:, None])
    return {
        "lse": z.logsumexp(dim=1),
        "mean": (softmax * z).sum(dim=1),
        "label": z.gather(1, at)[:, 0].where(found, 0),
        "found": found,
        "maximum": z.amax(dim=1),
        "dz": g.double()[:, None] * (hit - softmax),
    }


def error(found: Tensors, expected: Tensors) -> float:
    """The largest |a - b| over tensors, beside the largest |b| of each."""
    assert found.keys() == expected.keys() and torch.equal(found["found"], expected["found"])
    size = {name: expected[name].abs().max() for name in found.keys() - {"found"}}
    return max(float((found[name].double() - expected[name]).abs().max() / size[name]) for name in size)


@pytest.mark.parametrize(
    "problem",
    [
        Problem(),
        Problem(tokens=1, columns=3, hidden=1),
        Problem(tokens=16, columns=96, hidden=32, first=0, temperature=1.0),
        Problem(columns=31, first=1),
        Problem(scale=40.0, temperature=0.1),  # logits of thousands: exp of them is far beyond float32
    ],
)
def test_sums_and_gradients_are_those_of_whole_logits(interpreted: Interpreter, problem: Problem) -> None:
    tolerance = 2e-6 if problem.scale == 1 else 2e-3  # a logit of 10,000 is rounded by 5e-4, and softmax shows it
    assert error(interpreted(by_kernels, problem), by_formula(problem)) < tolerance


def test_bfloat16_is_widened_before_its_products(interpreted: Interpreter) -> None:
    problem = Problem(dtype=torch.bfloat16)
    found, expected = interpreted(by_kernels, problem), by_formula(problem)
    assert found["dz"].dtype == torch.bfloat16 and found["lse"].dtype == torch.float32
    # The interpreter cuts to bfloat16 where a GPU rounds: a whole unit in the last place.
    assert (found["dz"].double() - expected["dz"]).abs().max() < 2**-7 * expected["dz"].abs().max()
    del found["dz"], expected["dz"]
    assert error(found, expected) < 2e-6, "a logit was rounded to bfloat16"


def whole_step(kernel: str) -> dict[str, Any]:
    """Logprobs, entropies and gradients through the autograd function, in a world of one rank."""
    import torch.distributed as dist

    from megatron_gspo.kernels import triton_head
    from tests.distributed import test_logprobs as distributed

    triton_head.BLOCK_T, triton_head.BLOCK_V, triton_head.BLOCK_H = 16, 16, 16
    triton_head.SPLIT, triton_head.COLUMNS = 32, 48
    problem = distributed.Problem(vocab=99, padded=112, hidden=32, tokens=40, chunk=24, dtype=torch.float32)
    if not dist.is_initialized():
        dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    return distributed.on_a_rank(problem, kernel=kernel)


def test_logprobs_entropies_and_gradients_of_a_step_are_those_of_log_softmax(interpreted: Interpreter) -> None:
    import numpy as np

    from tests.distributed import test_logprobs as distributed

    found = interpreted(whole_step, "triton")
    expected = distributed.reference(
        distributed.Problem(vocab=99, padded=112, hidden=32, tokens=40, chunk=24, dtype=torch.float32)
    )
    for name, value in expected.items():
        assert np.linalg.norm(found[name] - value) < 2e-6 * np.linalg.norm(value), name
    assert not found["d weight"][99:].any(), "a padding row has a gradient"


def of_nothing() -> tuple[float, int]:
    """A rank whose rows are all padding: its sums, and how many tiles of gradients it has."""
    from megatron_gspo.kernels.triton_head import TritonHead

    head = TritonHead(torch.empty(0, 8), 100, 1.0, 4)
    h, labels = torch.ones(4, 8), torch.zeros(4, dtype=torch.int64)
    sums = head.sums(h, labels)
    assert sums.maximum.isfinite().all() and not sums.found.any()
    tiles = list(head.gradients(h, labels, torch.zeros(4), torch.ones(4)))
    return float(sums.stacked().abs().sum()), len(tiles)


def test_a_rank_of_padding_alone_has_sums_of_nothing(interpreted: Interpreter) -> None:
    assert interpreted(of_nothing) == (0.0, 0)
