"""Plain copies of files that cannot be read from the middle: compressed text, and Parquet in a few huge row groups."""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import os
import stat
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

from megatron_gspo.errors import DataError

VERSION = 1
"""Raise it when a copy is written another way."""


def plain_copy(source: Path, suffix: str, write: Callable[[Path], None]) -> Path:
    """The copy of ``source`` that ``write`` makes, made once for this content (its path, size and time).

    It lies under ``XDG_CACHE_HOME`` (else ``~/.cache``) in ``megatron_gspo/rows``, one a source: a newer one replaces
    it. Processes that want the same copy wait for the first. Raises DataError when it cannot be written.
    """
    found = source.stat()
    name = hashlib.sha256(str(source.resolve()).encode()).hexdigest()[:24]
    stamp = hashlib.sha256(f"{VERSION} {found.st_size} {found.st_mtime_ns} {found.st_ino}".encode()).hexdigest()[:16]
    directory = _directory()
    wanted = directory / f"{name}-{stamp}{suffix}"
    with _locked(directory / f"{name}.lock"):
        if wanted.is_file():
            return wanted
        for old in directory.glob(f"{name}-*"):
            old.unlink(missing_ok=True)
        unfinished = wanted.with_name(f"{wanted.name}.unfinished")
        try:
            write(unfinished)
            unfinished.rename(wanted)
        except OSError as error:
            raise DataError(
                f"{source}: no plain copy can be written to {directory}: {error}; set XDG_CACHE_HOME to a place with "
                f"room for its content"
            ) from None
        finally:
            unfinished.unlink(missing_ok=True)
    return wanted


def _directory() -> Path:
    home = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    places = [Path(home) / "megatron_gspo" / "rows", Path(tempfile.gettempdir()) / f"megatron_gspo-{os.getuid()}"]
    for place in places:
        with contextlib.suppress(OSError):
            place.mkdir(mode=0o700, parents=True, exist_ok=True)
            at_home = place is places[0]
            found = place.stat() if at_home else place.lstat()  # in /tmp another user may have made it, or a link
            own = found.st_uid == os.getuid() and (at_home or not found.st_mode & 0o022)
            if stat.S_ISDIR(found.st_mode) and own and os.access(place, os.W_OK):
                return place
    raise DataError(f"neither {places[0]} nor {places[1]} can be written: set XDG_CACHE_HOME to a place that can")


@contextlib.contextmanager
def _locked(path: Path) -> Iterator[None]:
    with path.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield
