"""Checkpoints of models, weights and optimizer, in Megatron-Core's sharded format (``torch_dist``).

Ranks write their own shards, and every tensor is addressed by its place in the whole model, so a checkpoint of one
layout loads at any other. A checkpoint holds a dictionary of models; the tensors of "policy" have Megatron's own names,
and those of another its name before them ("critic.decoder..."). Beside Megatron's files lies ``checkpoint.json``: the
steps, the models' shapes, a hash of each file, and what the caller wants back. ``checkpoint_write`` is how a checkpoint
reaches the disk, ``checkpoint_files`` the rules of its files.
"""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from megatron.core.dist_checkpointing.dict_utils import nested_values
from megatron.core.dist_checkpointing.mapping import ShardedObject, ShardedTensor, ShardedTensorFactory
from megatron.core.dist_checkpointing.utils import add_prefix_for_sharding
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer
from torch.distributed.checkpoint.metadata import Metadata

from megatron_gspo.errors import WeightError
from megatron_gspo.hf.family import ModelShape
from megatron_gspo.megatron.checkpoint_files import read_header, read_metadata, verify
from megatron_gspo.megatron.checkpoint_stream import DistributedReader
from megatron_gspo.megatron.checkpoint_write import PendingSave, Share, pieces_of, place_of, to_write
from megatron_gspo.megatron.lora import sharded_adapters
from megatron_gspo.megatron.optimizer import finish_gathers
from megatron_gspo.parallel.exchange import broadcast_object, together

if TYPE_CHECKING:
    from megatron_gspo.megatron.network import Network

Models = Mapping[str, "Network"]
"""By the name that a model has in a checkpoint; "policy" is one of them."""
POLICY = "policy"
ADAPTERS = "lora"
"""In ``checkpoint.json`` of a policy with adapters: what they are, and a hash of the weights that they stand on."""
STATE = "optimizer.state."
"""Before the name of a parameter's state and the parameter's own key."""


@torch.no_grad()
def save_checkpoint(models: Models, directory: Path, extra: Mapping[str, Any]) -> None:
    """Writes weights, optimizer states and the first rank's ``extra`` (whatever JSON can hold). Collective.

    It is written under another name, hashed, synced to disk and moved when it is whole; a checkpoint that was at
    ``directory`` is replaced. Weights keep the model's dtype, master weights and moments theirs.
    Raises WriteError, on every rank, when a rank cannot write its share; TypeError when ``extra`` is not JSON.
    """
    begin_save(models, directory, extra).finish()


@torch.no_grad()
def begin_save(models: Models, directory: Path, extra: Mapping[str, Any], *, background: bool = False) -> PendingSave:
    """Starts ``save_checkpoint`` and returns while a thread of each rank writes. Collective.

    Nothing has its name before ``finish`` of what is returned. With ``background`` training may go on meanwhile: what
    is written are copies in host memory, made here. Without, a rank holds copies of a few tensors at a time.
    """
    policy = models[POLICY]
    header = {"step": _steps_taken(policy), "model": plain(policy.shape), "extra": dict(extra)}
    others = {
        name: {"step": _steps_taken(model), "model": plain(model.shape)}
        for name, model in models.items()
        if name != POLICY
    }
    header |= {"models": others} if others else {}
    header |= {} if policy.adapters_header is None else {ADAPTERS: policy.adapters_header}
    json.dumps(header)
    shares = (_on_host(share, copy=background) for share in _shares(models))
    return PendingSave(shares, directory, header, policy.groups.world, background=background)


@torch.no_grad()
def load_checkpoint(models: Models, directory: Path) -> dict[str, Any]:
    """Fills models from a checkpoint of any layout and returns its ``extra``. Collective.

    Every file is held against the hash that was written with it before it is read; ranks share the work. Learning
    rates, betas and weight decay stay those of the configuration. A model that is not trained loads its weights only;
    models of the checkpoint that nobody asks for are left.
    Raises WeightError, on every rank, when the checkpoint is missing, damaged or of other models.
    """
    header, metadata = _verified(models, directory)

    def load() -> None:
        with contextlib.closing(DistributedReader(directory, metadata)) as reader:
            for name, model in models.items():
                weights = _sharded_weights(model, prefix_of(name))
                _load_weights(reader, weights)
                _load_states(reader, model, weights)

    together(load, models[POLICY].groups.world)
    for name, model in models.items():
        _count_steps(model, header["step"] if name == POLICY else header["models"][name]["step"])
    return header["extra"]


