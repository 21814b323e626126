"""Checkpoints of models, weights and optimizer, in Megatron-Core's sharded format (``torch_dist``).

Ranks write their own shards, and every tensor is addressed by its place in the whole model, so a checkpoint of one
layout loads at any other. A checkpoint holds a dictionary of models; the tensors of "policy" have Megatron's own names,
and those of another its name before them ("critic.decoder..."). Beside Megatron's files lies ``checkpoint.json``: the
steps, the models' shapes, a hash of each file, and what the caller wants back. ``checkpoint_write`` is how a checkpoint
reaches the disk, ``checkpoint_files`` the rules of its files.
"""

from __future__ import annotations

import dataclasses
import itertools
import json
import pickle
import textwrap
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing.core import CheckpointingException
from megatron.core.dist_checkpointing.mapping import ShardedTensor, ShardedTensorFactory
from megatron.core.dist_checkpointing.utils import add_prefix_for_sharding
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer
from torch.distributed.checkpoint.api import CheckpointException

from megatron_gspo.errors import WeightError
from megatron_gspo.hf.family import ModelShape
from megatron_gspo.megatron.checkpoint_files import check_metadata, read_header, verify, weights_only
from megatron_gspo.megatron.checkpoint_write import PendingSave, address
from megatron_gspo.megatron.optimizer import finish_gathers
from megatron_gspo.parallel.exchange import broadcast_object, together

if TYPE_CHECKING:
    from megatron_gspo.megatron.network import Network

STATES = ("param", "exp_avg", "exp_avg_sq")
"""What Adam keeps of a parameter, in Megatron's names: the master weight and the two moments."""

States = dict[str, torch.Tensor]
Models = Mapping[str, "Network"]
"""By the name that a model has in a checkpoint; "policy" is one of them."""
POLICY = "policy"
StatesOf = Callable[[DistributedOptimizer, torch.nn.Parameter, int], States]
"""(optimizer, parameter, its number) -> states by name; empty where this rank neither writes nor reads them."""


@torch.no_grad()
def save_checkpoint(models: Models, directory: Path, extra: Mapping[str, Any]) -> None:
    """Writes weights, optimizer states and the first rank's ``extra`` (whatever JSON can hold). Collective.

    It is written under another name, hashed, synced to disk and moved when it is whole; a checkpoint that was at
    ``directory`` is replaced. Weights keep the model's dtype, optimizer state is float32 (float64 in a float64 run).
    Raises WriteError, on every rank, when a rank cannot write its share; TypeError when ``extra`` is not JSON.
    """
    begin_save(models, directory, extra).finish()


@torch.no_grad()
def begin_save(models: Models, directory: Path, extra: Mapping[str, Any], *, background: bool = False) -> PendingSave:
    """Starts ``save_checkpoint`` and returns while a thread of each rank writes. Collective.

    Nothing has its name before ``finish`` of what is returned. With ``background`` training may go on meanwhile: what
    is written are copies in host memory, made here.
    """
    policy = models[POLICY]
    header = {"step": _steps_taken(policy), "model": plain(policy.shape), "extra": dict(extra)}
    others = {
        name: {"step": _steps_taken(model), "model": plain(model.shape)}
        for name, model in models.items()
        if name != POLICY
    }
    header |= {"models": others} if others else {}
    json.dumps(header)
    chunks = [chunk for model in models.values() for chunk in model.chunks]
    tensors = (tensor for chunk in chunks for tensor in (*chunk.parameters(), *chunk.buffers()))
    live = frozenset(map(address, tensors if background else ()))
    return PendingSave(_states_of_all(models, _gathered_states), directory, header, policy.groups.world, live)


@torch.no_grad()
def load_checkpoint(models: Models, directory: Path) -> dict[str, Any]:
    """Fills models from a checkpoint of any layout and returns its ``extra``. Collective.

    Every file is held against the hash that was written with it before it is read; ranks share the work. Learning
    rates, betas and weight decay stay those of the configuration. A model that is not trained loads its weights only;
    models of the checkpoint that nobody asks for are left.
    Raises WeightError, on every rank, when the checkpoint is missing, damaged or of other models.
    """
    header = _verified_header(models, directory)
    loaded = _load_chunks(models, _states_of_all(models, _empty_states), directory)
    for name, model in models.items():
        _take_states(model, loaded, _prefix(name))
        _count_steps(model, header["step"] if name == POLICY else header["models"][name]["step"])
    return header["extra"]


