"""How a checkpoint reaches the disk: each rank writes its blocks in threads while it makes them; the ranks publish it.

The format is Megatron's, the writing is not: Megatron copies to host memory all that a rank will write, and every
weight once more, since each is a part of a larger buffer. Here a rank holds a few tensors at a time, and all of them
only where training is to go on meanwhile. Writing and hashing leave the interpreter to the main thread. A failure on
one rank reaches all of them.
"""

from __future__ import annotations

import queue
import secrets
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.dist_checkpointing.dict_utils import nested_values
from megatron.core.dist_checkpointing.mapping import ShardedObject, ShardedTensor, apply_factories, is_main_replica

from megatron_gspo.errors import WeightError
from megatron_gspo.megatron.checkpoint_files import UNFINISHED, FileEntry, describe, make_empty, publish, sync
from megatron_gspo.megatron.checkpoint_stream import Block, BlockWriter, Size, write_description
from megatron_gspo.parallel.exchange import broadcast_object, gather_objects, together
from megatron_gspo.storage import writing

FILES = 2
"""That a rank writes at the same time."""
AHEAD = 1
"""Tensors that wait for each of them."""


@dataclass(frozen=True)
class Share:
    """A block of a tensor that this rank writes, or an object of Megatron's in which there is nothing."""

    key: str
    tensor: torch.Tensor | None = None
    """In the shape that it has in the file; None of an object."""
    offset: Size = ()
    whole: Size = ()
    """Shape of the whole tensor."""

    @property
    def bytes(self) -> int:
        """That it takes, about."""
        return 0 if self.tensor is None else self.tensor.nbytes


@dataclass(frozen=True)
class Written:
    """What a rank has written."""

    blocks: Mapping[str, list[Block]]
    """By file."""
    tensors: Mapping[str, tuple[torch.dtype, Size]]
    """Of the whole tensors, by key."""
    files: list[FileEntry]


def pieces_of(entry: Any) -> Iterator[ShardedTensor | ShardedObject]:
    """What Megatron makes of one entry of a sharded state: several, of a matrix that lies in parts."""
    state = {"": entry}
    apply_factories(state)
    yield from nested_values(state)


def place_of(shard: ShardedTensor) -> tuple[Size, Size]:
    """(offset in the whole tensor, shape of the block), both with the axes that only the whole has."""
    return tuple(shard.global_offset), (1,) * shard.prepend_axis_num + tuple(shard.local_shape)


def to_write(entry: Any) -> Iterator[Share]:
    """The blocks of an entry of a sharded state that this rank is to write: others have the same ones otherwise."""
    for shard in pieces_of(entry):
        if not is_main_replica(shard.replica_id):
            continue
        if isinstance(shard, ShardedObject):
            yield Share(shard.unique_key)
        else:
            offset, shape = place_of(shard)
            yield Share(shard.key, shard.data.detach().view(shape), offset, tuple(shard.global_shape))


