"""Gradients and parameters of a rank, held against the reference's files."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from safetensors import safe_open

from megatron_gspo.hf.weights import take_piece
from megatron_gspo.megatron.export import complete_gradients, gradient_of, weight_of
from megatron_gspo.megatron.model import Own
from megatron_gspo.megatron.network import Network
from megatron_gspo.megatron.optimizer import finish_gathers
from megatron_gspo.parity.parts import Difference

GRADIENTS, PARAMETERS = "gradients-{step}.safetensors", "parameters-{step}.safetensors"
"""Of each step, counted from 0, in the reference's directory."""


def gradient_copies(policy: Network, reference: Path) -> dict[str, Difference]:
    """Every gradient that this rank holds a copy or a piece of. Collective: makes gradients whole over data ranks."""
    for module in policy.modules:
        complete_gradients(module)
    return _copies(policy, gradient_of, reference)


def parameter_copies(policy: Network, reference: Path) -> dict[str, Difference]:
    """Every trained parameter that this rank has a copy or a piece of, from its own memory: none speaks for another."""
    finish_gathers(policy.modules)
    return _copies(policy, weight_of, reference)


@torch.no_grad()
def compare(tensors: Iterator[tuple[str, torch.Tensor]], reference: Path) -> dict[str, Difference]:
    """Whole tensors against the reference's of their names; a name that only one has is an error."""
    found: dict[str, Difference] = {}
    with safe_open(reference, framework="pt", device="cpu") as file:
        known = set(file.keys())
        for name, a in tensors:
            b = file.get_tensor(name) if name in known else torch.empty(0)
            found[name] = _difference(a, b, b)
    return found


@torch.no_grad()
def _copies(policy: Network, value: Callable[[Own], torch.Tensor | None], reference: Path) -> dict[str, Difference]:
    found: dict[str, Difference] = {}
    with safe_open(reference, framework="pt", device="cpu") as file:
        known = set(file.keys())
        for chunk in policy.chunks:
            for own, named in chunk.trained_rules(policy.family):
                mine = value(own)
                if mine is None:
                    continue
                groups = policy.groups
                ranks = groups.megatron.expt_tp if named.rule.is_expert else groups.tensor
                for name, a in zip(named.hf_names, named.rule.split(mine), strict=True):
                    whole = file.get_tensor(name) if name in known else torch.empty(0)
                    b = take_piece(whole, named.rule.cut, ranks.rank(), ranks.size()) if name in known else whole
                    found[name] = _worse(found.get(name), _difference(a.cpu(), b, whole))
    return found


def _difference(a: torch.Tensor, b: torch.Tensor, whole: torch.Tensor) -> Difference:
    """Of ``a`` from ``b``, a piece of ``whole``, which gives the scale."""
    error = (a.double() - b.double()).abs().max() if a.shape == b.shape else torch.tensor(torch.inf)
    scale = float(whole.double().abs().max()) if whole.numel() else 0.0
    return Difference(float(error) if error == error else float("inf"), scale)


def _worse(one: Difference | None, other: Difference) -> Difference:
    """A tied matrix lies twice on a rank that has both ends of the model."""
    return other if one is None or other.error > one.error else one
