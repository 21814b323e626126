"""Hugging Face tensors and Megatron parameters: one table serves loading, saving and weight sync.

A family (one file beside this one) is a list of ``WeightRule``. A rule says which Hugging Face tensors make up one
Megatron parameter, how each of them is cut over tensor-parallel ranks, and how the pieces of one rank are joined.
Cutting and joining commute, so a rank reads and joins only its own pieces, and a gather of split pieces along the cut
gives the Hugging Face tensors back: nobody ever holds a whole model.

Layers and experts are numbered globally in both name spaces; ``policy`` translates a stage's local numbers.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Literal

import torch

from megatron_gspo.errors import WeightError

Cut = Literal["whole", "rows", "columns", "vocabulary"]
"""How a tensor is spread over tensor-parallel ranks: not at all, along dimension 0, along dimension 1, or along
dimension 0 after padding the vocabulary with zero rows to a multiple of the ranks."""


def only(pieces: Sequence[torch.Tensor]) -> torch.Tensor:
    """The join of a parameter that is one Hugging Face tensor."""
    (piece,) = pieces
    return piece


def alone(parameter: torch.Tensor) -> list[torch.Tensor]:
    """The split that undoes ``only``."""
    return [parameter]


@dataclass(frozen=True)
class WeightRule:
    """One Megatron parameter and the Hugging Face tensors that it is made of."""

    megatron: str
    """Name with ``{layer}`` and ``{expert}`` where it has them."""
    hf: tuple[str, ...]
    """Names of its tensors, in the order in which ``join`` takes them."""
    cut: Cut
    """How each of the tensors is cut over tensor-parallel ranks (expert-tensor ranks for an expert)."""
    join: Callable[[Sequence[torch.Tensor]], torch.Tensor] = only
    """One rank's pieces -> its parameter."""
    split: Callable[[torch.Tensor], list[torch.Tensor]] = alone
    """One rank's parameter -> its pieces; the inverse of ``join``."""
    starts_at_zero: bool = False
    """Whether it is 0 where a directory has no such tensor: a head that training begins with."""

    @property
    def is_expert(self) -> bool:
        """Whether there is one of it for each expert."""
        return "{expert}" in self.megatron

    @cached_property
    def pattern(self) -> re.Pattern[str]:
        """Matches its Megatron names."""
        text = re.escape(self.megatron)
        return re.compile(text.replace(r"\{layer\}", r"(?P<layer>\d+)").replace(r"\{expert\}", r"(?P<expert>\d+)"))

    def in_layer(self, is_moe: bool) -> bool:
        """Whether such a layer has the parameter: a table lists a dense MLP and a mixture of experts side by side."""
        return ".mlp." not in self.megatron or is_moe != (".mlp.linear_fc" in self.megatron)


@dataclass(frozen=True)
class NamedRule:
    """A rule with its layer and expert filled in."""

    rule: WeightRule
    hf_names: tuple[str, ...]


def find_rule(rules: Sequence[WeightRule], megatron_name: str) -> NamedRule:
    """The rule of a Megatron parameter (globally numbered). Raises WeightError when the table has none."""
    for rule in rules:
        match = rule.pattern.fullmatch(megatron_name)
        if match:
            return NamedRule(rule, tuple(name.format(**match.groupdict()) for name in rule.hf))
    raise WeightError(f"no rule for the Megatron parameter {megatron_name}: the family's table in hf/ lacks it")


def take_piece(tensor: torch.Tensor, cut: Cut, rank: int, size: int) -> torch.Tensor:
    """One tensor-parallel rank's piece of a Hugging Face tensor (a view where the cut allows it)."""
    if cut == "whole":
        return tensor
    if cut == "vocabulary":
        return _vocabulary_piece(tensor, rank, size)
    dimension = 0 if cut == "rows" else 1
    length = tensor.shape[dimension]
    if length % size:
        raise WeightError(f"dimension {dimension} of shape {tuple(tensor.shape)} does not divide over {size} ranks")
    return tensor.narrow(dimension, rank * (length // size), length // size)


def put_together(pieces: Sequence[torch.Tensor], cut: Cut, vocab_size: int) -> torch.Tensor:
    """All ranks' pieces, in rank order -> the Hugging Face tensor; vocabulary padding is taken off."""
    if cut == "whole":
        return pieces[0]
    whole = torch.cat(list(pieces), dim=1 if cut == "columns" else 0)
    return whole[:vocab_size] if cut == "vocabulary" else whole


def padded_vocab_size(vocab_size: int, size: int) -> int:
    """Rows of the embedding over ``size`` tensor-parallel ranks: the next multiple."""
    return -(-vocab_size // size) * size


def _vocabulary_piece(tensor: torch.Tensor, rank: int, size: int) -> torch.Tensor:
    rows = padded_vocab_size(tensor.shape[0], size) // size
    piece = tensor[rank * rows : (rank + 1) * rows]
    if len(piece) == rows:
        return piece
    return torch.cat([piece, piece.new_zeros(rows - len(piece), *piece.shape[1:])])
