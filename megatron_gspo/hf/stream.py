"""A safetensors file written one tensor at a time: its header first, from shapes and dtypes alone."""

from __future__ import annotations

import json
import os
import struct
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from megatron_gspo.errors import WeightError
from megatron_gspo.untrusted import open_regular, parse_json

NAMES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.bfloat16: "BF16",
    torch.float16: "F16",
    torch.float8_e4m3fn: "F8_E4M3",
}
"""Of dtypes in a safetensors header (https://huggingface.co/docs/safetensors: Format)."""
ALIGNMENT = 8
"""Bytes; the header is filled up with spaces, so that tensors lie where their dtype wants them."""
LONGEST_HEADER = 100_000_000
"""Bytes, of the safetensors library."""


@dataclass(frozen=True)
class TensorInfo:
    """A tensor before there is one."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        """Bytes of its data."""
        return torch.Size(self.shape).numel() * self.dtype.itemsize


class StreamWriter:
    """One safetensors file; ``write`` takes the tensors that were announced, in that order."""

    def __init__(self, path: Path, tensors: Sequence[TensorInfo], *, mode: int = 0o666) -> None:
        """``mode``: permissions of a file that is made, less the umask."""
        self._path, self._coming = path, list(reversed(tensors))
        self._file = os.fdopen(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_NOFOLLOW, mode), "wb")
        self._file.write(_header(tensors))

    def write(self, name: str, tensor: torch.Tensor) -> None:
        """Raises WeightError for any tensor but the next one."""
        info = self._coming.pop() if self._coming else None
        if info is None or (name, tensor.dtype, tuple(tensor.shape)) != (info.name, info.dtype, info.shape):
            raise WeightError(f"{self._path}: {name} {tensor.dtype} {tuple(tensor.shape)} came in place of {info}")
        self._file.write(tensor.contiguous().reshape(-1).view(torch.uint8).numpy().data)

    def close(self) -> None:
        """Ends the file."""
        self._file.close()
        if self._coming:
            raise WeightError(f"{self._path}: {self._coming[-1].name} was announced and never came")


def write_tensors(path: Path, tensors: Sequence[tuple[str, torch.Tensor]], *, mode: int = 0o666) -> None:
    """Writes tensors, on the CPU, as one safetensors file; the widest dtypes first, as the safetensors library does.

    That library's own writer makes files that nobody else can read, whatever the umask.
    """
    ordered = sorted(tensors, key=lambda named: (-named[1].dtype.itemsize, named[0]))
    writer = StreamWriter(path, [TensorInfo(name, t.dtype, tuple(t.shape)) for name, t in ordered], mode=mode)
    for name, tensor in ordered:
        writer.write(name, tensor)
    writer.close()


def check_header(path: Path) -> None:
    """Raises ValueError for a header that is JSON of two meanings, above all one that names a tensor twice.

    What else may be wrong with a header the safetensors library says.
    """
    with open_regular(path) as file:
        length = int.from_bytes(file.read(8), "little")
        text = file.read(length) if length <= LONGEST_HEADER else b""
    try:
        parse_json(text)
    except ValueError as error:
        raise ValueError(f"its header: {error}") from None


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
