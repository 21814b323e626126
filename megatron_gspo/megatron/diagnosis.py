"""Where a number that is not finite comes from: which weights, which layer, which gradients. Collective, and slow:
for a step that has failed."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch

from megatron_gspo.megatron.model import PolicyModel
from megatron_gspo.megatron.network import Network
from megatron_gspo.parallel.exchange import gather_objects
from megatron_gspo.types import PackedBatch

MOST_NAMED = 3
WATCHED = re.compile(r"embedding|decoder\.layers\.(\d+)\.(self_attention|mlp)|decoder\.final_layernorm")


def bad_weights(model: Network) -> str:
    """ "the weights of NAME, NAME and 7 more are not finite", in Hugging Face names; empty when all are finite."""
    return _said(_gathered(model, model.weights()), "the weights of {} are not finite")


def bad_gradients(model: Network) -> str:
    """The same of accumulated gradients, which are no good for a step afterwards."""
    return _said(_gathered(model, model.named_gradients()), "the gradients of {} are not finite")


def bad_layer(model: Network, batches: Sequence[PackedBatch]) -> str:
    """The first layer, in the model's order, whose output for these micro-batches is not finite, by one more forward
    pass; empty when there is none."""
    found: set[tuple[int, str]] = set()
    handles = [
        module.register_forward_hook(_look(place, found))
        for chunk in model.chunks
        for path, module in chunk.named_modules()
        if (place := _place_of(chunk, path)) is not None
    ]
    try:
        model.outputs(batches)
    finally:
        for handle in handles:
            handle.remove()
    everywhere = set[tuple[int, str]]().union(*gather_objects(found, model.groups.world))
    return f"the first output that is not finite is that of {min(everywhere)[1]}" if everywhere else ""


def _gathered(model: Network, tensors: Iterator[tuple[str, torch.Tensor]]) -> list[str]:
    own = [name for name, tensor in tensors if not bool(torch.isfinite(tensor).all())]
    return [name for part in gather_objects(own, model.groups.world) for name in part]


def _said(names: list[str], text: str) -> str:
    more = f" and {len(names) - MOST_NAMED} more" if len(names) > MOST_NAMED else ""
    return text.format(", ".join(names[:MOST_NAMED]) + more) if names else ""


def _place_of(chunk: PolicyModel, path: str) -> tuple[int, str] | None:
    """(order, name) of a module that is watched."""
    match = WATCHED.fullmatch(path)
    if match is None:
        return None
    if match[1] is None:
        return (-1, "the embedding") if path == "embedding" else (10**6, "the last norm")
    layer = chunk.layer_offset + int(match[1])
    attention = match[2] == "self_attention"
    return 2 * layer + (not attention), f"layer {layer}'s {'attention' if attention else 'MLP'}"


def _look(place: tuple[int, str], found: set[tuple[int, str]]) -> Callable[[Any, Any, Any], None]:
    def look(module: object, inputs: object, output: Any) -> None:
        tensors = output if isinstance(output, tuple) else (output,)
        if any(isinstance(each, torch.Tensor) and not bool(torch.isfinite(each).all()) for each in tensors):
            found.add(place)

    return look
