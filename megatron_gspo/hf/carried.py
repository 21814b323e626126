"""Layers that checkpoints store and nothing here computes (multi-token prediction): their tensors travel as they are.

A Hugging Face directory has them among its other tensors. Beside a converted Megatron checkpoint they lie in
safetensors files of their own: ``carried.safetensors``, or several and ``carried.safetensors.index.json``.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch

from megatron_gspo.hf.checkpoint import HfReader
from megatron_gspo.hf.family import ModelShape
from megatron_gspo.hf.names import MODEL, holds_weights

CARRIED = "carried"
"""What their files beside a Megatron checkpoint are called, as others are ``model``."""


@dataclass(frozen=True)
class Carried:
    """The carried tensors of one directory."""

    reader: HfReader | None
    """None where the directory has none."""
    names: tuple[str, ...]

    def tensors(self) -> Iterator[tuple[str, torch.Tensor]]:
        """(name, tensor as stored), one at a time. Raises WeightError as ``HfReader.read`` does."""
        for name in self.names:
            assert self.reader is not None
            yield name, self.reader.read(name)


def find_carried(directory: Path, model: ModelShape) -> Carried:
    """What a directory of either kind carries; nothing where it stores nothing. Raises WeightError."""
    for stem in (CARRIED, MODEL) if model.carried_layers else ():
        if holds_weights(directory, stem):
            reader = HfReader(directory, stem)
            return Carried(reader, carried_names(reader.names(), model))
    return Carried(None, ())


def carried_names(names: Iterable[str], model: ModelShape) -> tuple[str, ...]:
    """Those of the layers behind the last, sorted."""
    behind = range(model.num_layers, model.num_layers + model.carried_layers)
    prefixes = tuple(f"model.layers.{layer}." for layer in behind)
    return tuple(sorted(name for name in names if name.startswith(prefixes)))