@torch.no_grad()
def load_weights_of(model: Network, directory: Path) -> None:
    """Fills a model's weights alone from the policy of a checkpoint that training or ``convert`` wrote, in any dtype;
    a value head, which no policy has, keeps its own. Collective.

    Raises WeightError as ``load_checkpoint`` does.
    """
    _, metadata = _verified({POLICY: model}, directory)

    def load() -> None:
        with contextlib.closing(DistributedReader(directory, metadata)) as reader:
            _load_weights(reader, _sharded_weights(model), but="output_layer." if model.valued else None)

    together(load, model.groups.world)


def prefix_of(name: str) -> str:
    """What a model's keys begin with in a checkpoint."""
    return "" if name == POLICY else f"{name}."


def _sharded_weights(model: Network, prefix: str = "") -> dict[str, Any]:
    finish_gathers(model.modules)
    state = {
        _chunk_entry(index): chunk.sharded_state_dict(metadata={"dp_cp_group": model.groups.data_context})
        if chunk.lora is None
        else sharded_adapters(chunk)  # the weights below them are model.path's
        for index, chunk in enumerate(model.chunks)
    }
    if prefix:
        add_prefix_for_sharding(state, prefix)
    return state


def _chunk_entry(index: int) -> str:
    return f"model{index}"


# -------------------------------------------------------------------------------------------------------- writing


def _shares(models: Models) -> Iterator[Share]:
    """What this rank writes of all models, one tensor after the other. Collective."""
    for name, model in models.items():
        weights = _sharded_weights(model, prefix_of(name))
        for entry in nested_values(weights):
            yield from to_write(entry)
        for optimizer, number, parameter, shard in _stepped(model, weights):
            yield from _states_to_write(optimizer, number, parameter, shard)


def _stepped(
    model: Network, weights: dict[str, Any]
) -> Iterator[tuple[DistributedOptimizer, int, torch.nn.Parameter, ShardedTensor | ShardedTensorFactory]]:
    """Every parameter that an optimizer steps, numbered in an order that its data-parallel ranks share; its place."""
    shard_of = {entry.data: entry for entry in nested_values(weights) if not isinstance(entry, ShardedObject)}
    for optimizer in _optimizers(model):
        parameters = itertools.chain(*(buffer.param_index_map for buffer in optimizer.buffers))
        for number, parameter in enumerate(parameters):
            yield optimizer, number, parameter, shard_of[parameter]


def _states_to_write(
    optimizer: DistributedOptimizer,
    number: int,
    parameter: torch.nn.Parameter,
    shard: ShardedTensor | ShardedTensorFactory,
) -> Iterator[Share]:
    """Master weight and moments, put together on one of the parameter's data-parallel ranks; they take turns.

    Laid out as Megatron's ``fully_reshardable`` is: three tensors per parameter, in the parameter's shape and place. We
    put them together ourselves, since 0.16.1 takes the wrong elements wherever a buffer has two buckets with padding
    between them, which a tied embedding under pipeline parallelism makes.
    """
    ranks = optimizer.data_parallel_group
    writer = number % ranks.size()
    own = _own_states(optimizer, parameter)
    wide = torch.promote_types(parameter.dtype, torch.float32)
    for key, dtype in optimizer.optimizer.dtypes(parameter.dtype).items():
        whole = torch.zeros(parameter.numel(), dtype=wide, device=parameter.device)
        if own is not None:
            piece, tensors = own
            whole[piece] = tensors[key].to(whole.device)
        dist.reduce(whole, group=ranks, group_dst=writer)  # elsewhere it is zero
        if writer == ranks.rank():
            yield from to_write(_at_place_of(shard, key, whole.to(dtype).view(parameter.shape)))


