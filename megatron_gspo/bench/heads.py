"""Ways from hidden states to logprobs and back, in one interface, for ``bench logprobs``."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.distributed as dist

from megatron_gspo.kernels.tiles import COLUMNS
from megatron_gspo.megatron.megatron_logprobs import megatron_logprobs
from megatron_gspo.parallel import logprobs as fused

Backward = Callable[[], None]


@dataclass(frozen=True)
class Problem:
    """One tensor rank's share of a micro-batch's output layer. ``make`` draws the same on every rank."""

    hidden_TH: torch.Tensor
    """[T / n, H] requires grad"""
    weight_VH: torch.Tensor
    """[V / n, H] requires grad, with a ``grad`` that is added to, as in every micro-batch of a step"""
    main_grad_VH: torch.Tensor
    """That buffer in the accumulation dtype: the same one, except beside bfloat16"""
    labels_T: torch.Tensor
    grad_T: torch.Tensor
    """[T] gradient that arrives at the logprobs"""
    gathered_TH: torch.Tensor
    """[T, H] the hidden states of all tensor ranks, for the matrix products alone"""
    group: dist.ProcessGroup
    vocab: int
    chunk: int

    @classmethod
    def make(
        cls, *, tokens: int, vocab: int, hidden: int, chunk: int, dtype: torch.dtype, group: dist.ProcessGroup
    ) -> Problem:
        """Logits of variance about 1, of ``vocab`` rows without padding. Ranks divide ``tokens`` and ``vocab``."""
        device = torch.device("cuda") if dist.get_backend(group) == "nccl" else torch.device("cpu")
        generator = torch.Generator(device).manual_seed(0)
        wide = torch.promote_types(dtype, torch.float32)

        def normal(*shape: int) -> torch.Tensor:
            return torch.randn(*shape, generator=generator, device=device, dtype=wide)

        gathered_TH, grad_T = normal(tokens, hidden).to(dtype), normal(tokens)
        labels_T = torch.randint(vocab, (tokens,), generator=generator, device=device)
        rank, ranks = group.rank(), group.size()
        generator.manual_seed(rank + 1)
        weight_VH = normal(vocab // ranks, hidden).mul_(hidden**-0.5).to(dtype).requires_grad_()
        weight_VH.grad = torch.zeros_like(weight_VH)
        main_grad_VH = weight_VH.grad if dtype == wide else torch.zeros_like(weight_VH, dtype=wide)
        hidden_TH = gathered_TH.chunk(ranks)[rank].clone().requires_grad_()
        return cls(hidden_TH, weight_VH, main_grad_VH, labels_T, grad_T, gathered_TH, group, vocab, min(chunk, tokens))

    @property
    def own_grad_T(self) -> torch.Tensor:
        """This rank's slice."""
        return self.grad_T.chunk(self.group.size())[self.group.rank()]


def ours(problem: Problem) -> tuple[torch.Tensor, Backward]:
    """The product's: fused, with entropy, adding to ``main_grad`` as under Megatron's DDP."""
    weight = problem.weight_VH.detach().requires_grad_()
    weight.main_grad = problem.main_grad_VH  # type: ignore[attr-defined]
    weight.grad_added_to_main_grad = False  # type: ignore[attr-defined]
    logprobs, _ = fused.vocab_parallel_logprobs(
        problem.hidden_TH,
        weight,
        problem.labels_T,
        group=problem.group,
        vocab_size=problem.vocab,
        temperature=1.0,
        chunk=problem.chunk,
    )
    return logprobs, lambda: logprobs.backward(problem.own_grad_T)


def full_logits(problem: Problem) -> tuple[torch.Tensor, Backward]:
    """The textbook's: all logits, ``log_softmax`` in fp32, autograd. One tensor rank. Without entropy."""
    logits_TV = (problem.hidden_TH @ problem.weight_VH.t()).to(problem.main_grad_VH.dtype)
    logprobs = torch.log_softmax(logits_TV, dim=-1).gather(1, problem.labels_T[:, None])[:, 0]
    return logprobs, lambda: logprobs.backward(problem.grad_T)


def megatron(problem: Problem) -> tuple[torch.Tensor, Backward]:
    """Megatron-Core's parallel linear layer and ``vocab_parallel_cross_entropy``. Without entropy."""
    logprobs = megatron_logprobs(problem.hidden_TH, problem.weight_VH, problem.labels_T, group=problem.group)
    return logprobs, lambda: logprobs.backward(problem.grad_T)


def matmuls(problem: Problem) -> tuple[torch.Tensor, Backward]:
    """The four matrix products alone, a whole one at a time: z; z again, dz W, dz^T h."""
    h, weight, total = problem.gathered_TH, problem.weight_VH.detach(), problem.weight_VH.grad
    assert total is not None
    z = h @ weight.t()

    def backward() -> None:
        torch.mm(h, weight.t(), out=z)
        z @ weight
        total.addmm_(z.t(), h)

    return z, backward


def matmuls_tiled(problem: Problem) -> tuple[torch.Tensor, Backward]:
    """The same products in the tiles of ``ours``, with nothing between them."""
    weight, total = problem.weight_VH.detach(), problem.weight_VH.grad
    assert total is not None
    memory = weight.new_empty(problem.chunk * min(COLUMNS, len(weight)))

    def tiles():  # type: ignore[no-untyped-def]
        for h in problem.gathered_TH.split(problem.chunk):
            for rows, grad in zip(weight.split(COLUMNS), total.split(COLUMNS), strict=True):
                yield h, rows, grad, torch.mm(h, rows.t(), out=memory[: len(h) * len(rows)].view(len(h), len(rows)))

    def backward() -> None:
        dh = torch.zeros_like(problem.gathered_TH[: problem.chunk])
        for h, rows, grad, z in tiles():
            dh[: len(h)].addmm_(z, rows)
            grad.addmm_(z.t(), h)

    for _ in tiles():
        pass
    return memory, backward


HEADS: dict[str, Callable[[Problem], tuple[torch.Tensor, Backward]]] = {
    "ours": ours,
    "matmuls": matmuls,
    "matmuls-tiled": matmuls_tiled,
    "full-logits": full_logits,
    "megatron": megatron,
}
"""Each runs forward and returns (its logprobs, or for the products alone anything; what runs backward)."""
