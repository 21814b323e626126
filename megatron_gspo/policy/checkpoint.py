"""Checkpoints of the policy, weights and optimizer, in Megatron-Core's sharded format (``torch_dist``).

Ranks write their own shards, and every tensor is addressed by its place in the whole model, so a checkpoint of one
layout loads at any other. Beside Megatron's files lies ``checkpoint.json``: the step, the model's shape, and what the
caller wants back.
"""

from __future__ import annotations

import dataclasses
import json
import queue
import shutil
import textwrap
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing.core import CheckpointingException
from megatron.core.dist_checkpointing.strategies import filesystem_async
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer
from torch.distributed.checkpoint.api import CheckpointException
from torch.overrides import TorchFunctionMode

from megatron_gspo.errors import ConfigError, WeightError
from megatron_gspo.hf.family import ModelShape
from megatron_gspo.parallel.exchange import agree, broadcast_object
from megatron_gspo.policy.policy import Policy

HEADER = "checkpoint.json"


@torch.no_grad()
def save_checkpoint(policy: Policy, directory: Path, extra: Mapping[str, Any]) -> None:
    """Writes weights, optimizer state and ``extra`` (whatever JSON can hold). Collective.

    It is written under another name and moved when it is whole; a checkpoint that was at ``directory`` is replaced.
    Weights keep the model's dtype, optimizer state is float32 (float64 in a float64 run).
    Raises ConfigError when the directory cannot be written, TypeError when ``extra`` is not JSON.
    """
    header = {"step": _steps_taken(policy), "model": _plain(policy.shape), "extra": dict(extra)}
    text = json.dumps(header, indent=2) + "\n"
    unfinished = directory.with_name(directory.name + ".unfinished")
    _on_first_rank(policy, lambda: _make_empty(unfinished))
    state = _sharded_state(policy, loading=False)
    # Megatron makes a server process for this queue, which imports the main script again and outlives a killed rank.
    # A save that is not asynchronous reads and writes it in this process alone.
    filesystem_async._results_queue = filesystem_async._results_queue or queue.SimpleQueue()
    dist_checkpointing.save(state, str(unfinished))

    def publish() -> None:
        (unfinished / HEADER).write_text(text, encoding="utf-8")
        _replace(directory, unfinished)

    _on_first_rank(policy, publish)


@torch.no_grad()
def load_checkpoint(policy: Policy, directory: Path) -> dict[str, Any]:
    """Fills the policy from a checkpoint of any layout and returns its ``extra``. Collective.

    Learning rate, betas and weight decay stay those of the configuration. A policy that is not trained loads its
    weights only. Raises WeightError, on every rank, when the checkpoint is missing, incomplete or of another model;
    after an incomplete one the policy holds part of it, and must not be used.
    """
    header = _read_header(policy, directory)
    state = _sharded_state(policy, loading=True)
    try:
        loaded = dist_checkpointing.load(state, str(directory))
    except (CheckpointException, CheckpointingException) as error:
        raise WeightError(f"{directory}: the checkpoint is damaged: {_first_cause(error)}") from error
    policy.model.load_state_dict(loaded["model"])
    for name, optimizer in _optimizers(policy).items():
        _load_optimizer(optimizer, loaded.get(name, {}), header["step"])
    return header["extra"]


def _sharded_state(policy: Policy, *, loading: bool) -> dict[str, Any]:
    """What this rank writes, or wants to read: its shards, each with its place in the whole.

    Each optimizer is asked for its tensors alone. Megatron's own state dict adds the settings, which belong to the
    configuration, and asserts a step that an expert optimizer cannot have on a pipeline stage without experts.
    """
    metadata = {
        "distrib_optim_sharding_type": "fully_reshardable",
        "chained_optim_avoid_prefix": True,
        # With CUDA the state is gathered in host memory, on one rank a shard, not on every device.
        "distrib_optim_fully_reshardable_mem_efficient": torch.cuda.is_available(),
        "dp_cp_group": policy.groups.data,
    }
    model = policy.model.sharded_state_dict(metadata=metadata)
    state = {"model": model}
    for name, optimizer in _optimizers(policy).items():
        _allocate(optimizer.optimizer)
        with _gather_precision(policy):
            shards = optimizer.sharded_param_state_fully_reshardable(model, loading, metadata)
        if shards:  # none where another rank gathers this one's, or the stage has no experts
            state[name] = shards
    return state


def _optimizers(policy: Policy) -> dict[str, DistributedOptimizer]:
    """The distributed optimizers of this rank: of dense parameters and of experts."""
    if policy.optimizer is None:
        return {}
    return {f"optimizer{i}": part for i, part in enumerate(policy.optimizer.megatron.chained_optimizers)}


