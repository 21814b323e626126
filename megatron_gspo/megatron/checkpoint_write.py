"""How a checkpoint reaches the disk: Megatron plans it, a thread of each rank writes its share, the ranks publish it.

Megatron 0.16.1 can save asynchronously by itself, from forked processes. Threads are used instead (as Megatron does
from 0.19 on): a forked writer outlives a killed rank and goes on writing into the run that resumes; one that is killed
leaves its parent waiting for ever; and its results come through a manager, one process more. Writing and hashing leave
the interpreter to the main thread. And a failure on one rank must reach all of them, which Megatron's finalization
promises only for shards: it writes the description of the whole on the first rank while the others wait.
"""

from __future__ import annotations

import inspect
import queue
import shutil
from collections.abc import Callable, Collection
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.dist_checkpointing.core import CheckpointingConfig, save_config
from megatron.core.dist_checkpointing.state_dict_utils import save_preprocess
from megatron.core.dist_checkpointing.strategies import filesystem_async
from megatron.core.dist_checkpointing.strategies.filesystem_async import FileSystemWriterAsync
from megatron.core.dist_checkpointing.strategies.torch import TorchDistSaveShardedStrategy

from megatron_gspo.megatron.checkpoint_files import UNFINISHED, FileEntry, describe, make_empty, publish
from megatron_gspo.parallel.exchange import gather_objects, together
from megatron_gspo.storage import writing

BACKEND = ("torch_dist", 1)
COMMON = "common.pt"
FILES = 2
"""That a rank writes at the same time (Megatron's default in 0.16.1; in 0.19.2 it is 1)."""
Written = tuple[list[Any], list[FileEntry]]
"""What a rank wrote: torch's WriteResults, and its files."""


class PendingSave:
    """A checkpoint on its way to disk. Every rank makes one, and calls ``finish``; both are collective."""

    def __init__(
        self,
        state: dict[str, Any],
        directory: Path,
        header: dict[str, Any],
        world: dist.ProcessGroup,
        live: Collection[int] = (),
    ) -> None:
        """``live``: addresses of storages that change while this writes; tensors in them are copied here and now."""
        self.directory = directory
        self._unfinished = directory.with_name(directory.name + UNFINISHED)
        self._header, self._world = header, world
        shards, common = save_preprocess(state)
        try:
            self._on_first_rank(lambda: self._begin(common))
        except Exception:
            self.discard()
            raise
        strategy = _Planner(*BACKEND, thread_count=FILES)
        strategy.async_save(shards, self._unfinished)
        self._writer, self._metadata = strategy.planned
        buckets = [_on_host(bucket, live) for bucket in self._writer.write_buckets]
        self._writer.write_buckets = None  # else what they were copied from stays as long
        executor = ThreadPoolExecutor(1, thread_name_prefix="checkpoint")
        self._writing: Future[Written] = executor.submit(self._write, buckets)
        executor.shutdown(wait=False)

    def written(self) -> bool:
        """Whether every rank has written its share, or failed to. Collective."""
        return all(gather_objects(self._writing.done(), self._world))

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

    def _begin(self, common: Any) -> None:
        make_empty(self._unfinished)
        torch.save(common, self._unfinished / COMMON)

    def _result(self) -> Written:
        with self._refusals():
            return self._writing.result()

    def discard(self) -> None:
        """Removes what there is of it, written or not. Not collective."""
        if dist.get_rank() == 0:  # a full disk needs the room
            shutil.rmtree(self._unfinished, ignore_errors=True)

    def _refusals(self) -> AbstractContextManager[None]:
        then = "train.resume = true continues from the checkpoint that `latest` names, if there is one"
        return writing(self.directory, "the checkpoint", then)

    def _write(self, buckets: list[Any]) -> Written:
        """In a thread: every bucket to a file, synced and hashed."""
        if not buckets:
            return [], []
        transforms = [self._writer.transforms] if hasattr(self._writer, "transforms") else []
        with ThreadPoolExecutor(len(buckets), thread_name_prefix="checkpoint") as pool:
            parts = list(pool.map(lambda bucket: _write_file(transforms, bucket), buckets))
        return [result for results, _ in parts for result in results], [entry for _, entry in parts]

    def _publish(self, parts: list[Written]) -> None:
        """On the first rank, when all shards are on disk."""
        self._writer.finish(self._metadata, [results for results, _ in parts])
        save_config(CheckpointingConfig(*BACKEND), str(self._unfinished))
        files = {entry.name: entry for _, entries in parts for entry in entries}
        own = [describe(path) for path in self._unfinished.iterdir() if path.name not in files]
        publish(self._unfinished, self.directory, self._header, [*files.values(), *own])

    def _on_first_rank(self, action: Callable[[], object]) -> None:
        """Touches the file system on one rank while the others wait."""

        def act() -> None:
            if dist.get_rank() == 0:
                with self._refusals():
                    action()

        together(act, self._world)


class _Planner(TorchDistSaveShardedStrategy):
    """Megatron's strategy, up to where it would write."""

    def _get_save_and_finalize_callbacks(self, writer: FileSystemWriterAsync, planned: Any, *args: Any) -> None:
        self.planned = writer, planned[1]  # the second: what describes the whole, on the first rank

    def async_save(self, *args: Any, **kwargs: Any) -> None:
        # Else Megatron makes a manager process for this queue, which imports the main script again.
        filesystem_async._results_queue = filesystem_async._results_queue or queue.SimpleQueue()
        save = super().async_save
        # 0.19.2 plans for nvidia-resiliency-ext, which need not be installed, unless it is told to plan for itself.
        choice = {"async_strategy": "mcore"} if "async_strategy" in inspect.signature(save).parameters else {}
        save(*args, **kwargs, **choice)


def _on_host(bucket: Any, live: Collection[int]) -> Any:
    """A file's tensors in host memory, and not in a live storage. (Megatron's plan has copied views already.)"""
    path, key, (data, tensors) = bucket
    return path, key, (data, [(item, tensor.to("cpu", copy=address(tensor) in live)) for item, tensor in tensors])


def address(tensor: torch.Tensor) -> int:
    """Of a tensor's storage."""
    return tensor.untyped_storage().data_ptr()


def _write_file(transforms: list[Any], bucket: Any) -> tuple[list[Any], FileEntry]:
    """Writes one file as Megatron does, in this thread, and hashes it."""
    results: queue.SimpleQueue[Any] = queue.SimpleQueue()
    count: queue.Queue[int] = queue.Queue()
    count.put(0)
    FileSystemWriterAsync.write_preloaded_data(transforms, 0, bucket, results, count, True)
    _, result = results.get()
    if isinstance(result, Exception):
        raise result
    return result, describe(Path(bucket[0]))
