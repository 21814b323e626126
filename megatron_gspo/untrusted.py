"""Files that somebody else made: opened only where they are files, read up to a size, and JSON that means one thing.

A name in a directory from elsewhere may be a pipe, which waits for a writer for ever, or a device without end; a JSON
object may hold a key twice, of which each reader takes another one.
"""

from __future__ import annotations

import errno
import json
import os
import stat
from collections import Counter
from pathlib import Path
from typing import Any, BinaryIO

MOST_JSON_BYTES = 2**28
"""Of a JSON file that is read at once; the largest tokenizers have some 40 MB."""
MOST_DEPTH = 100
"""Brackets within brackets."""
MOST_DIGITS = 100
"""Of an integer; Python itself stops at 4300, and advises to raise that."""
KINDS = {
    stat.S_IFIFO: "a named pipe",
    stat.S_IFSOCK: "a socket",
    stat.S_IFCHR: "a device",
    stat.S_IFBLK: "a device",
    stat.S_IFDIR: "a directory",
}
INSTEAD = {
    b"version https://git-lfs": "is a pointer of Git LFS, not the file: git lfs pull brings it, or download it again",
    b"<!doctype html": "is a web page, not the file: download it again",
    b"<html": "is a web page, not the file: download it again",
}
"""How a file begins that came in the place of the one that was asked for, in small letters."""
CACHED = "snapshots"
"""Hugging Face's cache: ``models--a--b/snapshots/REVISION/file`` links to ``models--a--b/blobs/HASH``."""


def check_regular(path: Path) -> None:
    """Raises OSError for what is there and is no regular file, or leads to none by a link; FileNotFoundError too."""
    kind = KINDS.get(stat.S_IFMT(path.stat().st_mode))
    if kind:
        raise OSError(f"it is not a regular file, but {kind}")


def open_regular(path: Path) -> BinaryIO:
    """Opens a regular file for reading; waits for nobody. Raises OSError as ``check_regular`` does."""
    check_regular(path)
    descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):  # another one by now
        os.close(descriptor)
        raise OSError("it is not a regular file any more")
    return os.fdopen(descriptor, "rb")


def read_bytes(path: Path, most: int = MOST_JSON_BYTES) -> bytes:
    """A regular file of at most ``most`` bytes. Raises OSError."""
    with open_regular(path) as file:
        content = file.read(most + 1)
    if len(content) > most:
        raise OSError(errno.EFBIG, f"it has more than {most} bytes")
    return content


def read_json(path: Path, most: int = MOST_JSON_BYTES) -> Any:
    """What a JSON file holds. Raises OSError, or ValueError as ``parse_json`` does, and for what came in its place."""
    content = read_bytes(path, most)
    if words := what_instead(content[:64]):
        raise ValueError(f"it {words}")
    return parse_json(content)


def what_instead(head: bytes) -> str:
    """What a file that begins so is, where it came in the place of the one that was asked for; else empty."""
    begins = head.lstrip().lower()
    return next((words for begin, words in INSTEAD.items() if begins.startswith(begin)), "")


def parse_json(content: bytes) -> Any:
    """JSON in UTF-8, without a key that stands twice in one object, without integers of more than ``MOST_DIGITS``
    digits, and at most ``MOST_DEPTH`` deep. Raises ValueError, of one line."""
    deep = ValueError(f"it is nested more than {MOST_DEPTH} deep")
    try:
        tree = json.loads(content.decode(), object_pairs_hook=without_twins, parse_int=_integer)
    except RecursionError:
        raise deep from None
    level: list[Any] = [[tree]]
    for _ in range(MOST_DEPTH + 1):
        level = [inner for outer in level for inner in _inside(outer) if isinstance(inner, dict | list)]
        if not level:
            return tree
    raise deep


def strange_entry(directory: Path) -> str:
    """Says which of a directory's entries is neither a file nor a directory, by its name; empty where none is."""
    for path in sorted(directory.iterdir()):
        try:
            kind = KINDS.get(stat.S_IFMT(path.stat().st_mode))
        except OSError:  # a link to nowhere: as if it were not there
            continue
        if kind and not path.is_dir():
            return f"{path.name} is {kind}, where files are expected: remove it"
    return ""


def leads_out(directory: Path, path: Path) -> bool:
    """Whether ``path``, which lies in ``directory``, is by a link a file from outside of it.

    Hugging Face's cache links its snapshots to blobs of the same model, which are inside.
    """
    home, real = Path(os.path.realpath(directory)), Path(os.path.realpath(path))
    inside = home.parent.parent if home.parent.name == CACHED else home
    return inside not in real.parents


def _inside(tree: Any) -> Any:
    return tree.values() if isinstance(tree, dict) else tree


def without_twins(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """A JSON object, as ``json.loads`` asks for one. Raises ValueError for a key that stands twice."""
    found = dict(pairs)
    if len(found) < len(pairs):
        twice = next(name for name, count in Counter(name for name, _ in pairs).items() if count > 1)
        raise ValueError(f"the key {twice!r:.80} stands twice in one object: remove one")
    return found


def _integer(digits: str) -> int:
    if len(digits) > MOST_DIGITS:
        raise ValueError(f"it holds an integer of {len(digits.lstrip('-'))} digits")
    return int(digits)
