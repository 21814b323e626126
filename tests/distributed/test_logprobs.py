"""Vocabulary-parallel logprobs equal ``torch.log_softmax`` on whole logits: values, entropies and both gradients."""

from __future__ import annotations

from dataclasses import dataclass, replace
from unittest import mock

import numpy as np
import pytest
import torch

from tests.distributed.steps import worst
from tests.pool import RankPool

pytestmark = pytest.mark.distributed


@dataclass(frozen=True)
class Problem:
    """A head of ``vocab`` rows, padded so that tensor ranks share them evenly, over random hidden states."""

    vocab: int = 13
    padded: int = 16
    """Rows with padding. At four ranks of four rows, the last holds a single valid one."""
    hidden: int = 6
    tokens: int = 24
    temperature: float = 0.7
    chunk: int = 7
    columns: int = 3
    """Vocabulary rows of a tile: several tiles a rank, and a last one that is not full."""
    dtype: torch.dtype = torch.float64
    scale: float = 1.0
    padding_value: float = 50.0
    """What padding rows hold; it would take all probability if they were not masked."""
    seed: int = 0

    def tensors(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
        """hidden [T, H], weight [V_padded, H], labels [T], and the gradient [T] that arrives at the logprobs."""
        generator = torch.Generator().manual_seed(self.seed)

        def normal(*shape: int) -> torch.Tensor:
            return torch.randn(*shape, generator=generator, dtype=torch.float64)

        hidden_TH, grad_T = normal(self.tokens, self.hidden), normal(self.tokens)
        weight_VH = normal(self.padded, self.hidden)
        weight_VH[self.vocab :] = self.padding_value
        labels_T = torch.randint(self.vocab, (self.tokens,), generator=generator)
        labels_T[:2] = torch.tensor([0, self.vocab - 1])  # the first and the last valid row
        wide = torch.promote_types(self.dtype, torch.float32)  # logprobs are fp32, or float64 of a float64 model
        return (hidden_TH * self.scale).to(self.dtype), weight_VH.to(self.dtype), labels_T, grad_T.to(wide)


def reference(problem: Problem) -> dict[str, np.ndarray]:
    """In one process and float64, through autograd; inputs are rounded to the problem's dtype first."""
    hidden_TH, weight_VH, labels_T, grad_T = problem.tensors()
    hidden_TH, weight_VH = hidden_TH.double().requires_grad_(), weight_VH[: problem.vocab].double().requires_grad_()
    log_probs_TV = torch.log_softmax(hidden_TH @ weight_VH.T / problem.temperature, dim=-1)
    logprobs_T = log_probs_TV[torch.arange(problem.tokens), labels_T]
    logprobs_T.backward(grad_T.double())
    entropy_T = torch.distributions.Categorical(logits=log_probs_TV.detach()).entropy()
    padding_VH = torch.zeros(problem.padded - problem.vocab, problem.hidden, dtype=torch.float64)
    return {
        "logprobs": logprobs_T.detach().numpy(),
        "entropy": entropy_T.numpy(),
        "d hidden": hidden_TH.grad.numpy(),
        "d weight": torch.cat([weight_VH.grad, padding_VH]).numpy(),
    }


def on_a_rank(problem: Problem, kernel: str = "tiles") -> dict[str, np.ndarray]:
    """This rank's slice of tokens and rows, computed by the product."""
    from torch.distributed import group as groups

    from megatron_gspo.kernels import tiles
    from megatron_gspo.parallel import logprobs as product

    tiles.COLUMNS = problem.columns  # in this rank, which ends with the call
    tensor = groups.WORLD
    assert tensor is not None
    hidden_TH, weight_VH, labels_T, grad_T = problem.tensors()
    mine = [x.chunk(tensor.size())[tensor.rank()] for x in (hidden_TH, weight_VH, grad_T)]
    hidden, weight = mine[0].clone().requires_grad_(), mine[1].clone().requires_grad_()
    logprobs, entropy = product.vocab_parallel_logprobs(
        hidden,
        weight,
        labels_T,
        group=tensor,
        vocab_size=problem.vocab,
        temperature=problem.temperature,
        chunk=problem.chunk,
        kernel=kernel,
    )
    assert logprobs.dtype == entropy.dtype == torch.promote_types(problem.dtype, torch.float32)
    assert not entropy.requires_grad
    logprobs.backward(mine[2])
    assert hidden.grad is not None and weight.grad is not None
    assert hidden.grad.dtype == weight.grad.dtype == problem.dtype
    tensors = {"logprobs": logprobs.detach(), "entropy": entropy, "d hidden": hidden.grad, "d weight": weight.grad}
    return {name: value.double().numpy() for name, value in tensors.items()}


def into_main_grad(problem: Problem, **attributes: bool) -> dict[str, np.ndarray]:
    """Two backwards of a head that Megatron's DDP wraps: what they add to ``main_grad``, and what autograd is given."""
    from torch.distributed import group as groups

    from megatron_gspo.kernels import tiles
    from megatron_gspo.parallel import logprobs as product

    tiles.COLUMNS = problem.columns
    tensor = groups.WORLD
    assert tensor is not None
    hidden, weight, labels, grad = problem.tensors()
    weight.requires_grad_()
    weight.main_grad = torch.full_like(weight, 3.0, dtype=grad.dtype)  # type: ignore[attr-defined]
    weight.grad_added_to_main_grad = False  # type: ignore[attr-defined]
    for name, value in attributes.items():
        setattr(weight, name, value)
    for _ in range(2):
        logprobs, _ = product.vocab_parallel_logprobs(
            hidden, weight, labels, group=tensor, vocab_size=problem.vocab, temperature=problem.temperature, chunk=7
        )
        logprobs.backward(grad)
    assert weight.grad is not None
    return {
        "added": (weight.main_grad - 3.0).double().numpy(),  # type: ignore[attr-defined]
        "returned": weight.grad.double().numpy(),
        "told": np.array(weight.grad_added_to_main_grad),  # type: ignore[attr-defined]
    }


def error(ranks: RankPool, tensor: int, problem: Problem) -> float:
    parts = ranks.run(tensor, on_a_rank, problem)
    whole = {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}
    return worst(whole, reference(problem))[0]


@pytest.mark.parametrize("chunk", [1, 3, 10, 10_000])
@pytest.mark.parametrize("tensor", [1, 2, 4])
def test_values_entropies_and_gradients_are_those_of_log_softmax(ranks: RankPool, tensor: int, chunk: int) -> None:
    assert error(ranks, tensor, Problem(chunk=chunk)) < 1e-13


@pytest.mark.parametrize("columns", [1, 2, 4, 5, 16, 10_000])
def test_the_width_of_a_tile_changes_nothing(ranks: RankPool, columns: int) -> None:
    for tensor in (1, 2, 4):
        assert error(ranks, tensor, Problem(columns=columns)) < 1e-13


@pytest.mark.parametrize("temperature", [0.1, 1.0, 2.5])
def test_logits_are_divided_by_the_temperature(ranks: RankPool, temperature: float) -> None:
    assert error(ranks, 2, Problem(temperature=temperature)) < 1e-13


@pytest.mark.parametrize("vocab", [1, 3, 4, 5, 16])
def test_ranks_without_a_valid_row_take_no_part_of_the_probability(ranks: RankPool, vocab: int) -> None:
    # Sixteen rows over four ranks: with three valid ones, three ranks hold nothing but padding.
    problem = Problem(vocab=vocab)
    parts = ranks.run(4, on_a_rank, problem)
    rows = np.concatenate([part["d weight"] for part in parts])
    assert not rows[vocab:].any(), "a padding row has a gradient"
    assert error(ranks, 4, problem) < 1e-13 if vocab > 1 else not np.concatenate([p["logprobs"] for p in parts]).any()


def test_padding_rows_may_hold_anything(ranks: RankPool) -> None:
    for value in (0.0, 1e30, float("inf"), float("nan")):
        assert error(ranks, 2, Problem(padding_value=value)) < 1e-13


def test_logits_of_any_size_neither_overflow_nor_vanish(ranks: RankPool) -> None:
    # Logits spread over +-4e3: exp of them is far beyond float64, and most tokens' probabilities underflow.
    problem = Problem(scale=1e3)
    assert np.abs(reference(problem)["logprobs"]).max() > 1e3
    assert error(ranks, 2, problem) < 1e-11


def test_float32_is_within_its_rounding(ranks: RankPool) -> None:
    problem = Problem(dtype=torch.float32, vocab=999, padded=1000, hidden=32, tokens=64, chunk=16, scale=0.3)
    for tensor in (1, 2, 4):
        assert 1e-9 < error(ranks, tensor, problem) < 3e-6


def test_bfloat16_rounds_nothing_on_the_way_to_a_logprob(ranks: RankPool) -> None:
    # A logit near 4 would be rounded by up to 2^-7. Gradients are: of logits before their products, and at the end.
    problem = Problem(dtype=torch.bfloat16, vocab=999, padded=1000, hidden=32, tokens=64, chunk=16, scale=0.3)
    expected = reference(problem)
    for tensor in (1, 2, 4):
        parts = ranks.run(tensor, on_a_rank, problem)
        whole = {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}
        assert np.abs(whole["logprobs"] - expected["logprobs"]).max() < 2e-5
        assert np.abs(whole["entropy"] - expected["entropy"]).max() < 2e-5
        for name in ("d hidden", "d weight"):
            assert np.linalg.norm(whole[name] - expected[name]) < 0.01 * np.linalg.norm(expected[name]), name


def with_labels_outside(problem: Problem) -> dict[str, np.ndarray]:
    """The first labels replaced by such that no row stands for: of padding, beyond it, and negative."""
    labels_T = problem.tensors()[2]
    labels_T[:3] = torch.tensor([problem.vocab, problem.padded + 5, -1])
    hidden, weight, _, grad = problem.tensors()
    with mock.patch.object(Problem, "tensors", return_value=(hidden, weight, labels_T, grad)):
        return on_a_rank(problem)


@pytest.mark.parametrize("tensor", [1, 2, 4])
def test_a_label_outside_the_vocabulary_has_no_logprob_and_the_others_keep_theirs(ranks: RankPool, tensor: int) -> None:
    """A number there, the best token's, would be trained on; a NaN stops the step."""
    parts = ranks.run(tensor, with_labels_outside, Problem())
    logprobs, expected = np.concatenate([part["logprobs"] for part in parts]), reference(Problem())["logprobs"]
    assert np.isnan(logprobs[:3]).all()
    np.testing.assert_allclose(logprobs[3:], expected[3:], rtol=0, atol=1e-13)


def test_a_rank_with_a_single_token_is_enough(ranks: RankPool) -> None:
    for tensor in (1, 2, 4):
        assert error(ranks, tensor, replace(Problem(), tokens=4, chunk=1)) < 1e-13


def test_a_buffer_of_megatrons_ddp_is_added_to_in_place(ranks: RankPool) -> None:
    (result,) = ranks.run(1, into_main_grad, Problem())
    np.testing.assert_allclose(result["added"], 2 * reference(Problem())["d weight"], rtol=0, atol=1e-13)
    assert result["told"], "DDP's hook would add what is returned as well"


def test_beside_bfloat16_the_buffer_takes_sums_of_products_that_are_rounded_once(ranks: RankPool) -> None:
    problem = Problem(dtype=torch.bfloat16, vocab=99, padded=100, hidden=32, tokens=64, columns=40, scale=0.3)
    (result,) = ranks.run(1, into_main_grad, problem)
    plain = 2 * ranks.run(1, on_a_rank, problem)[0]["d weight"]
    expected = 2 * reference(problem)["d weight"]
    assert np.linalg.norm(result["added"] - expected) < 0.9 * np.linalg.norm(plain - expected)


def test_a_head_tied_to_the_embedding_returns_its_gradient_for_ddp_to_add(ranks: RankPool) -> None:
    result = ranks.run(1, into_main_grad_of_a_tied_head)[0]
    np.testing.assert_allclose(result["returned"], 2 * reference(Problem())["d weight"], rtol=0, atol=1e-13)
    assert not result["added"].any() and not result["told"]


def into_main_grad_of_a_tied_head() -> dict[str, np.ndarray]:
    return into_main_grad(Problem(), zero_out_wgrad=True)


@pytest.mark.parametrize("tensor", [1, 2])
def test_a_frozen_head_passes_gradients_on_and_none_of_its_own_is_computed(ranks: RankPool, tensor: int) -> None:
    problem = Problem()
    pieces = ranks.run(tensor, of_a_frozen_head, problem)
    d_hidden = np.concatenate([piece["d hidden"] for piece in pieces])
    np.testing.assert_allclose(d_hidden, reference(problem)["d hidden"], rtol=0, atol=1e-13)
    for piece in pieces:
        assert (piece["added to"] == (problem.tokens, problem.hidden)).all(), "something else than dh was computed"


def of_a_frozen_head(problem: Problem) -> dict[str, np.ndarray]:
    """The gradient of this rank's hidden states, and the shapes of what backward's products were added to."""
    from torch.distributed import group as groups

    from megatron_gspo.kernels import tiles
    from megatron_gspo.parallel import logprobs as product

    tiles.COLUMNS, tensor, shapes = problem.columns, groups.WORLD, []
    assert tensor is not None
    hidden_TH, weight_VH, labels_T, grad_T = problem.tensors()
    hidden, weight, grad = (x.chunk(tensor.size())[tensor.rank()].clone() for x in (hidden_TH, weight_VH, grad_T))
    hidden.requires_grad_()

    def add(total: torch.Tensor, a: torch.Tensor, b: torch.Tensor) -> None:
        shapes.append(total.shape)
        total += a @ b

    with mock.patch.object(product, "add_product", add):
        logprobs, _ = product.vocab_parallel_logprobs(
            hidden, weight, labels_T, group=tensor, vocab_size=problem.vocab, temperature=problem.temperature,
            chunk=problem.tokens,
        )  # fmt: skip
        logprobs.backward(grad)
    assert weight.grad is None and hidden.grad is not None
    return {"d hidden": hidden.grad.numpy(), "added to": np.array(shapes)}
