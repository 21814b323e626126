"""Where a conversion writes: beside its destination, under a lock, finished files noted with their hashes.

    DST.partial/            what is written; moved to DST in one rename when it is whole
    DST.partial/.journal/   plan.json: from what and how; NAME.json: a finished file, its size, hash and contents

The next converter that is asked for the same thing goes on from there. No collectives here.
"""

from __future__ import annotations

import fcntl
import json
import os
import shutil
from collections.abc import Iterable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from megatron_gspo.convert.kinds import holds_checkpoint
from megatron_gspo.errors import ConfigError, WeightError
from megatron_gspo.megatron.checkpoint_files import REPLACED, FileEntry, describe, put_in_place, sync

PARTIAL = ".partial"
JOURNAL = ".journal"
PLAN = "plan.json"
UNFINISHED = ".unfinished"


class Workplace:
    """``DST.partial``, as one rank sees it. The first rank opens it, the others then attach."""

    def __init__(self, destination: Path) -> None:
        self.destination = destination
        self.path = destination.with_name(destination.name + PARTIAL)
        self.journal = self.path / JOURNAL
        self._lock = -1

    def open(self, plan: Mapping[str, Any]) -> str:
        """Locks the place and clears it unless it holds work of the same plan; returns a line on what was found.

        Raises ConfigError when another converter works here, or when it is somebody else's.
        """
        found = self.journal.is_dir()
        if self.path.exists() and not found and not _is_empty(self.path):
            raise ConfigError(f"{self.path} was left by no conversion, and one needs its name: move it away")
        self.journal.mkdir(parents=True, exist_ok=True)
        self._lock = _lock(self.path)
        recover(self.destination)
        if self._plan() == dict(plan):
            return f"continuing the conversion in {self.path}"
        _empty(self.path)
        self.journal.mkdir()
        _write(self.journal / PLAN, plan)
        return f"{self.path} held another conversion, or of other files: starting over" if found else ""

    def unlock(self) -> None:
        """Lets others work there."""
        if self._lock >= 0:
            os.close(self._lock)
            self._lock = -1

    def finished(self, name: str) -> dict[str, Any] | None:
        """The journal's entry of a file that was finished and still is what it was; None without one."""
        entry = _read(self.journal / f"{name}.json")
        path = self.path / name
        if not entry or not path.is_file() or path.stat().st_size != entry["file"]["bytes"]:
            return None
        return entry if describe(path).sha256 == entry["file"]["sha256"] else None

    def unfinished(self, name: str) -> Path:
        """Where to write a file before ``finish``."""
        return self.path / f"{name}{UNFINISHED}"

    def finish(self, name: str, contents: Any) -> dict[str, Any]:
        """Brings a written file to disk, hashes it, and notes both; returns the journal's entry."""
        unfinished = self.unfinished(name)
        sync(unfinished)
        file = asdict(describe(unfinished)) | {"name": name}
        unfinished.rename(self.path / name)
        entry = {"file": file, "contents": contents}
        _write(self.journal / f"{name}.json", entry)
        return entry

    def discard(self, name: str) -> None:
        """Removes a file that was begun."""
        self.unfinished(name).unlink(missing_ok=True)

    def publish(self) -> None:
        """Moves all but what a kill left to the destination; what lay there is replaced. The journal goes last: until
        then it says whose work this is."""
        for path in self.path.glob(f"*{UNFINISHED}"):
            path.unlink()
        put_in_place(self.path, self.destination)
        shutil.rmtree(self.destination / JOURNAL)

    def _plan(self) -> dict[str, Any]:
        return _read(self.journal / PLAN)


class Watch:
    """Notices that a file is no longer the one that was there at first."""

    def __init__(self, paths: Iterable[Path]) -> None:
        self._stamps = {path: _stamp(path) for path in sorted(paths)}

    def stamps(self) -> dict[str, list[int]]:
        """Size and time of change of each file."""
        return {str(path): stamp for path, stamp in self._stamps.items()}

    def check(self, paths: Iterable[Path] | None = None) -> None:
        """Raises WeightError naming the first of ``paths`` (default: all) that changed."""
        for path in self._stamps if paths is None else paths:
            now = _stamp(path)
            if now != self._stamps[path]:
                raise WeightError(
                    f"{path} changed while it was read ({self._stamps[path][0]} bytes before, {now[0]} now): "
                    f"nothing was written in its place; convert again when it is settled"
                )


def recover(destination: Path) -> None:
    """Brings back what a kill between two renames left without its name, and removes the journal that one behind
    them left. Raises ConfigError when what has that name is no checkpoint: the next conversion would remove it."""
    replaced = destination.with_name(destination.name + REPLACED)
    if replaced.exists() and not (holds_checkpoint(replaced) or _is_empty(replaced)):
        raise ConfigError(f"{replaced} was left by no conversion, and one needs its name: move it away")
    if replaced.exists() and not destination.exists():
        replaced.rename(destination)
    if (destination / JOURNAL / PLAN).is_file():
        shutil.rmtree(destination / JOURNAL)


def _is_empty(path: Path) -> bool:
    return path.is_dir() and not any(path.iterdir())


def _stamp(path: Path) -> list[int]:
    """[bytes, modification in ns, inode]; zeros of a file that is gone."""
    try:
        status = path.stat()
    except OSError:
        return [0, 0, 0]
    return [status.st_size, status.st_mtime_ns, status.st_ino]


def _lock(directory: Path) -> int:
    descriptor = os.open(directory, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        locked = os.path.samestat(os.fstat(descriptor), directory.stat())
    except BlockingIOError:
        locked = False
    except FileNotFoundError:  # the other one has just finished, and moved it
        locked = False
    except OSError:
        return descriptor  # a file system without locks takes any
    if not locked:
        os.close(descriptor)
        raise ConfigError(f"{directory} is being written by another converter")
    return descriptor


def _empty(directory: Path) -> None:
    for path in sorted(directory.iterdir(), key=lambda path: path.name == JOURNAL):  # which says whose it is
        shutil.rmtree(path) if path.is_dir() else path.unlink()


def _read(path: Path) -> dict[str, Any]:
    """A file of the journal; empty when it is missing, torn or not ours."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        if "file" in content:
            FileEntry(**content["file"])
        return content
    except (OSError, ValueError, TypeError):
        return {}


def _write(path: Path, content: Any) -> None:
    temporary = path.with_name(path.name + UNFINISHED)
    temporary.write_text(json.dumps(content), encoding="utf-8")
    sync(temporary)
    temporary.replace(path)
