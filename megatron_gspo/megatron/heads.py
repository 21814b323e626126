"""What the last pipeline stage makes of its hidden states: logprobs, values, or logits.

A head is handed to a forward pass; the model has the parameters that it takes. Adding one is a class here.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

import torch

from megatron_gspo.kernels.products import wide_product
from megatron_gspo.parallel.exchange import gather_pieces
from megatron_gspo.parallel.logprobs import vocab_parallel_logprobs

if TYPE_CHECKING:
    from megatron_gspo.megatron.model import PolicyModel


class Head(Protocol):
    """Hidden states of a micro-batch -> what one pass over it gives."""

    def __call__(self, model: PolicyModel, labels_T: torch.Tensor, hidden_TH: torch.Tensor) -> torch.Tensor:
        """Rows of values per token, [rows, T_local]; called on the last stage. Collective over tensor ranks.

        Args:
            model: the last stage, which has the head's parameters.
            labels_T: [T / context] of this context rank's tokens.
            hidden_TH: [T_local, H], this tensor rank's slice of them.
        """
        ...


@dataclass(frozen=True)
class LogprobHead:
    """[2, T_local]: logprobs of the labels and, without gradient, entropies; of logits / temperature."""

    temperature: float = 1.0

    def __call__(self, model: PolicyModel, labels_T: torch.Tensor, hidden_TH: torch.Tensor) -> torch.Tensor:
        logprobs, entropy = vocab_parallel_logprobs(
            hidden_TH,
            model.vocabulary_weight(),
            labels_T,
            group=model.groups.tensor,
            vocab_size=model.shape.vocab_size,
            temperature=self.temperature,
            chunk=model.chunk,
            kernel=model.kernels["head"],
        )
        return torch.stack([logprobs, entropy])


@dataclass(frozen=True)
class LogitsHead:
    """[T / context, V]: whole logits without a temperature, float32 or better; for comparing checkpoints only."""

    def __call__(self, model: PolicyModel, labels_T: torch.Tensor, hidden_TH: torch.Tensor) -> torch.Tensor:
        group = model.groups.tensor
        hidden = torch.cat(gather_pieces(hidden_TH, group))
        shard = wide_product(hidden, model.vocabulary_weight().T)
        return torch.cat(gather_pieces(shard, group), dim=1)[:, : model.shape.vocab_size]


@dataclass(frozen=True)
class ValueHead:
    """[1, T_local]: V of the state that each token leads to, w . h + b in float32 (float64 in a float64 run)."""

    def __call__(self, model: PolicyModel, labels_T: torch.Tensor, hidden_TH: torch.Tensor) -> torch.Tensor:
        dtype = torch.promote_types(hidden_TH.dtype, torch.float32)
        weight, bias = (parameter.to(dtype) for parameter in (model.output_layer.weight, model.output_layer.bias))
        return (hidden_TH.to(dtype) @ weight.T + bias).T


class ValueOutput(torch.nn.Module):
    """The parameters of a value head, whole on every tensor rank, in the place of those over the vocabulary.

    Each tensor rank sees its own slice of the tokens, so gradients are summed over them, as those of norms are.
    """

    def __init__(self, hidden_size: int, dtype: torch.dtype, *, sequence_parallel: bool) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(1, hidden_size, dtype=dtype))
        self.bias = torch.nn.Parameter(torch.zeros(1, dtype=dtype))
        for parameter in (self.weight, self.bias):
            parameter.sequence_parallel = sequence_parallel  # type: ignore[attr-defined]
