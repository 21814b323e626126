"""Hugging Face directories of safetensors: reading single tensors, writing shard by shard."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path, PurePosixPath

import torch
from safetensors import SafetensorError, safe_open

from megatron_gspo.errors import WeightError
from megatron_gspo.hf import fp8
from megatron_gspo.hf.directory import copy_companions as copy_companions
from megatron_gspo.hf.directory import write_index as write_index
from megatron_gspo.hf.elsewhere import other_names, some, what_is_there
from megatron_gspo.hf.names import INDEX as INDEX
from megatron_gspo.hf.names import MODEL, index_name, shard_name, shards_in, single_name
from megatron_gspo.hf.names import SINGLE as SINGLE
from megatron_gspo.hf.stacked import Part, find_parts
from megatron_gspo.hf.stream import NAMES, check_header, write_tensors
from megatron_gspo.untrusted import open_regular, read_json, what_instead

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
"""Of weights that are read."""
STORED = {NAMES[dtype]: dtype for dtype in DTYPES}


class HfReader:
    """Reads tensors of a Hugging Face directory by name, through memory maps, a file opened once.

    Matrices of eight bits with scales a block are bfloat16 to whoever reads, and their scales have no names. Experts
    that are stacked in the files have the names and the shapes of one by one.
    """

    def __init__(self, directory: str | Path, stem: str = MODEL) -> None:
        """``stem``: what its files are called. Raises WeightError when there are none, or not all."""
        self.directory, self._stem = Path(directory), stem
        self._open: dict[Path, safe_open] = {}
        self._checked: set[Path] = set()
        files = self._locate(self.directory / index_name(stem), self.directory / single_name(stem))
        self._parts = find_parts(files, lambda name: self._shape_in(files[name], name), self.directory)
        stacked = {part.stored for part in self._parts.values()}
        self._files = {name: path for name, path in files.items() if name not in stacked}
        self._files |= {name: files[part.stored] for name, part in self._parts.items()}
        scales = fp8.scales_among(self._files)
        self._scales = {name for name in scales if self._stored(name.removesuffix(fp8.SCALE)) == fp8.STORED}

    def names(self) -> tuple[str, ...]:
        """Of all tensors, scales of fp8 left out."""
        return tuple(name for name in self._files if name not in self._scales)

    def stacked(self) -> tuple[str, ...]:
        """Names in the files of tensors that hold several experts each."""
        return tuple(sorted({part.stored for part in self._parts.values() if part.expert is not None}))

    def without_index(self) -> bool:
        """Whether there are several files, and no index that says which tensors are where: their headers do."""
        return len(self.files()) > 1 and not (self.directory / index_name(self._stem)).exists()

    def read(self, name: str) -> torch.Tensor:
        """One tensor, on the CPU, in its stored dtype, one of ``DTYPES``. Raises WeightError naming file and tensor."""
        path = self.file_of(name)
        try:
            tensor = self._tensor(path, name)
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
        path, part = self.file_of(name), self._parts.get(name, Part(name))
        return self._shape_in(path, part.stored) if part.expert is None else (part.rows, part.columns)

    def dtype(self, name: str) -> torch.dtype:
        """A tensor's stored dtype, from its file's header, one of ``DTYPES``. Raises WeightError as ``read`` does."""
        path, stored = self.file_of(name), self._stored(name)
        if stored == fp8.STORED and name + fp8.SCALE in self._scales:
            return fp8.READ
        if stored not in STORED:
            raise WeightError(f"{path}: {name} is stored as {stored}: weights must be {', '.join(map(str, DTYPES))}")
        return STORED[stored]

    def files(self) -> tuple[Path, ...]:
        """Every file that holds a tensor."""
        return tuple(sorted(set(self._files.values())))

    def release(self) -> None:
        """Closes the files, and with them the pages that reading has mapped; a later read opens them again."""
        self._open.clear()

    def file_of(self, name: str) -> Path:
        """The file that holds a tensor. Raises WeightError when none does, with what is there in its place."""
        if name not in self._files:
            hint = other_names(self._files)
            raise WeightError(
                f"{self.directory}: no tensor {name} in its {len(self._files)} tensors{f': {hint}' if hint else ''}"
            )
        return self._files[name]

    def _tensor(self, path: Path, name: str) -> torch.Tensor:
        part = self._parts.get(name, Part(name))
        if part.expert is None:
            return self._file(path).get_tensor(part.stored)
        tensor: torch.Tensor = self._file(path).get_slice(part.stored)[part.expert, part.start : part.start + part.rows]
        return tensor

    def _shape_in(self, path: Path, stored: str) -> tuple[int, ...]:
        try:
            return tuple(self._file(path).get_slice(stored).get_shape())
        except (SafetensorError, OSError, ValueError) as error:
            raise WeightError(f"{path}: {stored}: {error}") from None

    def _stored(self, name: str) -> str:
        """The dtype in the file's header."""
        path, part = self.file_of(name), self._parts.get(name, Part(name))
        try:
            return str(self._file(path).get_slice(part.stored).get_dtype())
        except (SafetensorError, OSError, ValueError) as error:
            raise WeightError(f"{path}: {name}: {error}") from None

    def _file(self, path: Path) -> safe_open:
        if path not in self._open:
            self._open[path] = _opened(path, checked=path in self._checked)
            self._checked.add(path)
        return self._open[path]

    def _locate(self, index: Path, single: Path) -> dict[str, Path]:
        if index.exists():
            try:
                table = dict(read_json(index)["weight_map"])
            except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
                raise WeightError(f"{index}: not an index of tensors: {type(error).__name__}: {error}") from None
            files = {name: file_beside(index, file) for name, file in table.items()}
            if single.exists() and {*files.values()} != {single}:
                raise WeightError(f"{self.directory}: both {single.name} and {index.name}, of other files: remove one")
            return files
        files = {}
        for path in [single] if single.exists() else whole_set(self.directory, self._stem):
            for name in _names_in(path):
                if files.setdefault(name, path) != path:
                    raise WeightError(f"{path}: {name} is in {files[name].name}, too: which of them counts?")
        return files