def _at_place_of(shard: ShardedTensor | ShardedTensorFactory, key: str, whole: torch.Tensor) -> Any:
    """A state of a parameter as a shard: its only replica over data-parallel ranks, so this rank writes it."""
    dtype = {} if isinstance(shard, ShardedTensorFactory) else {"dtype": whole.dtype}
    replica = (*shard.replica_id[:2], 0)
    return dataclasses.replace(shard, key=f"{STATE}{key}.{shard.key}", data=whole, replica_id=replica, **dtype)


def _on_host(share: Share, *, copy: bool) -> Share:
    """Its tensor in host memory; with ``copy`` no live one: states were put together for this, weights were not."""
    if share.tensor is None:
        return share
    live = STATE not in share.key
    return dataclasses.replace(share, tensor=share.tensor.to("cpu", copy=copy and live))


# -------------------------------------------------------------------------------------------------------- reading


def _load_weights(reader: DistributedReader, weights: dict[str, Any], *, but: str | None = None) -> None:
    """Fills live weights, a block at a time, ``but`` those whose names begin so. Raises WeightError.

    Objects beside them are Megatron's, and there is nothing in them: they are not read.
    """
    for shards in weights.values():
        for name, entry in shards.items():
            if but is None or not name.startswith(but):
                for part in nested_values({name: entry}):
                    if not isinstance(part, ShardedObject):
                        _read_into(reader, part)


def _load_states(reader: DistributedReader, model: Network, weights: dict[str, Any]) -> None:
    """Fills this rank's master weights and moments, one tensor after the other. Raises WeightError."""
    for optimizer, _, parameter, shard in _stepped(model, weights):
        own = _own_states(optimizer, parameter)
        if own is not None:
            piece, tensors = own
            wide = torch.promote_types(parameter.dtype, torch.float32)
            for key in optimizer.optimizer.dtypes(parameter.dtype):
                whole = torch.zeros(parameter.shape, dtype=wide)
                _read_into(reader, _at_place_of(shard, key, whole))
                tensors[key].copy_(whole.flatten()[piece])


def _read_into(reader: DistributedReader, shard: ShardedTensor | ShardedTensorFactory) -> None:
    """Fills a shard's tensor from wherever its blocks lie; rows of padding that the checkpoint's layout had none of
    stay as they are."""
    for part in pieces_of(shard):
        offset, shape = place_of(part)
        if part.allow_shape_mismatch:
            stored = reader.shape(part.key)
            shape = tuple(max(0, min(n, most - at)) for at, n, most in zip(offset, shape, stored, strict=True))
        if 0 not in shape:
            there = part.data.detach().view(place_of(part)[1])
            there[tuple(map(slice, shape))] = reader.read(part.key, offset, shape)


def _own_states(
    optimizer: DistributedOptimizer, parameter: torch.nn.Parameter
) -> tuple[slice, dict[str, torch.Tensor]] | None:
    """(elements of the flat parameter that this rank steps, their live states), or None where it steps none."""
    if parameter not in optimizer.model_param_gbuf_map:
        return None
    piece = optimizer._get_model_param_range_map(parameter)["param"]
    group, place = optimizer.model_param_group_index_map[parameter]
    shard = optimizer.optimizer.param_groups[group]["params"][place]
    return slice(piece.start, piece.end), optimizer.optimizer.state[shard]


def _optimizers(policy: Network) -> list[DistributedOptimizer]:
    """The distributed optimizers of this rank: of dense parameters, and of experts."""
    return [] if policy.optimizer is None else policy.optimizer.parts()


def _counters(policy: Network) -> Iterator[dict[str, torch.Tensor]]:
    """What counts steps, of each shard."""
    for optimizer in _optimizers(policy):
        yield from optimizer.optimizer.state.values()


def _steps_taken(policy: Network) -> int:
    return max((int(holder["step"]) for holder in _counters(policy)), default=0)


