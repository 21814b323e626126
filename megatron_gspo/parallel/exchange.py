"""Moving and agreeing: samples between data-parallel ranks, values within a group, failures everywhere."""

from __future__ import annotations

import pickle
from collections.abc import Sequence
from typing import Any, TypeVar

import torch
import torch.distributed as dist

from megatron_gspo.errors import MegatronGspoError

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


def agree(error: Exception | None, group: dist.ProcessGroup) -> None:
    """Raises on every rank when any rank has an error, so that none waits for one that has stopped.

    The rank that failed raises its own error; the others raise the same class where it is one of ours, with the
    failing rank in the message.
    """
    reports = gather_objects(None if error is None else (type(error), str(error)), group)
    if error is not None:
        raise error
    for rank, report in enumerate(reports):
        if report is not None:
            kind, text = report
            kind = kind if issubclass(kind, MegatronGspoError) else MegatronGspoError
            raise kind(f"rank {dist.get_global_rank(group, rank)}: {text}")