@torch.no_grad()
def load_weights_of(model: Network, directory: Path) -> None:
    """Fills a model's weights alone from the policy of a checkpoint that training or ``convert`` wrote, in any dtype;
    a value head, which no policy has, keeps its own. Collective.

    Raises WeightError as ``load_checkpoint`` does.
    """
    models = {POLICY: model}
    _verified_header(models, directory)
    state = _sharded_weights(model)
    if model.valued:
        state = {
            chunk: {name: shard for name, shard in shards.items() if not name.startswith("output_layer.")}
            for chunk, shards in state.items()
        }
    _load_chunks(models, state, directory, strict=not model.valued)


def _load_chunks(models: Models, state: dict[str, Any], directory: Path, *, strict: bool = True) -> dict[str, Any]:
    # In 0.16.1 all ranks fail when one does; in 0.19.2 every rank reads by itself, and the others would go on.
    loaded = together(lambda: _read(state, directory), models[POLICY].groups.world)
    for name, model in models.items():
        for index, chunk in enumerate(model.chunks):
            chunk.load_state_dict(loaded[_prefix(name) + _chunk_entry(index)], strict=strict)
    return loaded


def _states_of_all(models: Models, states_of: StatesOf) -> dict[str, Any]:
    """What this rank writes, or wants to read, of all models."""
    state: dict[str, Any] = {}
    for name, model in models.items():
        own = _sharded_state(model, states_of)
        if _prefix(name):
            add_prefix_for_sharding(own, _prefix(name))
        state |= {_prefix(name) + entry: shards for entry, shards in own.items()}
    return state


def _prefix(name: str) -> str:
    return "" if name == POLICY else f"{name}."


def _read(state: dict[str, Any], directory: Path) -> dict[str, Any]:
    try:
        with weights_only():
            return dist_checkpointing.load(state, str(directory), validate_access_integrity=False)
    except (CheckpointException, CheckpointingException, pickle.UnpicklingError) as error:
        raise WeightError(f"{directory}: the checkpoint cannot be read: {_first_cause(error)}") from error


def _sharded_state(policy: Network, states_of: StatesOf) -> dict[str, Any]:
    """What this rank writes, or wants to read: its shards, each with its place in the whole.

    Optimizer state is laid out as Megatron's ``fully_reshardable`` is: three tensors per parameter, in the parameter's
    shape and place. We put it together ourselves, since 0.16.1 takes the wrong elements wherever a
    buffer has two buckets with padding between them, which a tied embedding under pipeline parallelism makes.
    """
    state = _sharded_weights(policy)
    place_of = {
        shard.data: (f"{index}.{name}", shard)
        for index in range(len(policy.chunks))
        for name, shard in state[_chunk_entry(index)].items()
    }
    for optimizer in _optimizers(policy):
        for index, parameter in enumerate(_parameters(optimizer)):
            name, shard = place_of[parameter]
            states = states_of(optimizer, parameter, index)
            if states:
                state[_entry(name)] = {key: _at_place_of(shard, key, whole) for key, whole in states.items()}
    return state


def _sharded_weights(policy: Network) -> dict[str, Any]:
    finish_gathers(policy.modules)
    return {
        _chunk_entry(index): chunk.sharded_state_dict(metadata={"dp_cp_group": policy.groups.data_context})
        for index, chunk in enumerate(policy.chunks)
    }


def _chunk_entry(index: int) -> str:
    return f"model{index}"


def _entry(name: str) -> str:
    """Of a parameter's optimizer state; ``name`` starts with the number of its chunk on this rank."""
    return f"optimizer.{name}"


def _at_place_of(shard: ShardedTensor | ShardedTensorFactory, key: str, whole: torch.Tensor) -> Any:
    """A state of a parameter as a shard: its only replica over data-parallel ranks, so this rank writes it."""
    dtype = {} if isinstance(shard, ShardedTensorFactory) else {"dtype": whole.dtype}
    replica = (*shard.replica_id[:2], 0)
    return dataclasses.replace(shard, key=f"optimizer.state.{key}.{shard.key}", data=whole, replica_id=replica, **dtype)


def _gathered_states(optimizer: DistributedOptimizer, parameter: torch.nn.Parameter, index: int) -> States:
    """[parameter's shape] master weight and moments, on one of its data-parallel ranks; they take turns at writing."""
    ranks = optimizer.data_parallel_group
    own = _own_states(optimizer, parameter)
    states = {}
    for key in STATES:
        whole = torch.zeros(parameter.numel(), dtype=_state_dtype(parameter), device=parameter.device)
        if own is not None:
            piece, tensors = own
            whole[piece] = tensors[key]
        dist.all_reduce(whole, group=ranks)  # elsewhere it is zero
        if index % ranks.size() == ranks.rank():
            states[key] = whole.view(parameter.shape).cpu()
    return states


