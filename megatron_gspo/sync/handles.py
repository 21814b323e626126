"""Memory that another process opens by a handle, and what SGLang reads of one (0.5.23, ``flattened_bucket``).

A server unpickles a handle with a list of allowed names (``SafeUnpickler``): torch's functions that rebuild a tensor
from shared memory are in it, and ``SimpleNamespace``, which stands for SGLang's own description of a tensor. Each
handle is opened exactly once: torch counts, for shared files and for GPU memory, one release for every one made.
"""

from __future__ import annotations

import io
import pickle
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import torch
from torch.multiprocessing import reductions

from megatron_gspo.errors import SyncError
from megatron_gspo.sync.flat import HOST, Buffers, FlatBucket

SHARED = "/dev/shm"


def shared_room() -> int:
    """Bytes that are free in this machine's shared memory."""
    try:
        return shutil.disk_usage(SHARED).free
    except OSError:
        return 0


class SharedBuffers(Buffers):
    """Buffers in files of shared memory, under torch's names in ``/dev/shm``.

    torch's own helper (``torch_shm_manager``, one a process) removes them when nobody has them open any more, also
    when this process is killed.
    """

    def __init__(self) -> None:
        super().__init__(HOST)

    def _storage(self, size: int) -> torch.UntypedStorage:
        try:
            return torch.UntypedStorage._new_using_filename_cpu(size)
        except RuntimeError as error:
            raise SyncError(
                f"{SHARED} has no room for {size / 1e6:.0f} MB more of weights on their way ({error}): make it larger "
                f'(docker run --shm-size), sync.bucket_mb smaller, or set sync.method = "distributed"'
            ) from None

    def handle(self, data: torch.Tensor) -> Call:
        """What rebuilds ``data``, [bytes] uint8, in another process of this user on this machine; once."""
        storage = data.untyped_storage()
        opened = Call(reductions.rebuild_storage_filename, (torch.UntypedStorage, *storage._share_filename_cpu_()))
        storage._shared_incref()  # what opens it counts it down
        typed = Call(reductions.rebuild_typed_storage, (opened, torch.uint8))
        metadata = (data.storage_offset(), tuple(data.shape), data.stride(), False)
        return Call(reductions.rebuild_tensor, (torch.Tensor, typed, metadata))


class CardBuffers(Buffers):
    """Memory of a GPU, whose handles are CUDA's (IPC). (Not run on a GPU yet.)

    Each bucket's is new: torch wraps an allocation once more at every handle that is made of it, and gives it back
    when all that were made have been opened and closed. Its allocator hands out the same memory again at no cost.
    """

    def take(self, size: int) -> torch.Tensor:
        """[size] uint8, uninitialised."""
        return torch.empty(size, dtype=torch.uint8, device=self.device)

    def give(self, data: torch.Tensor) -> None:
        """Has torch take back what servers have closed since; ``data`` itself is, when its caller lets it go."""
        torch.cuda.ipc_collect()

    def rest(self) -> None:
        """Between syncs, when servers have closed all."""
        torch.cuda.ipc_collect()

    def handle(self, data: torch.Tensor) -> Call:
        """What rebuilds ``data`` in a process on this machine that sees this GPU, which it knows by its UUID: the two
        may number GPUs differently. SGLang looks for the UUID in the place of a number."""
        function, arguments = reductions.reduce_tensor(data)
        uuid = str(torch.cuda.get_device_properties(data.device).uuid)
        return Call(function, (*arguments[:DEVICE], uuid, *arguments[DEVICE + 1 :]))


DEVICE = 6
"""Place of the device among the arguments of torch's ``rebuild_cuda_tensor``."""


@dataclass(frozen=True)
class Call:
    """Pickled as a call that the reader makes."""

    function: Callable[..., Any]
    arguments: tuple[Any, ...]


class _Pickler(pickle.Pickler):
    def reducer_override(self, value: Any) -> Any:
        return (value.function, value.arguments) if isinstance(value, Call) else NotImplemented


def payload(bucket: FlatBucket, handle: Call) -> bytes:
    """What one tensor-parallel rank of a server is told of a bucket: where it lies, and the tensors in it."""
    content = io.BytesIO()
    _Pickler(content).dump({"flattened_tensor": handle, "metadata": described(bucket)})
    return content.getvalue()


def described(bucket: FlatBucket) -> list[SimpleNamespace]:
    """The fields of SGLang's ``FlattenedTensorMetadata``, one entry a tensor; indices are of bytes."""
    entries, start = [], 0
    for name, dtype_name, shape in zip(bucket.names, bucket.dtypes, bucket.shapes, strict=True):
        dtype = getattr(torch, dtype_name)
        size = torch.Size(shape).numel() * dtype.itemsize
        entries.append(
            SimpleNamespace(
                name=name, shape=tuple(shape), dtype=dtype, start_idx=start, end_idx=start + size, numel=size
            )
        )
        start += size
    return entries
