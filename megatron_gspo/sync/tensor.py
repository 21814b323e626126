"""Weight sync over HTTP, in SGLang's begin/end update session."""

from __future__ import annotations

import contextlib
import pickle
from collections import OrderedDict
from typing import Any

import pybase64
import torch

from megatron_gspo.errors import SyncError
from megatron_gspo.sync.base import BucketSync, NamedTensor, Names, on_host, own_storage


class TensorSync(BucketSync):
    """Every owner posts its tensors, a bucket at a time, to every server."""

    def _begin(self) -> str:
        self.servers.begin_update()
        return ""

    def _send(self, place: str, bucket: list[NamedTensor]) -> None:  # type: ignore[override]  # nothing to report
        # Plain pickle: SGLang's own serializer shares file descriptors, which only a child process can open.
        self.servers.post_tensors(pybase64.b64encode(pickled(on_host(bucket))))

    def _path(self) -> str:
        return "HTTP, through host memory"

    def _finish(self, place: str, sent: list[list[tuple[Names, str]]]) -> None:
        self.servers.end_update()

    def _abandon(self) -> None:
        with contextlib.suppress(SyncError):  # an open session would refuse the next one; it may be closed already
            self.servers.end_update()


def pickled(bucket: list[NamedTensor]) -> bytes:
    """A bucket under torch's names, which are the ones that a server takes.

    Megatron-Core 0.19.2 puts a safer function of its own (megatron/core/__init__.py) where torch has the one that reads
    a storage. Pickles would name Megatron's; called as the one that it replaces, it serves here and they name torch's.
    """
    load = torch.storage._load_from_bytes
    load.__module__, load.__qualname__ = "torch.storage", "_load_from_bytes"
    return pickle.dumps([(name, _picklable(own_storage(tensor))) for name, tensor in bucket])


class _EightBits:
    """A tensor whose pickle has its bytes as those of uint8: torch's own has a storage of no dtype, which a server's
    ``torch.load(weights_only=True)`` does not read in the format of pickles (torch 2.13)."""

    def __init__(self, tensor: torch.Tensor) -> None:
        self._tensor = tensor

    def __reduce__(self) -> tuple[Any, ...]:
        tensor = self._tensor
        storage = tensor.view(torch.uint8)._typed_storage()
        parts: tuple[Any, ...] = (storage, 0, tuple(tensor.size()), tensor.stride(), False, OrderedDict(), tensor.dtype)
        return torch._utils._rebuild_tensor_v3, parts


def _picklable(tensor: torch.Tensor) -> torch.Tensor | _EightBits:
    return _EightBits(tensor) if tensor.dtype == torch.float8_e4m3fn else tensor
