"""The files of checkpoints: hashed, synced to disk, given their name when they are whole, removed by a rule.

    checkpoints/
      outer_00008/             a whole checkpoint: Megatron's files, and checkpoint.json, which lists and hashes them
      outer_00012/
      latest                   the name of the one to continue from; moved last
      outer_00016.3fa85f64.unfinished/  being written, or left by a kill; ``clear_leftovers`` removes it

The number is the outer steps done. What is being written has a name that nobody had before: a rank of a run that was
given up, on a machine that nobody reaches any more, may still write, and must not meet the run that goes on. On a
shared file system (NFS) a new name is also one that no machine remembers as missing. Only the first rank renames and
removes. No collectives here: who calls what on which rank is ``megatron.checkpoint``'s part.
"""

from __future__ import annotations

import enum
import hashlib
import json
import os
import pickle
import re
import shutil
from collections.abc import Collection, Iterable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, ClassVar

from megatron_gspo.errors import WeightError
from megatron_gspo.untrusted import read_bytes, read_json, strange_entry

HEADER = "checkpoint.json"
LATEST = "latest"
LONGEST_NAME = 1024
"""Bytes of ``latest``."""
METADATA = ".metadata"
UNFINISHED, REPLACED, REMOVED = ".unfinished", ".replaced", ".removed"
NAME = re.compile(r"outer_\d{5,}")
_TORCH = "torch.distributed.checkpoint."
UNPICKLED = {
    f"{_TORCH}metadata": (
        *("BytesStorageMetadata", "ChunkStorageMetadata", "Metadata", "MetadataIndex", "StorageMeta"),
        *("TensorProperties", "TensorStorageMetadata", "_MEM_FORMAT_ENCODING"),
    ),
    f"{_TORCH}planner": ("SavePlan", "TensorWriteData", "WriteItem", "WriteItemType"),
    f"{_TORCH}filesystem": ("_StorageInfo",),
    "torch.serialization": ("_get_layout",),
}
"""Module -> what Megatron's description of a checkpoint is made of, beside torch's dtypes and ``torch.Size``. Names
alone: a module holds what it imports, and ``dataclass`` is one that runs text."""
TORCH_NAME = re.compile(r"Size|b?float\d+|u?int\d+|bool")
MOST_METADATA_BYTES = 2**30
"""Of ``.metadata``: 100,000 blocks take some 30 MB."""
_PLAIN = (str, int, float, bool, type(None))


@dataclass(frozen=True)
class FileEntry:
    """One file as ``checkpoint.json`` lists it."""

    name: str
    bytes: int
    sha256: str

    def __post_init__(self) -> None:
        if not (isinstance(self.name, str) and self.name == Path(self.name).name and isinstance(self.sha256, str)):
            raise ValueError(f"{self.name!r:.80} with sha256 {self.sha256!r:.80} is no file of a checkpoint")


def is_distributed(directory: Path) -> bool:
    """Whether a directory holds a Megatron distributed checkpoint."""
    return (directory / METADATA).is_file()


def name_of(outer_steps: int) -> str:
    """The directory of the checkpoint after ``outer_steps`` outer steps."""
    return f"outer_{outer_steps:05d}"


def number_of(directory: Path) -> int:
    """Outer steps done, from a checkpoint's name: names of six digits do not sort behind those of five."""
    return int(directory.name.removeprefix("outer_"))


def checkpoints_in(root: Path) -> dict[int, Path]:
    """Outer steps done -> whole checkpoint, in order."""
    whole = [path for path in root.glob("outer_*") if NAME.fullmatch(path.name) and (path / HEADER).is_file()]
    return {number_of(path): path for path in sorted(whole, key=number_of)}


def latest_in(root: Path) -> Path | None:
    """What ``latest`` names, there or not; without that file the newest checkpoint; None when there is none."""
    try:
        name = read_bytes(root / LATEST, LONGEST_NAME).decode().strip()
    except (FileNotFoundError, NotADirectoryError):
        return next(reversed(checkpoints_in(root).values()), None)
    except (OSError, UnicodeDecodeError) as error:
        raise WeightError(f"{root / LATEST} cannot be read: {error}") from None
    if not NAME.fullmatch(name):
        raise WeightError(f"{root / LATEST} holds {name[:80]!r}, which names no checkpoint{_others(root / LATEST)}")
    return root / name


def move_latest(directory: Path) -> None:
    """Makes ``latest`` name ``directory``, in one move."""
    latest = directory.parent / LATEST
    temporary = latest.with_name(latest.name + UNFINISHED)
    temporary.write_text(directory.name + "\n", encoding="utf-8")
    sync(temporary)
    temporary.replace(latest)
    sync(latest.parent)


