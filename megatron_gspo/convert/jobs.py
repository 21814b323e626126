"""The two directions: which files there will be, what goes into each, and what makes them a checkpoint."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch

from megatron_gspo.convert.eight_bits import AsStored, EightBits
from megatron_gspo.convert.sources import REPEATED, HuggingFaceSource, MegatronSource, Source, same_dtype
from megatron_gspo.errors import ConfigError
from megatron_gspo.hf.carried import CARRIED
from megatron_gspo.hf.critic import name_as_critic
from megatron_gspo.hf.directory import copy_companions, write_index
from megatron_gspo.hf.fp8 import READ
from megatron_gspo.hf.names import MODEL, shard_name
from megatron_gspo.hf.stream import StreamWriter, TensorInfo
from megatron_gspo.megatron.checkpoint import plain
from megatron_gspo.megatron.checkpoint_files import METADATA, FileEntry, describe, write_header
from megatron_gspo.megatron.checkpoint_stream import COMMON, Block, BlockWriter, write_description
from megatron_gspo.megatron.places import Place

Item = TypeVar("Item")
Moved = Callable[[int], None]
"""Told of bytes as they are written."""


@dataclass(frozen=True)
class Shard:
    """A file to write."""

    name: str
    places: tuple[Place, ...]
    bytes: int
    """Of its tensors."""
    first: bool
    """Whether it also takes what belongs to no place."""
    carried: tuple[str, ...] = ()
    """Tensors that are copied as they are: in files of their own beside Megatron's."""


class ToMegatron:
    """Hugging Face tensors joined into Megatron's parameters."""

    def __init__(self, source: HuggingFaceSource, max_shard_bytes: int) -> None:
        self.source, self._model = source, source.model
        self._dtypes = {
            place: same_dtype(place, [source.info(name) for name in place.named.hf_names])
            for place in self._model.places.parameters
        }
        check_dtypes(self._dtypes)
        sized = [(place, _bytes(place, self._dtypes[place])) for place in self._model.places.parameters]
        self.shards = [
            Shard(f"__0_{number}.distcp", places, size, number == 0)
            for number, (places, size) in enumerate(_cut(sized, max_shard_bytes))
        ]
        carried = list(_cut(_sized(source), max_shard_bytes))
        self.shards += [
            Shard(shard_name(CARRIED, number, len(carried)), (), size, False, names)
            for number, (names, size) in enumerate(carried)
        ]

    def write(self, shard: Shard, path: Path, moved: Moved) -> list[Any]:
        """Writes a file; returns its blocks, as JSON can hold them, or the names of carried tensors."""
        if shard.carried:
            infos = [self.source.info(name) for name in shard.carried]
            return _write_tensors(self.source.read, path, infos, moved)
        writer = BlockWriter(path)
        try:
            for key in self._model.places.objects if shard.first else ():
                writer.empty_object(key)
            whole = (place.named.rule.join(list(map(self.source.read, place.named.hf_names))) for place in shard.places)
            for place, joined in zip(shard.places, ahead(whole), strict=True):
                start = 0
                for piece in place.pieces:
                    block = joined[start : start + piece.rows] if len(place.pieces) > 1 else joined
                    writer.tensor(piece.key, piece.offset, block.reshape(piece.size))
                    start += piece.rows
                moved(joined.nbytes)
        finally:
            writer.close()
        return [asdict(block) for block in writer.blocks]

    def complete(self, partial: Path, entries: Mapping[str, dict[str, Any]]) -> list[str]:
        """Adds what makes the files a checkpoint. ``entries``: file -> journal's entry. Returns lines to be shown."""
        blocks = {
            shard.name: [_block(block) for block in entries[shard.name]["contents"]]
            for shard in self.shards
            if shard.places
        }
        carried = {shard.name: entries[shard.name] for shard in self.shards if shard.carried}
        indices = write_index(partial, _weight_map(carried), CARRIED) if carried else []
        tensors = {
            piece.key: (self._dtypes[place], piece.whole)
            for place in self._model.places.parameters
            for piece in place.pieces
        }
        write_description(partial, tensors, blocks)
        said = copy_companions(self._model.home, partial)
        files = [FileEntry(**entry["file"]) for entry in entries.values()]
        files += [describe(partial / name) for name in (METADATA, COMMON, "metadata.json", *indices)]
        extra = {"converted_from": str(self.source.directory), REPEATED: dict(self.source.repeated)}
        write_header(partial, {"step": 0, "model": plain(self._model.shape), "extra": extra}, files)
        return said


def check_dtypes(dtypes: Mapping[Place, torch.dtype]) -> None:
    """Raises ConfigError unless the parameters of one stored tensor, as a layer's experts are, have one dtype."""
    first: dict[str, Place] = {}
    for place, dtype in dtypes.items():
        for piece in place.pieces:
            other = first.setdefault(piece.key, place)
            if dtypes[other] != dtype:
                one, two = other.named.hf_names[0], place.named.hf_names[0]
                raise ConfigError(
                    f"{one} is {dtypes[other]}, {two} is {dtype}: Megatron keeps them in one tensor ({piece.key}), "
                    f"which has one dtype"
                )


