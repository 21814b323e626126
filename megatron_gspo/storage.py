"""Writing to disk: what the file system refuses becomes one line, with the place, the free space and what to do.

A write that fails while something runs is a failed run (``WriteError``, exit status 1). A place that the user named
and that cannot be written from the start, because it is no directory or is somebody else's, is a mistake
(``ConfigError``, exit status 2); a disk that is full is not, whenever it is noticed.
"""

from __future__ import annotations

import contextlib
import errno
import os
import re
from collections.abc import Iterator
from pathlib import Path

from megatron_gspo.errors import ConfigError, MegatronGspoError, WriteError
from megatron_gspo.supervise import remove_afterwards

ROOM = frozenset({errno.ENOSPC, errno.EDQUOT, errno.EFBIG})
"""Errors that more room mends."""
MISTAKES = frozenset(
    getattr(errno, name)
    for name in (
        *("ENOENT", "EACCES", "EPERM", "EISDIR", "ENOTDIR", "EEXIST", "ENOTEMPTY"),
        *("ENAMETOOLONG", "ELOOP", "EROFS", "EINVAL", "EXDEV"),
    )
)
"""Errors about a name that the user gave: another name mends them."""
_IN_TEXT = re.compile(r"\(os error (\d+)\)")
"""How safetensors, which is written in Rust, says which error the system gave."""
_TORCH_WRITER = re.compile(r"inline_container|PytorchStreamWriter|iostream error")
"""How torch's writer of zip files fails; it does not say why."""


@contextlib.contextmanager
def writing(path: Path, what: str = "", then: str = "start it again") -> Iterator[None]:
    """Raises WriteError for what the file system refuses within: ``what`` cannot be written at ``path``.

    ``then``: what to do once there is room. Errors that have nothing to do with files, and ours, pass as they are.
    """
    try:
        yield
    except MegatronGspoError:
        raise
    except Exception as error:
        cause = refusal(error)
        if cause is None:
            raise
        where = f"{path}: {what}" if what else f"{path}"
        raise WriteError(f"{where} {explain(cause, path, then)}") from error


@contextlib.contextmanager
def claiming(name: str, path: Path) -> Iterator[None]:
    """The first writes to a place that the user named in the setting or option ``name`` (with its value).

    Raises ConfigError where another place would mend it, and WriteError for a full disk.
    """
    try:
        yield
    except MegatronGspoError:
        raise
    except OSError as error:
        if error.errno in MISTAKES:
            raise ConfigError(f"{name} cannot be written: {error}") from None
        raise WriteError(f"{name} {explain(error, path, 'start it again')}") from error


def replace_text(path: Path, text: str, errors: str = "strict") -> None:
    """Replaces a file by ``text`` in one move: no reader sees half of it, and no half of it is left."""
    temporary = path.with_name(path.name + ".tmp")
    remove_afterwards(temporary)
    try:
        temporary.write_text(text, encoding="utf-8", errors=errors)
        temporary.replace(path)
    except BaseException:  # a full disk needs the room, and an interrupt leaves nothing
        temporary.unlink(missing_ok=True)
        raise


def cut_torn_line(path: Path) -> None:
    """Takes off what stands behind the last whole line: a kill may have come between the halves of one."""
    if not path.exists():
        return
    content = path.read_bytes()
    whole = content.rfind(b"\n") + 1
    if whole < len(content):
        with path.open("r+b") as file:
            file.truncate(whole)


def explain(error: Exception, path: Path, then: str) -> str:
    """``cannot be written: [Errno 28] ... (0.0 of 3.1 MB free at DIR): make room, then ...``."""
    full = getattr(error, "errno", None) in ROOM or not isinstance(error, OSError)
    return f"cannot be written: {error} ({free_space(path)}): {'make room' if full else 'mend that'}, then {then}"


def refusal(error: BaseException) -> Exception | None:
    """What the file system said, when that is why ``error`` was raised; None when it is something else.

    An OSError may be behind what a library raised (torch), or be named in its text alone (safetensors).
    """
    foreign = isinstance(error, RuntimeError) or type(error).__name__ == "SafetensorError"
    seen: BaseException | None = error
    while seen is not None and (foreign or seen is error):
        if isinstance(seen, OSError) and not isinstance(seen, (ConnectionError, TimeoutError)):
            return seen
        seen = seen.__cause__ or seen.__context__
    if type(error).__name__ == "SafetensorError" and (found := _IN_TEXT.search(str(error))):
        return OSError(int(found[1]), os.strerror(int(found[1])))
    if isinstance(error, RuntimeError) and _TORCH_WRITER.search(f"{error} {error.__context__}"):
        return error
    return None


def free_space(path: Path) -> str:
    """The room where ``path`` lies, or would lie: bytes, and files where none can be made any more."""
    place = Path(path).absolute()
    while not place.is_dir() and place != place.parent:
        place = place.parent
    try:
        found = os.statvfs(place)
    except OSError as error:
        return f"{place}: {error.strerror}"
    free, size = found.f_bavail * found.f_frsize, found.f_blocks * found.f_frsize
    no_more_files = ", and no file can be added" if found.f_files and not found.f_favail else ""
    return f"{_bytes(free)} of {_bytes(size)} free at {place}{no_more_files}"


def is_mistake(error: OSError) -> bool:
    """Whether an error is about a name that the user gave, and not about the machine."""
    return error.errno in MISTAKES


def _bytes(number: int) -> str:
    return f"{number / 1e9:.1f} GB" if number >= 1e9 else f"{number / 1e6:.1f} MB"