def retire(newest: Path, *, keep_last: int, keep_every: int, busy: Collection[Path] = ()) -> None:
    """Removes what the rule does not keep: the ``keep_last`` newest, and each whose number ``keep_every`` divides.

    Those that somebody is ``busy`` with stay until the next time. Numbers above ``newest``'s belong to a history that
    was given up (somebody set ``latest`` back) and go too.
    """
    found = checkpoints_in(newest.parent)
    last = number_of(newest)
    numbers = [number for number in found if number <= last]
    kept = set(numbers[-keep_last:]) | {number for number in numbers if keep_every and number % keep_every == 0}
    for number in sorted(found.keys() - kept):
        if found[number] in busy:
            continue
        removed = found[number].with_name(found[number].name + REMOVED)
        found[number].rename(removed)  # a kill while files go must not leave half a checkpoint under its name
    for removed in newest.parent.glob(f"*{REMOVED}"):  # and those of last time: NFS keeps a file that somebody reads
        shutil.rmtree(removed, ignore_errors=True)


def clear_leftovers(root: Path) -> None:
    """Removes what a kill left behind. Nothing else may write into ``root`` meanwhile."""
    for suffix in (UNFINISHED, REPLACED, REMOVED):
        for path in root.glob(f"*{suffix}"):
            shutil.rmtree(path) if path.is_dir() else path.unlink()


def make_empty(directory: Path) -> None:
    """An empty directory at that place."""
    if directory.exists():
        shutil.rmtree(directory)
    directory.mkdir(parents=True)


def describe(path: Path) -> FileEntry:
    """Hashes a file."""
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    return FileEntry(path.name, path.stat().st_size, digest)


def publish(unfinished: Path, directory: Path, header: Mapping[str, Any], files: Iterable[FileEntry]) -> None:
    """Writes ``checkpoint.json`` and moves ``unfinished`` to ``directory``; one that lay there is replaced."""
    write_header(unfinished, header, files)
    put_in_place(unfinished, directory)


def write_header(directory: Path, header: Mapping[str, Any], files: Iterable[FileEntry]) -> None:
    """Writes ``checkpoint.json``. Its hash is in itself: of everything else in it."""
    content = {**header, "files": [asdict(entry) for entry in sorted(files, key=lambda entry: entry.name)]}
    text = json.dumps({**content, "sha256": _digest(content)}, indent=2) + "\n"
    (directory / HEADER).write_text(text, encoding="utf-8")


def put_in_place(unfinished: Path, directory: Path) -> None:
    """Waits until ``unfinished`` is on disk and moves it to ``directory``; one that lay there is replaced."""
    for path in unfinished.rglob("*"):
        sync(path)
    sync(unfinished)
    replaced = directory.with_name(directory.name + REPLACED)
    if replaced.exists():
        shutil.rmtree(replaced)
    if directory.exists():
        directory.rename(replaced)
    _move_in(unfinished, directory)
    if replaced.exists():
        shutil.rmtree(replaced)


def _move_in(unfinished: Path, directory: Path) -> None:
    unfinished.rename(directory)
    sync(directory.parent)


def read_header(directory: Path) -> dict[str, Any]:
    """``checkpoint.json``. Raises WeightError when it is missing, torn or altered."""
    if not directory.is_dir():
        raise WeightError(f"{directory}: no such checkpoint{_others(directory)}")
    if problem := strange_entry(directory):
        raise WeightError(f"{directory}: {problem}")
    try:
        header = read_json(directory / HEADER)
        written = header.pop("sha256")
        [FileEntry(**entry) for entry in header["files"]]
        header["step"], header["model"], header["extra"]
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise _damaged(directory, HEADER, f"{type(error).__name__}: {error}") from None
    if written != _digest(header):
        raise _damaged(directory, HEADER, "it was altered: its sha256 is not that of its content")
    return header


def verify(directory: Path, files: Iterable[Mapping[str, Any]]) -> None:
    """Holds files against the entries of ``checkpoint.json``: presence, size, hash. Raises WeightError."""
    for expected in files:
        path = directory / expected["name"]
        if not path.is_file():
            raise _damaged(directory, path.name, "it is missing")
        size = path.stat().st_size
        if size != expected["bytes"]:
            raise _damaged(directory, path.name, f"it has {size} bytes and was written with {expected['bytes']}")
        found = describe(path).sha256
        if found != expected["sha256"]:
            raise _damaged(directory, path.name, f"it was altered: sha256 {found[:12]}..., not what was written")


