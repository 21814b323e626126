"""A distributed checkpoint's tensors one at a time: read from the files of any layout, written without a model.

The format is Megatron-Core's ``torch_dist``, which is torch's distributed checkpoint: files of blocks, each as
``torch.save`` writes it, and ``.metadata``, a pickle that says which block of which tensor lies where. Blocks are read
with ``weights_only``; ``.metadata`` by an unpickler that knows the classes of descriptions alone.
"""

from __future__ import annotations

import io
import itertools
import pickle
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from megatron.core.dist_checkpointing.core import CheckpointingConfig, save_config
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import (
    BytesStorageMetadata,
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.utils import _create_file_view

from megatron_gspo.errors import WeightError
from megatron_gspo.megatron.checkpoint_files import METADATA, read_metadata

BACKEND = ("torch_dist", 1)
COMMON = "common.pt"
Size = tuple[int, ...]
MOST_OPEN = 16
"""Files at a time: a checkpoint of many ranks has more than a process may open."""


@dataclass(frozen=True)
class Block:
    """Where a block of a tensor lies in a file; JSON can hold it."""

    key: str
    offset: Size | None
    """In the tensor; None of an object."""
    size: Size
    start: int
    """In the file, bytes."""
    length: int


class DistributedReader:
    """Blocks of a checkpoint's tensors, by place."""

    def __init__(self, directory: Path, metadata: Metadata | None = None) -> None:
        """``metadata``: what ``.metadata`` holds, where another rank has read it. Raises WeightError when the file is
        missing, damaged or describes more than tensors."""
        self.directory = directory
        self._metadata = read_metadata(directory) if metadata is None else metadata
        self._open: dict[str, io.BufferedReader] = {}
        self._last: tuple[object, torch.Tensor] | None = None
        self._by_place: dict[str, dict[tuple[Size, Size], ChunkStorageMetadata]] = {}

    def close(self) -> None:
        """Closes the files."""
        for file in self._open.values():
            file.close()
        self._open.clear()
        self._last = None

    def keys(self) -> set[str]:
        """Of its tensors."""
        return {
            key for key, entry in self._metadata.state_dict_metadata.items() if isinstance(entry, TensorStorageMetadata)
        }

    def dtype(self, key: str) -> torch.dtype:
        """Of a tensor."""
        return self._tensor(key).properties.dtype

    def shape(self, key: str) -> Size:
        """Of a whole tensor."""
        return tuple(self._tensor(key).size)

    def files(self) -> list[Path]:
        """That hold blocks, in order."""
        return [self.directory / name for name in sorted({info.relative_path for info in self._infos().values()})]

    def read(self, key: str, offset: Size, size: Size) -> torch.Tensor:
        """A block of a tensor, put together from whatever blocks the files have. Raises WeightError."""
        if (whole := self._chunks(key).get((offset, size))) is not None:
            return self._load(key, whole)
        out: torch.Tensor | None = None
        there = torch.zeros(size, dtype=torch.bool)
        for chunk in self._chunks(key).values():
            common = _overlap(offset, size, chunk)
            if common is None:
                continue
            out = torch.empty(size, dtype=self.dtype(key)) if out is None else out
            block = self._load(key, chunk)
            out[common.there].copy_(block[common.here])
            there[common.there] = True
        filled, wanted = int(there.sum()), there.numel()
        if out is None or filled != wanted:
            raise WeightError(
                f"{self.directory / METADATA}: {key}: its blocks hold {filled} of the {wanted} elements at "
                f"{offset} of size {size}: the checkpoint is not whole, or of another model"
            )
        return out

    def _tensor(self, key: str) -> TensorStorageMetadata:
        entry = self._metadata.state_dict_metadata.get(key)
        if not isinstance(entry, TensorStorageMetadata):
            raise WeightError(f"{self.directory / METADATA}: no tensor {key}: a checkpoint of another model")
        return entry

    def _chunks(self, key: str) -> Mapping[tuple[Size, Size], ChunkStorageMetadata]:
        """A tensor's blocks by offset and size: experts of a layer are blocks of one tensor, each asked for in turn."""
        if key not in self._by_place:
            chunks = self._tensor(key).chunks
            self._by_place[key] = {(tuple(chunk.offsets), tuple(chunk.sizes)): chunk for chunk in chunks}
        return self._by_place[key]

    def _infos(self) -> Mapping[MetadataIndex, _StorageInfo]:
        return self._metadata.storage_data

    def _load(self, key: str, chunk: ChunkStorageMetadata) -> torch.Tensor:
        """A block as it lies in a file. The last one is kept: a larger one holds several that are asked for in turn."""
        index = MetadataIndex(key, chunk.offsets)
        if self._last is not None and self._last[0] == index:
            return self._last[1]
        self._last = None
        info = self._infos().get(index)
        if info is None:
            raise WeightError(f"{self.directory / METADATA}: {key}: no file has its block at {tuple(chunk.offsets)}")
        path = self.directory / info.relative_path
        try:
            tensor = torch.load(self._slice(path, info), map_location="cpu", weights_only=True)
            tensor = tensor.detach().reshape(chunk.sizes)
        except Exception as error:  # whatever torch and pickle raise on bytes that are no tensor
            raise WeightError(f"{path}: {key}: {type(error).__name__}: {str(error).splitlines()[0]:.200}") from None
        if tensor.dtype != self.dtype(key):
            raise WeightError(f"{path}: {key} is {tensor.dtype}, and {METADATA} says {self.dtype(key)}")
        self._last = (index, tensor)
        return tensor

    def _slice(self, path: Path, info: _StorageInfo) -> Any:
        if path.name != info.relative_path:
            raise ValueError(f"{info.relative_path!r:.80} is no name of a file beside {METADATA}")
        file = self._open.pop(path.name, None) or path.open("rb")
        self._open[path.name] = file  # behind those that were used before it
        if len(self._open) > MOST_OPEN:
            self._open.pop(next(iter(self._open))).close()
        if info.offset + info.length > path.stat().st_size:
            raise EOFError(f"the file ends before the block at {info.offset} of {info.length} bytes")
        return _create_file_view(file, info.offset, info.length)


@dataclass(frozen=True)
class _Common:
    here: tuple[slice, ...]
    """In the block of the file."""
    there: tuple[slice, ...]
    """In the block that was asked for."""


def _overlap(offset: Size, size: Size, chunk: ChunkStorageMetadata) -> _Common | None:
    here, there = [], []
    for first, count, other, other_count in zip(offset, size, chunk.offsets, chunk.sizes, strict=True):
        start, end = max(first, other), min(first + count, other + other_count)
        if start >= end:
            return None
        here.append(slice(start - other, end - other))
        there.append(slice(start - first, end - first))
    return _Common(tuple(here), tuple(there))


class BlockWriter:
    """One file of blocks."""

    def __init__(self, path: Path) -> None:
        self.blocks: list[Block] = []
        self._file = path.open("wb")

    def tensor(self, key: str, offset: Size, block: torch.Tensor) -> None:
        """Appends a block of a tensor."""
        block = block.contiguous()
        if block.untyped_storage().nbytes() != block.nbytes:
            block = block.clone()  # torch.save writes whole storages
        start = self._file.tell()
        torch.save(block, self._file)
        self._note(key, offset, tuple(block.shape), start)

    def empty_object(self, key: str) -> None:
        """Appends an object that Megatron expects and in which there is nothing."""
        start = self._file.tell()
        self._file.write(NOTHING)
        self._note(key, None, (), start)

    def close(self) -> None:
        """Closes the file."""
        self._file.close()

    def _note(self, key: str, offset: Size | None, size: Size, start: int) -> None:
        self.blocks.append(Block(key, offset, size, start, self._file.tell() - start))


def _nothing() -> bytes:
    file = io.BytesIO()
    torch.save([None], file)
    return file.getvalue()


NOTHING = _nothing()
"""The extra state of one of Megatron's own modules, as Megatron hands it to torch: a list of one ``None``."""


def write_description(
    directory: Path, tensors: Mapping[str, tuple[torch.dtype, Size]], blocks: Mapping[str, Sequence[Block]]
) -> None:
    """Writes what makes files of blocks a distributed checkpoint: ``.metadata`` and Megatron's two files.

    ``tensors``: key -> (dtype, shape); ``blocks``: file name -> its blocks.
    """
    by_key: dict[str, list[Block]] = defaultdict(list)
    storage: dict[MetadataIndex, _StorageInfo] = {}
    for name, block in _named(blocks):
        by_key[block.key].append(block)
        index = MetadataIndex(block.key, None if block.offset is None else torch.Size(block.offset))
        storage[index] = _StorageInfo(name, block.start, block.length)
    entries = {key: _describe(found, tensors.get(key)) for key, found in by_key.items()}
    metadata = Metadata(entries, {}, storage)
    metadata.mcore_data = {}  # type: ignore[attr-defined]  # Megatron's: nothing was reshaped for writing
    with (directory / METADATA).open("wb") as file:
        pickle.dump(metadata, file)
    torch.save({}, directory / COMMON)
    save_config(CheckpointingConfig(*BACKEND), str(directory))


def _named(blocks: Mapping[str, Iterable[Block]]) -> Iterable[tuple[str, Block]]:
    return itertools.chain.from_iterable(((name, block) for block in found) for name, found in blocks.items())


def _describe(
    blocks: list[Block], tensor: tuple[torch.dtype, Size] | None
) -> TensorStorageMetadata | BytesStorageMetadata:
    if tensor is None:
        return BytesStorageMetadata()
    dtype, shape = tensor
    blocks.sort(key=lambda block: block.offset or ())
    chunks = [ChunkStorageMetadata(torch.Size(block.offset or ()), torch.Size(block.size)) for block in blocks]
    return TensorStorageMetadata(TensorProperties(dtype=dtype), torch.Size(shape), chunks)
