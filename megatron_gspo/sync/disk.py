"""Weight sync through safetensors files in a directory that the servers can read (shared memory, by default)."""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import shutil
import stat
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

from megatron_gspo.errors import SyncError, WriteError
from megatron_gspo.hf.stream import write_tensors
from megatron_gspo.storage import writing
from megatron_gspo.supervise import remove_afterwards
from megatron_gspo.sync.base import BucketSync, NamedTensor, Names, on_host
from megatron_gspo.untrusted import read_bytes

PREFIX = "megatron-gspo-"
SETTLED_S = 60.0
"""Age in seconds from which a directory that nobody locks is abandoned."""


class DiskSync(BucketSync):
    """Every owner writes its buckets as files; rank 0 writes the index and tells the servers to load the directory.

    The directory is made anew, under a name that nobody knows before. Servers of this run read it as this user, and
    nobody else can; where the servers are somebody's (``shared``), it and its files have what the umask leaves.

    One version exists at a time: the one before is removed when the next begins (the servers hold it in memory). The
    directory is locked as long as this process lives, so that what a killed run left is told from what is in use.
    """

    _directory: tempfile.TemporaryDirectory[str] | None = None
    _lock = -1
    _files = 0

    def close(self) -> None:
        """Removes what was written."""
        if self._directory is not None:
            self._directory.cleanup()
            os.close(self._lock)
            self._directory = None

    def _begin(self) -> str:
        self.close()
        remove_abandoned(Path(self.config.directory))
        with self._refusals():
            check_sticky(Path(self.config.directory))
            self._directory = tempfile.TemporaryDirectory(prefix=PREFIX, dir=self.config.directory)
            remove_afterwards(self._directory.name)
            self._lock = os.open(self._directory.name, os.O_RDONLY)
            fcntl.flock(self._lock, fcntl.LOCK_EX)
            place = Path(self._directory.name) / "weights"
            place.mkdir(mode=0o777 if self.shared else 0o700)
            os.chmod(self._directory.name, stat.S_IMODE(place.stat().st_mode))
            self._write(place / "config.json", read_bytes(self.model_path / "config.json"))
        return str(place)

    def _send(self, place: str, bucket: list[NamedTensor]) -> str:
        self._files += 1
        path = Path(place) / f"rank-{self.peers.rank:05}-{self._files:05}.safetensors"
        partial = path.with_suffix(".partial")
        with self._refusals():
            write_tensors(partial, on_host(bucket), mode=self._mode)
            partial.rename(path)
        return path.name

    def _path(self) -> str:
        return f"files in {self.config.directory}"

    def _finish(self, place: str, sent: list[list[tuple[Names, str]]]) -> None:
        weight_map = {name: file for rank in sent for names, file in rank for name in names}
        index = Path(place) / "model.safetensors.index.json"
        with self._refusals():
            self._write(index, json.dumps({"metadata": {}, "weight_map": weight_map}).encode())
        self.servers.update_from_disk(place)

    def _abandon(self) -> None:
        self.close()  # a full disk needs the room

    @property
    def _mode(self) -> int:
        """Permissions of a file, less the umask."""
        return 0o666 if self.shared else 0o600

    def _write(self, path: Path, content: bytes) -> None:
        with os.fdopen(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, self._mode), "wb") as file:
            file.write(content)

    @contextlib.contextmanager
    def _refusals(self) -> Iterator[None]:
        try:
            with writing(Path(self.config.directory), then="start again, or name another sync.directory"):
                yield
        except WriteError as error:
            raise SyncError(f"sync.directory = {error}") from error


def check_sticky(directory: Path) -> None:
    """Raises SyncError where every user may rename what another made: weights of theirs could take our place."""
    mode = directory.stat().st_mode
    if mode & stat.S_IWOTH and not mode & stat.S_ISVTX:
        raise SyncError(
            f"sync.directory = {directory}: every user may replace files in it (mode {stat.S_IMODE(mode):o}): name "
            f"another, or set its sticky bit (chmod +t)"
        )


def remove_abandoned(directory: Path) -> None:
    """Removes what runs that were killed left in ``directory``: directories of ours that no living process locks.

    Others may write there, too: what is not a directory of this user is not opened (a pipe would wait for ever).
    """
    for path in directory.glob(f"{PREFIX}*"):
        with contextlib.suppress(OSError):  # another user's, in use, or gone
            descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_NONBLOCK)
            try:
                found = os.fstat(descriptor)
                if found.st_uid != os.geteuid() or time.time() - found.st_mtime < SETTLED_S:
                    continue  # somebody else's; or perhaps made just now, and not locked yet
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                shutil.rmtree(path)
            finally:
                os.close(descriptor)