def read_metadata(directory: Path) -> Any:
    """``.metadata``: torch's ``Metadata``, unpickled from classes of descriptions alone: no code runs. Raises
    WeightError."""
    try:
        size = (directory / METADATA).stat().st_size
        if size > MOST_METADATA_BYTES:
            raise ValueError(f"{size} bytes: a description of tensors has at most {MOST_METADATA_BYTES}")
        with (directory / METADATA).open("rb") as file:
            return _Descriptions(file).load()
    except Exception as error:  # whatever pickle raises on a file that somebody made
        raise _damaged(directory, METADATA, f"{type(error).__name__}: {error}") from None


def sync(path: Path) -> None:
    """Waits until a file's content, or a directory's entries, are on disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


class _Descriptions(pickle._Unpickler):
    """Finds the names of ``UNPICKLED`` alone, sets attributes of what it has made, never of what it has found, and
    hashes and calls with flat values only.

    An enum's members are found and not made, and torch shares them: one with other attributes would change torch. A
    tuple of a tuple of ..., each in the next one twice, takes a few bytes a level and twice the time to hash.

    pickle's own in Python: what the one in C does with attributes cannot be held back.
    """

    dispatch: ClassVar[dict[int, Any]] = dict(pickle._Unpickler.dispatch)

    def find_class(self, module: str, name: str) -> Any:
        known = TORCH_NAME.fullmatch(name) if module == "torch" else name in UNPICKLED.get(module, ())
        if not known:
            raise pickle.UnpicklingError(f"{module}.{name} has no place in a description of tensors")
        return super().find_class(module, name)

    def load_build(self) -> None:
        found = self.stack[-2]  # type: ignore[attr-defined]
        if isinstance(found, type | enum.Enum) or not type(found).__module__.startswith(_TORCH):
            raise pickle.UnpicklingError(f"{_shown(found)} gets no attributes in a description of tensors")
        super().load_build()  # type: ignore[misc]

    def load_reduce(self) -> None:
        _check_flat(self.stack[-1])  # type: ignore[attr-defined]
        super().load_reduce()  # type: ignore[misc]

    def load_newobj(self) -> None:
        _check_flat(self.stack[-1])  # type: ignore[attr-defined]
        super().load_newobj()  # type: ignore[misc]

    def load_setitem(self) -> None:
        _check_key(self.stack[-2])  # type: ignore[attr-defined]
        super().load_setitem()  # type: ignore[misc]

    def load_setitems(self) -> None:
        for key in self.stack[::2]:  # type: ignore[attr-defined]
            _check_key(key)
        super().load_setitems()  # type: ignore[misc]

    def load_refused(self) -> None:
        raise pickle.UnpicklingError("sets and calls by keyword have no place in a description of tensors")

    dispatch |= {
        pickle.BUILD[0]: load_build,
        pickle.REDUCE[0]: load_reduce,
        pickle.NEWOBJ[0]: load_newobj,
        pickle.SETITEM[0]: load_setitem,
        pickle.SETITEMS[0]: load_setitems,
    }
    dispatch |= dict.fromkeys(
        (pickle.ADDITEMS[0], pickle.FROZENSET[0], pickle.NEWOBJ_EX[0], pickle.OBJ[0], pickle.INST[0]), load_refused
    )


def _check_key(key: object) -> None:
    """Raises UnpicklingError unless a key is text, a number, or torch's index of a tensor's block."""
    if f"{type(key).__module__}.{type(key).__qualname__}" == f"{_TORCH}metadata.MetadataIndex":  # without importing it
        _check_flat((key.fqn, key.index))  # type: ignore[attr-defined]
        _check_flat(tuple(key.offset or ()))  # type: ignore[attr-defined]
    elif not isinstance(key, _PLAIN):
        raise pickle.UnpicklingError(f"{_shown(key)} is no key in a description of tensors")


def _check_flat(values: object) -> None:
    """Raises UnpicklingError unless ``values`` are plain ones, or tuples of plain ones."""
    if not isinstance(values, tuple):
        raise pickle.UnpicklingError(f"{_shown(values)} are no arguments in a description of tensors")
    for value in values:
        inner = value if isinstance(value, tuple | list) else (value,)
        if not all(isinstance(part, _PLAIN) for part in inner):
            raise pickle.UnpicklingError(f"{_shown(value)} is nested deeper than a description of tensors")


def _shown(value: object) -> str:
    """What a value is. Not its repr, which may take for ever."""
    return f"the class {value.__name__}" if isinstance(value, type) else f"an object of {type(value).__name__}"


def _digest(content: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def _damaged(directory: Path, name: str, what: str) -> WeightError:
    return WeightError(f"{directory}: the checkpoint is damaged: {name}: {what}{_others(directory)}")


def _others(directory: Path) -> str:
    """What else there is to continue from."""
    others = [path.name for path in checkpoints_in(directory.parent).values() if path.name != directory.name]
    if not others:
        return ""
    return f"; also there: {', '.join(others)} (write a name into {directory.parent / LATEST} to continue from it)"