class ToHuggingFace:
    """Megatron's parameters split into Hugging Face tensors."""

    def __init__(self, source: MegatronSource, max_shard_bytes: int, form: AsStored) -> None:
        self.source, self._model, self._form = source, source.model, form
        sized = [(place, _total(self._infos(place))) for place in self._model.places.parameters]
        carried = [(name, _total(form.infos(source.info(name)))) for name in source.carried]
        cut = list(_cut([*sized, *carried], max_shard_bytes))
        self.shards = [
            Shard(
                name=shard_name(MODEL, number, len(cut)),
                places=tuple(item for item in items if isinstance(item, Place)),
                bytes=size,
                first=number == 0,
                carried=tuple(item for item in items if isinstance(item, str)),
            )
            for number, (items, size) in enumerate(cut)
        ]

    def write(self, shard: Shard, path: Path, moved: Moved) -> list[str]:
        """Writes a file; returns the names of its tensors."""
        repeated = self.source.repeated
        return _write_tensors(
            lambda name: self._form.read(repeated.get(name, name)), path, self._infos_of(shard), moved
        )

    def complete(self, partial: Path, entries: Mapping[str, dict[str, Any]]) -> list[str]:
        """As ``ToMegatron.complete``."""
        write_index(partial, _weight_map(entries))
        dtype = None
        if self._form.quantization:
            dtype = str(READ).removeprefix("torch.")
        elif self._model.home != self.source.directory:  # of the model that training started from: perhaps in bfloat16
            dtype = str(self._most_common_dtype()).removeprefix("torch.")
        said = copy_companions(self._model.home, partial, dtype=dtype, quantization=self._form.quantization)
        if self._model.valued:
            name_as_critic(partial)
        return said

    def _infos_of(self, shard: Shard) -> list[TensorInfo]:
        parameters = [info for place in shard.places for info in self._infos(place)]
        return parameters + [info for name in shard.carried for info in self._form.infos(self.source.info(name))]

    def _infos(self, place: Place) -> list[TensorInfo]:
        """A place's tensors, and those that repeat one of them."""
        infos = [info for name in place.named.hf_names for info in self._form.infos(self.source.info(name))]
        again = [
            TensorInfo(name, info.dtype, info.shape)
            for info in infos
            for name, original in self.source.repeated.items()
            if original == info.name
        ]
        return infos + again

    def _most_common_dtype(self) -> torch.dtype:
        sizes: dict[torch.dtype, int] = {}
        for shard in self.shards:
            for info in self._infos_of(shard):
                sizes[info.dtype] = sizes.get(info.dtype, 0) + info.nbytes
        return max(sizes, key=lambda dtype: sizes[dtype])


Job = ToMegatron | ToHuggingFace


def make_job(source: Source, max_shard_bytes: int, *, eight_bits: bool = False) -> Job:
    """The direction is what the source is not. Raises ConfigError for ``eight_bits`` in a checkpoint to train from."""
    if eight_bits and source.model.valued:
        raise ConfigError(f"{source.directory}: eight bits are for engines, and no engine serves a critic")
    if isinstance(source, MegatronSource):
        return ToHuggingFace(source, max_shard_bytes, EightBits(source) if eight_bits else AsStored(source))
    if eight_bits:
        raise ConfigError(
            f"{source.directory} is a Hugging Face directory, and a Megatron checkpoint of it holds what is trained: "
            f"eight bits are for engines; convert without --dtype, and what that wrote with it"
        )
    return ToMegatron(source, max_shard_bytes)


def ahead(values: Iterator[Item]) -> Iterator[Item]:
    """The values, each made in a thread while the one before is used."""
    end = object()
    with ThreadPoolExecutor(1, thread_name_prefix="ahead") as pool:
        coming: Future[Any] = pool.submit(next, values, end)
        while (value := coming.result()) is not end:
            coming = pool.submit(next, values, end)
            yield value


def _bytes(place: Place, dtype: torch.dtype) -> int:
    return torch.Size(place.shape).numel() * dtype.itemsize


def _sized(source: Source) -> list[tuple[str, int]]:
    """Carried tensors and their bytes."""
    return [(name, source.info(name).nbytes) for name in source.carried]


def _cut(sized: Iterable[tuple[Item, int]], most: int) -> Iterator[tuple[tuple[Item, ...], int]]:
    """Consecutive items (places, names), at most ``most`` bytes together; a larger one is alone. With their bytes."""
    items: list[Item] = []
    total = 0
    for item, size in sized:
        if items and total + size > most:
            yield tuple(items), total
            items, total = [], 0
        items.append(item)
        total += size
    if items:
        yield tuple(items), total


def _total(infos: Iterable[TensorInfo]) -> int:
    return sum(info.nbytes for info in infos)


def _write_tensors(
    read: Callable[[str], torch.Tensor], path: Path, infos: Sequence[TensorInfo], moved: Moved
) -> list[str]:
    """Writes a safetensors file; returns its names."""
    writer = StreamWriter(path, infos)
    tensors = (read(info.name) for info in infos)
    for info, tensor in zip(infos, ahead(tensors), strict=True):
        writer.write(info.name, tensor)
        moved(tensor.nbytes)
    writer.close()
    return [info.name for info in infos]


def _weight_map(entries: Mapping[str, dict[str, Any]]) -> dict[str, str]:
    """{tensor: file}, of journal's entries of safetensors files."""
    return {tensor: name for name, entry in entries.items() for tensor in entry["contents"]}


def _block(entry: dict[str, Any]) -> Block:
    offset = None if entry["offset"] is None else tuple(entry["offset"])
    return Block(entry["key"], offset, tuple(entry["size"]), entry["start"], entry["length"])
