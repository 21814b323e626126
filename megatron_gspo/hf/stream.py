"""A safetensors file written one tensor at a time: its header first, from shapes and dtypes alone."""

from __future__ import annotations

import json
import struct
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from megatron_gspo.errors import WeightError

NAMES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.bfloat16: "BF16",
    torch.float16: "F16",
}
"""Of dtypes in a safetensors header (https://huggingface.co/docs/safetensors: Format)."""
ALIGNMENT = 8
"""Bytes; the header is filled up with spaces, so that tensors lie where their dtype wants them."""


@dataclass(frozen=True)
class TensorInfo:
    """A tensor before there is one."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        return torch.Size(self.shape).numel() * self.dtype.itemsize


class StreamWriter:
    """One safetensors file; ``write`` takes the tensors that were announced, in that order."""

    def __init__(self, path: Path, tensors: Sequence[TensorInfo]) -> None:
        self._path, self._coming = path, list(reversed(tensors))
        self._file = path.open("wb")
        self._file.write(_header(tensors))

    def write(self, name: str, tensor: torch.Tensor) -> None:
        """Raises WeightError for any tensor but the next one."""
        info = self._coming.pop() if self._coming else None
        if info is None or (name, tensor.dtype, tuple(tensor.shape)) != (info.name, info.dtype, info.shape):
            raise WeightError(f"{self._path}: {name} {tensor.dtype} {tuple(tensor.shape)} came in place of {info}")
        self._file.write(tensor.contiguous().reshape(-1).view(torch.uint8).numpy().data)

    def close(self) -> None:
        self._file.close()
        if self._coming:
            raise WeightError(f"{self._path}: {self._coming[-1].name} was announced and never came")


def _header(tensors: Sequence[TensorInfo]) -> bytes:
    entries: dict[str, object] = {"__metadata__": {"format": "pt"}}
    start = 0
    for info in tensors:
        end = start + info.nbytes
        entries[info.name] = {"dtype": NAMES[info.dtype], "shape": list(info.shape), "data_offsets": [start, end]}
        start = end
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-len(text) % ALIGNMENT)
    return struct.pack("<Q", len(text)) + text
