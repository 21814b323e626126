"""Flat buckets: several tensors as one run of bytes, in the order that a server takes them apart."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from queue import Empty, SimpleQueue
from typing import Any

import torch

from megatron_gspo.sync.base import NamedTensor

HOST = torch.device("cpu")
PIECE = 16 * 2**20
"""Bytes of a bucket that ranks send each other at a time."""
Transfer = Callable[[torch.Tensor], object]
"""Sends a tensor, or receives into one; blocks until it may be reused."""


@dataclass(frozen=True)
class FlatBucket:
    """Tensors end to end. ``data``: [bytes] uint8, the others one entry a tensor, in its order."""

    names: list[str]
    dtypes: list[str]
    """As torch names them, without ``torch.``."""
    shapes: list[list[int]]
    data: torch.Tensor

    @property
    def layout(self) -> dict[str, Any]:
        """What a server must know to take ``data`` apart, as JSON has it."""
        return {"names": self.names, "dtypes": self.dtypes, "shapes": self.shapes}


class Buffers:
    """Memory of flat buckets, used again: to copy into fresh pages takes five times as long."""

    def __init__(self, device: torch.device = HOST) -> None:
        self.device = device
        self._free: SimpleQueue[torch.UntypedStorage] = SimpleQueue()

    def take(self, size: int) -> torch.Tensor:
        """[size] uint8, uninitialised; its caller's until ``give``."""
        try:
            storage = self._free.get_nowait()
        except Empty:
            storage = self._storage(size)
        if storage.nbytes() < size:
            storage = self._storage(size)
        return torch.empty(0, dtype=torch.uint8, device=self.device).set_(storage, 0, (size,), (1,))

    def give(self, data: torch.Tensor) -> None:
        """Takes a buffer back."""
        self._free.put(data.untyped_storage())

    def rest(self) -> None:
        """Between syncs: a GPU's memory is given back, for what is computed there meanwhile; the host's is kept."""
        if self.device.type == "cuda":
            self._free = SimpleQueue()

    def _storage(self, size: int) -> torch.UntypedStorage:
        return torch.UntypedStorage(size, device=self.device)


def flatten(bucket: list[NamedTensor], buffers: Buffers) -> FlatBucket:
    """Copies a bucket's tensors end to end, wide dtypes first: a server refuses a tensor that lies unaligned.

    The copy is over when this returns, on a GPU too: whoever sends it does so in a thread of its own.
    """
    ordered = sorted(bucket, key=lambda named: -named[1].element_size())
    data = buffers.take(sum(tensor.nbytes for _, tensor in ordered))
    parts = [tensor.reshape(-1).view(torch.uint8) for _, tensor in ordered]
    if parts[0].device == data.device:
        torch.cat(parts, out=data)
    else:  # through the host: put together where the tensors lie, and moved once
        data.copy_(torch.cat(parts))
    settle(data.device)
    return FlatBucket(
        names=[name for name, _ in ordered],
        dtypes=[str(tensor.dtype).removeprefix("torch.") for _, tensor in ordered],
        shapes=[list(tensor.shape) for _, tensor in ordered],
        data=data,
    )


def settle(device: torch.device) -> None:
    """Waits for what this thread has given to a GPU. (Not run on a GPU yet.)"""
    if device.type == "cuda":
        torch.cuda.current_stream(device).synchronize()


def send_bucket(send: Transfer, bucket: FlatBucket | None) -> None:
    """A header of two sizes, the layout, the data. None, as two zeros, says that no more will come."""
    if bucket is None:
        send(torch.zeros(2, dtype=torch.int64))
        return
    layout = torch.frombuffer(bytearray(json.dumps(bucket.layout).encode()), dtype=torch.uint8)
    send(torch.tensor([len(layout), len(bucket.data)]))
    send(layout)
    for piece in bucket.data.split(PIECE):
        send(piece)


def receive_header(receive: Transfer) -> tuple[int, int] | None:
    """(bytes of layout, bytes of data) of the bucket that comes next, or None at the end."""
    sizes = torch.zeros(2, dtype=torch.int64)
    receive(sizes)
    layout, data = sizes.tolist()
    return (layout, data) if layout else None


def receive_bucket(receive: Transfer, header: tuple[int, int], buffers: Buffers) -> FlatBucket:
    """The bucket that a header announced. One for which there is no memory is taken all the same, so that its sender
    does not wait for ever, and then raises."""
    layout = torch.empty(header[0], dtype=torch.uint8)
    receive(layout)
    try:
        data = buffers.take(header[1])
    except Exception:
        scrap = torch.empty(min(PIECE, header[1]), dtype=torch.uint8, device=buffers.device)
        for start in range(0, header[1], PIECE):
            receive(scrap[: header[1] - start])
        raise
    for piece in data.split(PIECE):
        receive(piece)
    return FlatBucket(data=data, **json.loads(layout.numpy().tobytes()))
