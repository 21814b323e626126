"""Hugging Face directories of safetensors: reading single tensors, writing shard by shard."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterable, Iterator
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from megatron_gspo.errors import WeightError

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
"""Of weights that are read."""
COMPANIONS = (
    "config.json",
    "generation_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "tokenizer.model",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "chat_template.jinja",
)
"""Files that travel with the weights when a directory is written from another."""


class HfReader:
    """Reads tensors of a Hugging Face directory by name, through memory maps, a file opened once."""

    def __init__(self, directory: str | Path) -> None:
        self.directory = Path(directory)
        self._files = self._locate()
        self._open: dict[Path, safe_open] = {}

    def names(self) -> tuple[str, ...]:
        return tuple(self._files)

    def read(self, name: str) -> torch.Tensor:
        """One tensor, on the CPU, in its stored dtype, one of ``DTYPES``. Raises WeightError naming file and tensor."""
        path = self.file_of(name)
        try:
            tensor = self._file(path).get_tensor(name)
        except (SafetensorError, OSError, ValueError) as error:
            raise WeightError(f"{path}: {name}: {error}") from None
        if tensor.dtype not in DTYPES:  # eight bits have their scales in tensors beside them, which nothing reads
            raise WeightError(
                f"{path}: {name} is stored as {tensor.dtype}: weights must be {', '.join(map(str, DTYPES))}"
            )
        return tensor

    def shape(self, name: str) -> tuple[int, ...]:
        """A tensor's shape, from its file's header; no data is read. Raises WeightError as ``read`` does."""
        path = self.file_of(name)
        try:
            return tuple(self._file(path).get_slice(name).get_shape())
        except (SafetensorError, OSError, ValueError) as error:
            raise WeightError(f"{path}: {name}: {error}") from None

    def file_of(self, name: str) -> Path:
        """The file that holds a tensor. Raises WeightError when none does."""
        if name not in self._files:
            raise WeightError(f"{self.directory}: no tensor {name} in its {len(self._files)} tensors")
        return self._files[name]

    def _file(self, path: Path) -> safe_open:
        if path not in self._open:
            self._open[path] = safe_open(path, framework="pt", device="cpu")
        return self._open[path]

    def _locate(self) -> dict[str, Path]:
        index, single = self.directory / INDEX, self.directory / SINGLE
        if index.exists():
            try:
                table = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
                return {name: self.directory / file for name, file in table.items()}
            except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
                raise WeightError(f"{index}: not an index of tensors: {type(error).__name__}: {error}") from None
        if not single.exists():
            raise WeightError(f"{self.directory}: neither {INDEX} nor {SINGLE}: not a Hugging Face directory")
        try:
            with safe_open(single, framework="pt", device="cpu") as file:
                return dict.fromkeys(file.keys(), single)
        except (SafetensorError, OSError, ValueError) as error:
            raise WeightError(f"{single}: {error}") from None


def carried_tensors(reader: HfReader, first: int, count: int) -> Iterator[tuple[str, torch.Tensor]]:
    """The tensors of layers ``first`` ... ``first + count - 1``, as they are stored: those that nothing here computes.

    Raises WeightError as ``HfReader.read`` does.
    """
    prefixes = tuple(f"model.layers.{layer}." for layer in range(first, first + count))
    for name in sorted(reader.names()):
        if name.startswith(prefixes):
            yield name, reader.read(name)


def buckets(tensors: Iterable[tuple[str, torch.Tensor]], max_bytes: int) -> Iterator[list[tuple[str, torch.Tensor]]]:
    """Consecutive named tensors, at most ``max_bytes`` together; a larger tensor is a bucket of its own."""
    bucket: list[tuple[str, torch.Tensor]] = []
    size = 0
    for name, tensor in tensors:
        if bucket and size + tensor.nbytes > max_bytes:
            yield bucket
            bucket, size = [], 0
        bucket.append((name, tensor))
        size += tensor.nbytes
    if bucket:
        yield bucket


def write_shards(
    directory: Path, tensors: Iterable[tuple[str, torch.Tensor]], *, owner: int, max_bytes: int
) -> dict[str, str]:
    """Writes this owner's tensors as shards of at most ``max_bytes``; returns {tensor name: file name}."""
    weight_map: dict[str, str] = {}
    for number, bucket in enumerate(buckets(tensors, max_bytes)):
        file = f"model-{owner:05d}-{number:05d}.safetensors"
        save_file({name: tensor.contiguous() for name, tensor in bucket}, directory / file, {"format": "pt"})
        weight_map |= dict.fromkeys((name for name, _ in bucket), file)
    return weight_map


def write_index(directory: Path, weight_map: dict[str, str]) -> None:
    """Writes the index that makes the shards one model."""
    total = sum((directory / file).stat().st_size for file in set(weight_map.values()))
    index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
    (directory / INDEX).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")


def copy_companions(source: Path, directory: Path) -> None:
    """Copies configuration, tokenizer and generation files."""
    for name in COMPANIONS:
        if (source / name).exists():
            shutil.copyfile(source / name, directory / name)
