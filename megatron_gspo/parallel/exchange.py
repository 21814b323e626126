"""Moving and agreeing: samples between data-parallel ranks, values within a group, failures everywhere."""

from __future__ import annotations

import pickle
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import torch
import torch.distributed as dist

from megatron_gspo import errors
from megatron_gspo.limits import explain

Item = TypeVar("Item")


def gather_objects(value: Item, group: dist.ProcessGroup) -> list[Item]:
    """Every rank's value, in rank order, on every rank. For small things."""
    values: list[Any] = [None] * group.size()
    dist.all_gather_object(values, value, group=group)
    return values


def broadcast_object(value: Item | None, source: int, group: dist.ProcessGroup) -> Item:
    """The value of the rank ``source`` (a global rank), on every rank of the group."""
    box = [value]
    dist.broadcast_object_list(box, src=source, group=group)
    return box[0]  # type: ignore[return-value]


def gather_pieces(piece: torch.Tensor, group: dist.ProcessGroup) -> list[torch.Tensor]:
    """Every rank's tensor of one shape, in rank order."""
    if group.size() == 1:
        return [piece]
    pieces = [torch.empty_like(piece, memory_format=torch.contiguous_format) for _ in range(group.size())]
    dist.all_gather(pieces, piece.contiguous(), group=group)
    return pieces


def exchange(items: Sequence[Sequence[Item]], group: dist.ProcessGroup, device: torch.device) -> list[Item]:
    """An all-to-all of Python objects: ``items[r]`` goes to rank r; what arrives comes in rank order.

    Each pair of ranks carries only what one has for the other, as bytes, so no rank carries the batch.
    """
    if group.size() == 1:
        return list(items[0])
    parts = [torch.frombuffer(bytearray(pickle.dumps(list(part))), dtype=torch.uint8) for part in items]
    sizes = torch.tensor([len(part) for part in parts], device=device)
    arriving = torch.empty_like(sizes)
    dist.all_to_all_single(arriving, sizes, group=group)
    counts = arriving.tolist()
    received = torch.empty(sum(counts), dtype=torch.uint8, device=device)
    dist.all_to_all_single(received, torch.cat(parts).to(device), counts, sizes.tolist(), group=group)
    lists = [pickle.loads(part.numpy().tobytes()) for part in received.cpu().split(counts)]
    return [item for part in lists for item in part]


def scatter_bytes(
    pieces: Sequence[torch.Tensor], size: int, group: dist.ProcessGroup, device: torch.device
) -> torch.Tensor:
    """The group's first rank hands out ``pieces`` (uint8, one a rank, of any sizes); each rank gets its own, of
    ``size`` bytes, on ``device``. Only that crosses the wire. ``pieces`` is empty elsewhere."""
    if group.size() == 1:
        return pieces[0].to(device)
    none = torch.empty(0, dtype=torch.uint8)
    outgoing = [len(piece) for piece in pieces] or [0] * group.size()
    arriving = [size] + [0] * (group.size() - 1)
    received = torch.empty(size, dtype=torch.uint8, device=device)
    dist.all_to_all_single(received, torch.cat([none, *pieces]).to(device), arriving, outgoing, group=group)
    return received


def together(action: Callable[[], Item], group: dist.ProcessGroup) -> Item:
    """What every rank does by itself (no collectives in it): its result, or the same error on all ranks."""
    error: Exception | None = None
    try:
        result = action()
    except Exception as caught:
        error = caught
    agree(error, group)
    return result


def agree(error: Exception | None, group: dist.ProcessGroup) -> None:
    """Raises on every rank when any rank has an error, so that none waits for one that has stopped.

    The lowest rank that failed is the one reported, by its class where that is one of ours, and a rank with an error
    of its own has it as the cause.
    """
    report = None
    if error is not None:
        ours = type(error).__module__ == errors.__name__  # a class of the user's need not pickle
        text = str(error) if ours else explain(error) or f"{type(error).__name__}: {error}"
        report = (type(error).__name__ if ours else errors.MegatronGspoError.__name__, text)
    reports = [(rank, found) for rank, found in enumerate(gather_objects(report, group)) if found is not None]
    if reports:
        rank, (kind, text) = reports[0]
        where = f"rank {dist.get_global_rank(group, rank)}: " if rank else ""  # the first one speaks for all
        raise getattr(errors, kind)(where + text) from error