class PendingSave:
    """A checkpoint on its way to disk. Every rank makes one, and calls ``finish``; both are collective."""

    def __init__(
        self,
        shares: Iterable[Share],
        directory: Path,
        header: dict[str, Any],
        world: dist.ProcessGroup,
        *,
        background: bool = False,
    ) -> None:
        """
        Args:
            shares: what this rank writes; every rank exhausts its own, and making one may be collective.
            background: whether training may go on as soon as this returns: then all of them are held until they are
                written, and must not change. Else a few are held at a time.
        """
        self.directory = directory
        self._header, self._world = header, world
        token = broadcast_object(secrets.token_hex(4), 0, world)  # an own place: checkpoint_files says why
        self._unfinished = directory.with_name(f"{directory.name}.{token}{UNFINISHED}")
        self._on_first_rank(lambda: make_empty(self._unfinished))
        paths = [self._unfinished / f"__{dist.get_rank()}_{number}.distcp" for number in range(FILES)]
        self._files = [_File(path, 0 if background else AHEAD) for path in paths]
        try:
            for share in shares:
                min(self._files, key=lambda file: file.bytes).take(share)
        finally:
            for file in self._files:
                file.end()

    def written(self) -> bool:
        """Whether every rank has written its share, or failed to. Collective."""
        return all(gather_objects(all(file.writing.done() for file in self._files), self._world))

    def finish(self) -> None:
        """Waits for all ranks and gives the checkpoint its name. Collective.

        Raises WriteError on every rank when one could not write; what there is of the checkpoint is then removed.
        """
        try:
            written = together(self._result, self._world)
            parts = gather_objects(written, self._world)
            self._on_first_rank(lambda: self._publish(parts))
        except Exception:
            self.discard()
            raise

    def _result(self) -> Written:
        with self._refusals():
            found = [file.writing.result() for file in self._files]
        tensors = {key: described for file in self._files for key, described in file.tensors.items()}
        blocks = {entry.name: blocks for entry, blocks in filter(None, found)}
        return Written(blocks, tensors, [entry for entry, _ in filter(None, found)])

    def discard(self) -> None:
        """Removes what there is of it, written or not. Not collective."""
        if dist.get_rank() == 0:  # a full disk needs the room
            shutil.rmtree(self._unfinished, ignore_errors=True)

    def _refusals(self) -> AbstractContextManager[None]:
        then = "train.resume = true continues from the checkpoint that `latest` names, if there is one"
        return writing(self.directory, "the checkpoint", then)

    def _publish(self, parts: list[Written]) -> None:
        """On the first rank, when all blocks are on disk."""
        tensors = {key: described for part in parts for key, described in part.tensors.items()}
        blocks = {name: blocks for part in parts for name, blocks in part.blocks.items()}
        check_whole(self.directory, tensors, blocks)
        write_description(self._unfinished, tensors, blocks)
        files = {entry.name: entry for part in parts for entry in part.files}
        own = [describe(path) for path in self._unfinished.iterdir() if path.name not in files]
        publish(self._unfinished, self.directory, self._header, [*files.values(), *own])

    def _on_first_rank(self, action: Callable[[], object]) -> None:
        """Touches the file system on one rank while the others wait."""

        def act() -> None:
            if dist.get_rank() == 0:
                with self._refusals():
                    action()

        together(act, self._world)


class _File:
    """One file of blocks, written by a thread of its own. It is made when there is something to write."""

    def __init__(self, path: Path, ahead: int) -> None:
        """``ahead``: shares that wait at most; 0: any number."""
        self.bytes = 0
        self.tensors: dict[str, tuple[torch.dtype, Size]] = {}
        self._path = path
        self._waiting: queue.Queue[Share | None] = queue.Queue(ahead)
        executor = ThreadPoolExecutor(1, thread_name_prefix="checkpoint")
        self.writing: Future[tuple[FileEntry, list[Block]] | None] = executor.submit(self._write)
        executor.shutdown(wait=False)

    def take(self, share: Share) -> None:
        """Hands over a share; waits while there are enough."""
        self.bytes += share.bytes
        if share.tensor is not None:
            self.tensors[share.key] = (share.tensor.dtype, share.whole)
        self._waiting.put(share)

    def end(self) -> None:
        """There are no more."""
        self._waiting.put(None)

    def _write(self) -> tuple[FileEntry, list[Block]] | None:
        """In the thread: what comes, until the end. A failure is told then: who makes shares makes them with others."""
        writer: BlockWriter | None = None
        failure: Exception | None = None
        while (share := self._waiting.get()) is not None:
            if failure is None:
                try:
                    writer = writer or BlockWriter(self._path)
                    _write_share(writer, share)
                except Exception as error:
                    failure = error
        try:
            if writer is not None:
                writer.close()
        except OSError as error:  # what was still in memory
            failure = failure or error
        if failure is not None:
            raise failure
        if writer is None:
            return None
        sync(self._path)  # here: another machine's fsync says nothing of this one's memory
        return describe(self._path), writer.blocks


def _write_share(writer: BlockWriter, share: Share) -> None:
    if share.tensor is None:
        writer.empty_object(share.key)
    else:
        writer.tensor(share.key, share.offset, share.tensor)


def check_whole(
    directory: Path, tensors: Mapping[str, tuple[torch.dtype, Size]], blocks: Mapping[str, Iterable[Block]]
) -> None:
    """Raises WeightError unless the blocks of each tensor have as many elements together as it has."""
    found = dict.fromkeys(tensors, 0)
    for block in (block for of_file in blocks.values() for block in of_file if block.offset is not None):
        found[block.key] += torch.Size(block.size).numel()
    for key, (_, shape) in tensors.items():
        if found[key] != torch.Size(shape).numel():
            raise WeightError(
                f"{directory}: {key}: ranks wrote {found[key]} elements of {torch.Size(shape).numel()}, {list(shape)}"
            )
