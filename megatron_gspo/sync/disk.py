"""Weight sync through safetensors files in a directory that the servers can read (shared memory, by default)."""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import shutil
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

from safetensors.torch import save_file

from megatron_gspo.errors import SyncError, WriteError
from megatron_gspo.storage import writing
from megatron_gspo.supervise import remove_afterwards
from megatron_gspo.sync.base import BucketSync, NamedTensor, Names, own_storage

PREFIX = "megatron-gspo-"
SETTLED_S = 60.0
"""Age in seconds from which a directory that nobody locks is abandoned."""


class DiskSync(BucketSync):
    """Every owner writes its buckets as files; rank 0 writes the index and tells the servers to load the directory.

    One version exists at a time: the one before is removed when the next begins (the servers hold it in memory). The
    directory is locked as long as this process lives, so that what a killed run left is told from what is in use.
    """

    _directory: tempfile.TemporaryDirectory[str] | None = None
    _lock = -1
    _files = 0

    def close(self) -> None:
        if self._directory is not None:
            self._directory.cleanup()
            os.close(self._lock)
            self._directory = None

    def _begin(self) -> str:
        self.close()
        remove_abandoned(Path(self.config.directory))
        with self._refusals():
            self._directory = tempfile.TemporaryDirectory(prefix=PREFIX, dir=self.config.directory)
            remove_afterwards(self._directory.name)
            self._lock = os.open(self._directory.name, os.O_RDONLY)
            fcntl.flock(self._lock, fcntl.LOCK_EX)
            os.chmod(self._directory.name, 0o755)  # servers may run as another user
            place = Path(self._directory.name) / "weights"
            place.mkdir()
            shutil.copyfile(self.model_path / "config.json", place / "config.json")
        return str(place)

    def _send(self, place: str, bucket: list[NamedTensor]) -> str:
        self._files += 1
        path = Path(place) / f"rank-{self.peers.rank:05}-{self._files:05}.safetensors"
        partial = path.with_suffix(".partial")
        with self._refusals():
            save_file({name: own_storage(tensor) for name, tensor in bucket}, partial, metadata={"format": "pt"})
            partial.rename(path)
        return path.name

    def _finish(self, place: str, sent: list[list[tuple[Names, str]]]) -> None:
        weight_map = {name: file for rank in sent for names, file in rank for name in names}
        index = Path(place) / "model.safetensors.index.json"
        with self._refusals():
            index.write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
        # A server that started from no files ("--load-format dummy") would look for these weights in the same way.
        body = {"model_path": place, "load_format": "auto", "flush_cache": True}
        self.servers.post("/update_weights_from_disk", body)

    def _abandon(self) -> None:
        self.close()  # a full disk needs the room

    @contextlib.contextmanager
    def _refusals(self) -> Iterator[None]:
        try:
            with writing(Path(self.config.directory), then="start again, or name another sync.directory"):
                yield
        except WriteError as error:
            raise SyncError(f"sync.directory = {error}") from error


def remove_abandoned(directory: Path) -> None:
    """Removes what runs that were killed left in ``directory``: directories of ours that no living process locks."""
    for path in directory.glob(f"{PREFIX}*"):
        with contextlib.suppress(OSError):  # another user's, in use, or gone
            if time.time() - path.stat().st_mtime < SETTLED_S:
                continue  # perhaps made just now, and not locked yet
            descriptor = os.open(path, os.O_RDONLY)
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                shutil.rmtree(path)
            finally:
                os.close(descriptor)