def whole_set(directory: Path, stem: str = MODEL) -> list[Path]:
    """Files without an index that say by their names that they are all: ``model-00001-of-00002.safetensors``, ...

    Raises WeightError, naming what is there, when there are none, some are missing, or there are several such sets.
    """
    sets = shards_in(directory, stem)
    if not sets:
        raise WeightError(
            f"{directory}: neither {index_name(stem)} nor {single_name(stem)}: {what_is_there(directory)}"
        )
    if len(sets) > 1:
        firsts = ", ".join(sorted(path.name for files in sets.values() for path in list(files.values())[:1]))
        raise WeightError(f"{directory}: no {index_name(stem)}, and files of several models ({firsts}): remove one's")
    ((count, files),) = sets.items()
    missing = [shard_name(stem, number - 1, count) for number in range(1, count + 1) if number not in files]
    if missing or len(files) != count:
        there = ", ".join(path.name for path in files.values())
        raise WeightError(
            f"{directory}: {some(missing) or f'{count} files'} missing, of {count} files (there: {there:.300}): "
            f"download the model again"
        )
    return [files[number] for number in sorted(files)]


def _opened(path: Path, *, checked: bool = False) -> safe_open:
    """A file of tensors, whose header is read once more unless it was ``checked``.

    Raises OSError for a directory or a pipe (which would wait for a writer), ValueError for what came in the file's
    place (a pointer of Git LFS), and for a header that names a tensor twice: the library takes the last one.
    """
    with open_regular(path) as start:
        words = what_instead(start.read(64))
    if words:
        raise ValueError(f"it {words}")
    file = safe_open(path, framework="pt", device="cpu")
    if not checked:
        check_header(path)
    return file


def _names_in(path: Path) -> list[str]:
    """Of a file's tensors, from its header."""
    try:
        with _opened(path) as file:
            return list(file.keys())
    except (SafetensorError, OSError, ValueError) as error:
        raise WeightError(f"{path}: {error}") from None


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
        write_tensors(directory / file, bucket)
        weight_map |= dict.fromkeys((name for name, _ in bucket), file)
    return weight_map
