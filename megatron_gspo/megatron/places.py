"""Where each Megatron parameter of a model lies in a distributed checkpoint, asked of Megatron itself.

The model is built at a layout of one rank without touching its memory, and its ``sharded_state_dict`` read: names,
places and shapes are those that training writes, whatever Megatron's version, and no table here repeats them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from megatron.core.dist_checkpointing.mapping import ShardedObject, ShardedTensor, ShardedTensorFactory
from megatron.core.dist_checkpointing.utils import add_prefix_for_sharding

from megatron_gspo.config import ModelConfig, ParallelConfig
from megatron_gspo.hf.family import Family, ModelShape
from megatron_gspo.hf.weights import NamedRule, find_rule
from megatron_gspo.megatron.groups import Groups
from megatron_gspo.megatron.model import PolicyModel, transformer_config

Size = tuple[int, ...]


@dataclass(frozen=True)
class Piece:
    """A block of a checkpoint's tensor: rows of one parameter."""

    key: str
    """Of the tensor in the checkpoint; experts of a layer share one."""
    whole: Size
    """The tensor's shape."""
    offset: Size
    """The block's first element in it."""
    size: Size
    """The block's, with a 1 for each dimension that the parameter does not have."""

    prepended: int
    """Leading dimensions that the parameter does not have (the expert)."""

    @property
    def rows(self) -> int:
        """Of the parameter that this piece is."""
        return self.size[self.prepended]


@dataclass(frozen=True)
class Place:
    """One parameter of the whole model, in Hugging Face names and in a checkpoint's."""

    name: str
    """Megatron's, layers and experts numbered over the whole model."""
    named: NamedRule
    shape: Size
    pieces: tuple[Piece, ...]
    """Along its first dimension, in order."""


@dataclass(frozen=True)
class Places:
    """Of a model: every parameter, and the keys of objects that Megatron keeps beside them (nothing is in them)."""

    parameters: tuple[Place, ...]
    objects: tuple[str, ...]


def find_places(family: Family, shape: ModelShape, groups: Groups, *, prefix: str = "", valued: bool = False) -> Places:
    """Builds one rank's model, on ``groups`` of tensor, pipeline and expert size 1, and reads its places.

    ``prefix``: before its keys, as a checkpoint has it of other models than the policy; ``valued``: with a value head.
    """
    model = ModelConfig(path="unused", dtype="bfloat16", kernels="reference")  # a parameter an expert
    settings = transformer_config(model, ParallelConfig(), shape, groups)
    chunk = PolicyModel(settings, shape, groups, model, valued=valued)
    rules = family.rules(shape)
    places, objects = [], []
    taken: set[tuple[str, Size]] = set()
    state = chunk.sharded_state_dict(metadata={"dp_cp_group": groups.data_context})
    if prefix:
        add_prefix_for_sharding(state, prefix)
    for name, entry in state.items():
        if isinstance(entry, ShardedObject):
            objects.append(entry.unique_key)
            continue
        pieces = tuple(map(_piece, _shards(entry)))
        first = (pieces[0].key, pieces[0].offset)
        if first not in taken:  # a tied head is the embedding once more
            taken.add(first)
            places.append(Place(name, find_rule(rules, name), tuple(entry.data.shape), pieces))
    return Places(tuple(places), tuple(objects))


def _shards(entry: ShardedTensor | ShardedTensorFactory) -> Sequence[ShardedTensor]:
    return entry.build() if isinstance(entry, ShardedTensorFactory) else [entry]


def _piece(shard: ShardedTensor) -> Piece:
    prepended = shard.prepend_axis_num
    assert shard.global_shape[prepended + 1 :] == shard.local_shape[1:], f"{shard.key} is cut along a second dimension"
    size = (1,) * prepended + tuple(shard.local_shape)
    return Piece(shard.key, tuple(shard.global_shape), tuple(shard.global_offset), size, prepended)