def _empty_states(optimizer: DistributedOptimizer, parameter: torch.nn.Parameter, index: int) -> States:
    """[parameter's shape] host memory to read master weight and moments into, where this rank owns a piece."""
    if _own_states(optimizer, parameter) is None:
        return {}
    return {key: torch.zeros(parameter.shape, dtype=_state_dtype(parameter)) for key in STATES}


def _take_states(policy: Network, loaded: dict[str, Any], prefix: str) -> None:
    """Copies this rank's pieces of master weights and moments out of the parameters' whole ones."""
    named = [chunk.named_parameters(prefix=str(index)) for index, chunk in enumerate(policy.chunks)]
    name_of = {parameter: name for name, parameter in itertools.chain(*named)}
    for optimizer in _optimizers(policy):
        for parameter in _parameters(optimizer):
            own = _own_states(optimizer, parameter)
            if own is not None:
                piece, tensors = own
                for key in STATES:
                    tensors[key].copy_(loaded[prefix + _entry(name_of[parameter])][key].flatten()[piece])


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


def _parameters(optimizer: DistributedOptimizer) -> Iterator[torch.nn.Parameter]:
    """The model's parameters that an optimizer steps, in an order that its data-parallel ranks share."""
    for buffer in optimizer.buffers:
        yield from buffer.param_index_map


def _state_dtype(parameter: torch.nn.Parameter) -> torch.dtype:
    """float32, or float64 in a float64 run."""
    return torch.promote_types(parameter.dtype, torch.float32)


def _counters(policy: Network) -> Iterator[dict[str, Any]]:
    """Whatever counts steps: torch has a counter a parameter, Transformer Engine and apex one a group."""
    for optimizer in _optimizers(policy):
        holders = [*optimizer.optimizer.state.values(), *optimizer.optimizer.param_groups]
        yield from (holder for holder in holders if "step" in holder)


def _steps_taken(policy: Network) -> int:
    return max((int(holder["step"]) for holder in _counters(policy)), default=0)


def _count_steps(policy: Network, step: int) -> None:
    """Counts ``step`` steps as taken.

    Each parameter gets a counter of its own. Megatron's loading gives all of them one tensor, which AdamW then
    advances once a parameter; after that its bias correction is silently that of a much later step.
    """
    for holder in _counters(policy):
        tensor = torch.is_tensor(holder["step"])
        holder["step"] = torch.full_like(holder["step"], step) if tensor else step


def _verified_header(models: Models, directory: Path) -> dict[str, Any]:
    """``checkpoint.json``, once every file that it lists was verified, on every rank. Raises WeightError on all."""
    world = models[POLICY].groups.world
    first = dist.get_rank() == 0
    header = together(lambda: header_of_models(directory, models) if first else None, world)
    header = broadcast_object(header, 0, world)
    together(lambda: verify(directory, header["files"][dist.get_rank() :: dist.get_world_size()]), world)
    together(lambda: check_metadata(directory) if first else None, world)
    return header


def header_of_models(directory: Path, models: Models) -> dict[str, Any]:
    """``checkpoint.json`` of a checkpoint of such models. Raises WeightError."""
    header = header_of_model(directory, models[POLICY].shape)
    kept = header.get("models", {})
    for name, model in models.items():
        if name != POLICY:
            if name not in kept:
                raise WeightError(f"{directory}: a checkpoint without a {name}: it was saved by a run that had none")
            _check_same(directory, model.shape, kept[name]["model"])
    return header


def header_of_model(directory: Path, shape: ModelShape) -> dict[str, Any]:
    """``checkpoint.json`` of a checkpoint of such a policy. Raises WeightError."""
    header = read_header(directory)
    _check_same(directory, shape, header["model"])
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


def _first_cause(error: BaseException) -> str:
    """One line: torch wraps what went wrong on each rank, with tracebacks, into an exception of its own. (To one that
    reads by itself, as in 0.19.2, it is rank 0.)"""
    if isinstance(error, CheckpointException) and error.failures:
        rank, (cause, _) = min(error.failures.items(), key=lambda failure: failure[0])
        return textwrap.shorten(f"rank {rank}: {cause}" if rank else str(cause), 300)
    return textwrap.shorten(str(error), 300)