def _load_optimizer(optimizer: DistributedOptimizer, shards: dict[int, Any], step: int) -> None:
    """Takes this rank's slices of master weights and moments, and counts ``step`` steps as taken.

    Megatron copies over every entry that an optimizer holds, and no ``step`` is among what it reads. Its own way of
    supplying one is a single tensor shared by all parameters, which AdamW then advances once a parameter: each gets
    its own here.
    """
    inner = optimizer.optimizer
    counters = [state.pop("step", None) for state in inner.state.values()]
    optimizer.load_parameter_state_from_fully_reshardable(shards)
    for state, counter in zip(inner.state.values(), counters, strict=True):
        if counter is not None:
            state["step"] = torch.full_like(counter, step)
    for group in inner.param_groups:
        if "step" in group:  # Transformer Engine and apex count a group
            group["step"] = step


def _allocate(inner: torch.optim.Optimizer) -> None:
    """Gives an optimizer that has not stepped its moments, by a step that moves nothing and is not counted."""
    if inner.state:
        return
    settings = [(group["lr"], group["weight_decay"]) for group in inner.param_groups]
    for group in inner.param_groups:
        group["lr"] = group["weight_decay"] = 0.0
        for parameter in group["params"]:
            parameter.grad = torch.zeros_like(parameter)
    inner.step()
    inner.zero_grad()
    for group, (lr, weight_decay) in zip(inner.param_groups, settings, strict=True):
        group |= {"lr": lr, "weight_decay": weight_decay}
        if "step" in group:
            group["step"] = 0
    for state in inner.state.values():
        if "step" in state:
            state["step"].zero_()


def _steps_taken(policy: Policy) -> int:
    """Optimizer steps so far, from the counters of the parameters (torch) or of the groups (Transformer Engine)."""
    steps = [0]
    for part in _optimizers(policy).values():
        holders = [*part.optimizer.state.values(), *part.optimizer.param_groups]
        steps += [int(holder["step"]) for holder in holders if "step" in holder]
    return max(steps)


def _gather_precision(policy: Policy) -> AbstractContextManager[Any]:
    """Megatron gathers optimizer state into float32 buffers, which in a float64 run would round it."""
    return _Float64Buffers() if policy.config.model.dtype == "float64" else nullcontext()


class _Float64Buffers(TorchFunctionMode):
    """Within it ``torch.zeros`` of float32 are zeros of float64."""

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = dict(kwargs or {})
        if func.__name__ == "zeros" and kwargs.get("dtype") is torch.float32:
            kwargs["dtype"] = torch.float64
        return func(*args, **kwargs)


def _read_header(policy: Policy, directory: Path) -> dict[str, Any]:
    """``checkpoint.json``, read and checked by the first rank. Raises WeightError on every rank."""
    header, error = None, None
    if dist.get_rank() == 0:
        try:
            header = _checked_header(directory, policy.shape)
        except WeightError as caught:
            error = caught
    agree(error, policy.groups.world)
    return broadcast_object(header, 0, policy.groups.world)


def _checked_header(directory: Path, shape: ModelShape) -> dict[str, Any]:
    if not directory.is_dir():
        raise WeightError(f"{directory}: no such checkpoint")
    try:
        header = json.loads((directory / HEADER).read_text(encoding="utf-8"))
        saved, step, extra = header["model"], header["step"], header["extra"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise WeightError(f"{directory}: not a whole checkpoint: {HEADER}: {error!r}") from error
    for name, mine in _plain(shape).items():
        if saved.get(name) != mine:
            raise WeightError(
                f"{directory}: a checkpoint of another model: {name} is {saved.get(name)} there and {mine} here"
            )
    return {"step": step, "extra": extra}


def _plain(shape: ModelShape) -> dict[str, Any]:
    """The model's shape as JSON gives it back."""
    return json.loads(json.dumps(dataclasses.asdict(shape)))


def _first_cause(error: BaseException) -> str:
    """One line: torch wraps what went wrong on each rank, with tracebacks, into an exception of its own."""
    if isinstance(error, CheckpointException) and error.failures:
        rank, (cause, _) = min(error.failures.items(), key=lambda failure: failure[0])
        return textwrap.shorten(f"rank {rank}: {cause}", 300)
    return textwrap.shorten(str(error), 300)


def _on_first_rank(policy: Policy, action: Callable[[], None]) -> None:
    """Touches the file system on one rank while the others wait. Raises ConfigError on every rank."""
    error: Exception | None = None
    if dist.get_rank() == 0:
        try:
            action()
        except OSError as caught:
            error = ConfigError(f"the checkpoint cannot be written: {caught}")
    agree(error, policy.groups.world)


def _make_empty(directory: Path) -> None:
    if directory.exists():
        shutil.rmtree(directory)
    directory.mkdir(parents=True)


def _replace(directory: Path, whole: Path) -> None:
    """Moves ``whole`` to ``directory``. What lay there is moved away first: only whole checkpoints have the name."""
    old = directory.with_name(directory.name + ".replaced")
    if old.exists():
        shutil.rmtree(old)
    if directory.exists():
        directory.rename(old)
    whole.rename(directory)
    if old.exists():
        shutil.rmtree(old)
