"""The model that is planned for: a Hugging Face directory, a ``config.json`` alone, or a published shape by its
name."""

from __future__ import annotations

import difflib
import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from functools import cached_property, lru_cache
from math import prod
from pathlib import Path
from typing import Any

from megatron_gspo.config import LoraConfig
from megatron_gspo.doctor.tensors import Tensor, adapters_of, tensors_of
from megatron_gspo.errors import ConfigError
from megatron_gspo.hf.catalog import model_of, read_config
from megatron_gspo.hf.family import Family, ModelShape
from megatron_gspo.hf.weights import Cut
from megatron_gspo.untrusted import read_json

SHAPES = Path(__file__).with_name("shapes.json")
"""{name: {source, config}}: what the named ``config.json`` says of sizes."""

TUNED = ("-base", "-instruct")
"""What names of models end in whose sizes are those of the name without it."""


@dataclass(frozen=True, eq=False)
class Model:
    """Sizes; no weights are read."""

    name: str
    path: str
    """What ``model.path`` of a written configuration says."""
    config: Mapping[str, Any]
    """``config.json``."""
    family: Family
    shape: ModelShape
    tensors: tuple[Tensor, ...]
    """All of them, for ``doctor.estimate``: in a layer, tensors that are cut in the same way are one, which leaves
    every sum as it is and makes it a hundred times as fast."""
    every: tuple[Tensor, ...]
    """All of them, each by itself."""

    @property
    def parameters(self) -> int:
        """Elements of all tensors, a tied head once."""
        tied = self.shape.vocab_size * self.shape.hidden_size if self.shape.tied_embeddings else 0
        return sum(prod(tensor.shape) for tensor in self.tensors) - tied

    @cached_property
    def matrices(self) -> Matrices:
        """What a token is multiplied by."""
        square = [tensor for tensor in self.every if tensor.layer is not None and len(tensor.shape) > 1]
        return Matrices(
            dense=sum(prod(tensor.shape) for tensor in square if not tensor.is_expert),
            experts=sum(prod(tensor.shape) for tensor in square if tensor.is_expert),
            head=self.shape.vocab_size * self.shape.hidden_size,
            share=self.shape.top_k / self.shape.num_experts if self.shape.num_experts else 0.0,
        )


@dataclass(frozen=True)
class Matrices:
    """Elements of weights that multiply tokens; a lookup of the embedding multiplies nothing."""

    dense: int
    """Of layers: every token goes through them."""
    experts: int
    """Of all experts."""
    head: int
    share: float
    """top_k / experts: a token's share of the experts."""

    @property
    def active(self) -> float:
        """Those of one token."""
        return self.dense + self.experts * self.share + self.head


def names() -> tuple[str, ...]:
    """The published shapes."""
    return tuple(_shapes())


def find_model(text: str) -> Model:
    """A directory, a ``config.json`` or a name. Raises ConfigError for none of them, or a model that is not
    supported."""
    path = Path(text)
    if path.is_dir():
        return _model(path.resolve().name, text, read_config(path))
    if path.is_file():
        try:
            config = read_json(path)
        except (OSError, ValueError) as error:
            raise ConfigError(f"{path}: {error}") from None
        if not isinstance(config, dict):
            raise ConfigError(f"{path}: holds a {type(config).__name__}, not an object of settings")
        return _model(path.resolve().parent.name, str(path.parent), config)
    name, shapes = text.rpartition("/")[2].lower(), _shapes()
    for end in TUNED:
        name = name.removesuffix(end)
    if name not in shapes:
        near = difflib.get_close_matches(name, shapes, n=1)
        hint = f"did you mean {near[0]}?" if near else f"known names: {', '.join(shapes)}"
        raise ConfigError(f"{text}: no directory, no config.json and no name of a published shape ({hint})")
    source = shapes[name]["source"].split("/")
    return _model(name, f"{source[3]}/{source[4]}", shapes[name]["config"])


def _shapes() -> dict[str, Any]:
    shapes: dict[str, Any] = json.loads(SHAPES.read_text(encoding="utf-8"))
    return shapes


def _model(name: str, path: str, config: dict[str, Any]) -> Model:
    family, shape = model_of(config, path)
    every = tuple(tensors_of(family, shape))
    return Model(name, path, config, family, shape, tuple(_merged(every)), every)


@lru_cache(maxsize=64)
def adapters(model: Model, lora: LoraConfig) -> tuple[Tensor, ...]:
    """A model's adapters as ``Model.tensors`` are: those of a layer that are cut in the same way are one."""
    return tuple(_merged(adapters_of(model.family, model.shape, lora)))


def _merged(tensors: Iterable[Tensor]) -> Iterable[Tensor]:
    """In each layer one tensor for each kind of cut; what lies outside of layers stays as it is."""
    sums: dict[tuple[int, bool, bool], int] = {}
    for tensor in tensors:
        if tensor.layer is None:
            yield tensor
        else:
            key = (tensor.layer, tensor.is_expert, tensor.cut == "whole")
            sums[key] = sums.get(key, 0) + prod(tensor.shape)
    plain = Tensor("", (0, 1), "rows", "merged", None, False)
    for (layer, is_expert, whole), size in sums.items():
        cut: Cut = "whole" if whole else "rows"
        yield replace(plain, shape=(size, 1), cut=cut, layer=layer, is_expert=is_expert)