def _count_steps(policy: Network, step: int) -> None:
    """Counts ``step`` steps as taken."""
    for holder in _counters(policy):
        holder["step"].fill_(step)


def _verified(models: Models, directory: Path) -> tuple[dict[str, Any], Metadata]:
    """``checkpoint.json`` and what describes the tensors, once every file that it lists was verified; on every rank.

    One rank reads them, and tells the others: of a thousand ranks each would read a file of many megabytes, slowly,
    since pickles are not trusted. Raises WeightError on all.
    """
    world = models[POLICY].groups.world
    first = dist.get_rank() == 0
    header = together(lambda: header_of_models(directory, models) if first else None, world)
    header = broadcast_object(header, 0, world)
    together(lambda: verify(directory, header["files"][dist.get_rank() :: dist.get_world_size()]), world)
    metadata = together(lambda: read_metadata(directory) if first else None, world)
    return header, broadcast_object(metadata, 0, world)


def header_of_models(directory: Path, models: Models) -> dict[str, Any]:
    """``checkpoint.json`` of a checkpoint of such models. Raises WeightError."""
    header = read_header(directory)
    _check_same(directory, models[POLICY].shape, header["model"])
    check_adapters(directory, header, models[POLICY].adapters_header)
    kept = header.get("models", {})
    for name, model in models.items():
        if name != POLICY:
            if name not in kept:
                raise WeightError(f"{directory}: a checkpoint without a {name}: it was saved by a run that had none")
            _check_same(directory, model.shape, kept[name]["model"])
    return header


def check_adapters(directory: Path, header: Mapping[str, Any], wanted: Mapping[str, Any] | None = None) -> None:
    """Raises WeightError unless a checkpoint has adapters as the policy has, by default none, on the same weights."""
    kept: dict[str, Any] | None = header.get(ADAPTERS)
    if kept is None and wanted is None:
        return
    if wanted is None:
        assert kept is not None
        raise WeightError(
            f"{directory} holds adapters of rank {kept['rank']} alone: {kept['model']} with them merged in is in the "
            f"run's directory, in hf/ and exports/"
        )
    if kept is None:
        raise WeightError(f"{directory} holds all weights, and no adapters: it was saved with lora.rank = 0")
    for name in ("rank", "alpha", "rslora", "targets", "weights"):
        if kept[name] != wanted[name]:
            what = f"adapters on other weights than {wanted['model']} has" if name == "weights" else "other adapters"
            raise WeightError(f"{directory} holds {what}: {name} {kept[name]} then, {wanted[name]} now")


def header_of_model(directory: Path, name: str, shape: ModelShape) -> dict[str, Any]:
    """``checkpoint.json`` of a checkpoint that holds such a model as ``name``. Raises WeightError."""
    header = read_header(directory)
    kept = {POLICY: header["model"]} | {other: each["model"] for other, each in header.get("models", {}).items()}
    if name not in kept:
        raise WeightError(
            f"{directory}: it holds {' and '.join(f'the {each}' for each in kept)}, and no {name}: name one of these"
        )
    _check_same(directory, shape, kept[name])
    return header


def _check_same(directory: Path, shape: ModelShape, kept: Mapping[str, Any]) -> None:
    for name, mine in _flat(plain(shape)).items():
        theirs = _flat(kept).get(name)
        if theirs != mine:
            raise WeightError(
                f"{directory}: a checkpoint of another model: {name} is {theirs!s:.80} there and {mine!s:.80} here: "
                f"bring back the config.json that it was made with"
            )


def _flat(model: Mapping[str, Any]) -> dict[str, Any]:
    """A model's fields, and those of Megatron's settings among them."""
    further = model.get("megatron")
    return {**model, **further, "megatron": sorted(further)} if isinstance(further, dict) else dict(model)


def plain(shape: ModelShape) -> dict[str, Any]:
    """The model's shape as JSON gives it back."""
    return json.loads(json.dumps(dataclasses.asdict(shape)))
