"""Hugging Face directories of safetensors: reading single tensors, writing shard by shard."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterable, Iterator
from pathlib import Path, PurePosixPath

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from megatron_gspo.errors import WeightError
from megatron_gspo.hf import fp8
from megatron_gspo.hf.stream import NAMES

MODEL = "model"
"""What a model's files are called."""


def index_name(stem: str) -> str:
    """The index of several files."""
    return f"{stem}.safetensors.index.json"


def single_name(stem: str) -> str:
    """The one file that needs no index."""
    return f"{stem}.safetensors"


INDEX, SINGLE = index_name(MODEL), single_name(MODEL)
DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
"""Of weights that are read."""
STORED = {name: dtype for dtype, name in NAMES.items()}
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
    """Reads tensors of a Hugging Face directory by name, through memory maps, a file opened once.

    Matrices of eight bits with scales a block are bfloat16 to whoever reads, and their scales have no names.
    """

    def __init__(self, directory: str | Path, stem: str = MODEL) -> None:
        """``stem``: what its files are called. Raises WeightError when there are none."""
        self.directory = Path(directory)
        self._files = self._locate(self.directory / index_name(stem), self.directory / single_name(stem))
        self._open: dict[Path, safe_open] = {}
        scales = fp8.scales_among(self._files)
        self._scales = {name for name in scales if self._stored(name.removesuffix(fp8.SCALE)) == fp8.STORED}

    def names(self) -> tuple[str, ...]:
        return tuple(name for name in self._files if name not in self._scales)

    def read(self, name: str) -> torch.Tensor:
        """One tensor, on the CPU, in its stored dtype, one of ``DTYPES``. Raises WeightError naming file and tensor."""
        path = self.file_of(name)
        try:
            tensor = self._file(path).get_tensor(name)
        except (SafetensorError, OSError, ValueError) as error:
            raise WeightError(f"{path}: {name}: {error}") from None
        if tensor.dtype == torch.float8_e4m3fn and name + fp8.SCALE in self._scales:
            return fp8.dequantise(f"{path}: {name}", tensor, self.read(name + fp8.SCALE))
        if tensor.dtype not in DTYPES:
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

    def dtype(self, name: str) -> torch.dtype:
        """A tensor's stored dtype, from its file's header, one of ``DTYPES``. Raises WeightError as ``read`` does."""
        path, stored = self.file_of(name), self._stored(name)
        if stored == fp8.STORED and name + fp8.SCALE in self._scales:
            return fp8.READ
        if stored not in STORED:
            raise WeightError(f"{path}: {name} is stored as {stored}: weights must be {', '.join(map(str, DTYPES))}")
        return STORED[stored]

    def _stored(self, name: str) -> str:
        path = self.file_of(name)
        try:
            return str(self._file(path).get_slice(name).get_dtype())
        except (SafetensorError, OSError, ValueError) as error:
            raise WeightError(f"{path}: {name}: {error}") from None

    def files(self) -> tuple[Path, ...]:
        """Every file that holds a tensor."""
        return tuple(sorted(set(self._files.values())))

    def release(self) -> None:
        """Closes the files, and with them the pages that reading has mapped; a later read opens them again."""
        self._open.clear()

    def file_of(self, name: str) -> Path:
        """The file that holds a tensor. Raises WeightError when none does."""
        if name not in self._files:
            raise WeightError(f"{self.directory}: no tensor {name} in its {len(self._files)} tensors")
        return self._files[name]

    def _file(self, path: Path) -> safe_open:
        if path not in self._open:
            self._open[path] = safe_open(path, framework="pt", device="cpu")
        return self._open[path]

    def _locate(self, index: Path, single: Path) -> dict[str, Path]:
        if index.exists():
            try:
                table = dict(json.loads(index.read_text(encoding="utf-8"))["weight_map"])
            except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
                raise WeightError(f"{index}: not an index of tensors: {type(error).__name__}: {error}") from None
            files = {name: file_beside(index, file) for name, file in table.items()}
            if single.exists() and {*files.values()} != {single}:
                raise WeightError(f"{self.directory}: both {single.name} and {index.name}, of other files: remove one")
            return files
        if not single.exists():
            raise WeightError(f"{self.directory}: neither {index.name} nor {single.name}: not a Hugging Face directory")
        try:
            with safe_open(single, framework="pt", device="cpu") as file:
                return dict.fromkeys(file.keys(), single)
        except (SafetensorError, OSError, ValueError) as error:
            raise WeightError(f"{single}: {error}") from None


def file_beside(index: Path, name: object) -> Path:
    """The file that an index names: one in its own directory, or below it.

    Raises WeightError for what is no name, or one that leads out of it. A link may: in Hugging Face's cache each file
    is one.
    """
    parts = PurePosixPath(name).parts if isinstance(name, str) and "\0" not in name else ()
    if not parts or parts[0][0] == "/" or ".." in parts:
        raise WeightError(f"{index} names the file {name!r:.200}, which is not in its directory: correct the index")
    return index.parent.joinpath(*parts)


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
