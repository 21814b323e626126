"""From a path to its rows: one file, a directory of shards, or a pattern; which kind of file is seen from its name."""

from __future__ import annotations

import bz2
import gzip
import hashlib
import lzma
import re
import shutil
import zlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from megatron_gspo.data.copies import plain_copy
from megatron_gspo.data.parquet_rows import ParquetRows
from megatron_gspo.data.rows import Row, Rows
from megatron_gspo.data.text_rows import csv_rows, json_array, json_lines
from megatron_gspo.errors import DataError
from megatron_gspo.untrusted import check_regular, what_instead

PARQUET, JSON_LINES, TABLES = (".parquet", ".pq"), (".jsonl", ".ndjson", ".json"), {".csv": ",", ".tsv": "\t"}
COMPRESSED: dict[str, Callable[..., Any]] = {".gz": gzip.open, ".bz2": bz2.open, ".xz": lzma.open}
UNREAD = {
    ".zst": "is compressed with zstd: unpack it (zstd -d)",
    ".zip": "is a zip archive: unpack it",
    ".tar": "is an archive: unpack it",
    ".tgz": "is an archive: unpack it",
    ".arrow": "is an Arrow file (of datasets.save_to_disk): write Parquet, with dataset.to_parquet(...)",
    ".xlsx": "is a spreadsheet: save it as CSV",
    ".pkl": "is a pickle: write JSON lines or Parquet",
}
BEGINNINGS = {
    b"\x1f\x8b": "is compressed with gzip: give it a name that ends in .gz",
    b"BZh": "is compressed with bzip2: give it a name that ends in .bz2",
    b"\xfd7zXZ": "is compressed with xz: give it a name that ends in .xz",
    b"\x28\xb5\x2f\xfd": UNREAD[".zst"],
    b"\x04\x22\x4d\x18": "is compressed with lz4: unpack it (lz4 -d)",
    b"PK\x03\x04": UNREAD[".zip"],
    b"7z\xbc\xaf": "is a 7-Zip archive: unpack it",
    b"ARROW1": UNREAD[".arrow"],
    b"SQLite format 3": "is a database: write JSON lines or Parquet",
    b"\xff\xfe\0\0": "is UTF-32: save it as UTF-8",
    b"{\0": "is UTF-16: save it as UTF-8",
    b"[\0": "is UTF-16: save it as UTF-8",
    b"\xff\xfe": "is UTF-16: save it as UTF-8",
    b"\xfe\xff": "is UTF-16: save it as UTF-8",
}
"""How a file begins that is not the text which its name says."""
NOT_ROWS = ("dataset_info.json", "dataset_infos.json", "dataset_dict.json", "state.json")
"""What the datasets library puts beside the shards."""
_OF_SO_MANY = re.compile(r"(.*?)(\d+)-of-(\d+)(.*)")


def open_rows(path: str | Path) -> Rows:
    """The rows of a file, of the shards in a directory (in the order of their names), or of a pattern (``train-*``).

    JSON lines, a JSON array (``.json`` that begins with "["), CSV and TSV, each also under ``.gz``, ``.bz2`` and
    ``.xz``, and Parquet; a file of any other name is read as JSON lines. Raises DataError.
    """
    path = Path(path)
    if path.is_file():
        return _open_file(path)
    _check_waits_for_nobody(path)
    shards = list(find_shards(path))
    return _open_file(shards[0]) if len(shards) == 1 and not path.is_dir() else Shards(shards)


def check_readable(path: str | Path) -> None:
    """Finds the files without reading them. Raises DataError."""
    if not Path(path).is_file():
        _check_waits_for_nobody(Path(path))
        find_shards(Path(path))


def find_shards(path: Path) -> Sequence[Path]:
    """The files of a directory or of a pattern, by name. Raises DataError for shards of several data sets, and when
    one of "-of-00008" is missing."""
    is_pattern = any(character in path.name for character in "*?[") and path.parent.is_dir()
    if path.is_dir():
        found = [file for file in path.iterdir() if _is_data(file) and not file.is_dir()]
    elif is_pattern:
        found = [file for file in path.parent.glob(path.name) if not file.is_dir()]
    else:
        raise DataError(f"{path}: no such data file")
    shards = sorted(found)
    for shard in shards:
        _check_waits_for_nobody(shard)
    if not shards:
        folders = [file.name for file in path.iterdir() if file.is_dir()][:3] if path.is_dir() else []
        inside = f"; it holds the directories {', '.join(sorted(folders))}: name one of them" if folders else ""
        raise DataError(f"{path}: no data files (.parquet, .jsonl, .json, .csv, .tsv){inside}")
    if not is_pattern:
        kinds = {re.sub(r"\d+", "#", shard.name): shard.name for shard in reversed(shards)}
        if len(kinds) > 1:
            raise DataError(
                f"{path}: holds files of several kinds ({', '.join(sorted(kinds.values())[:4])}), which are perhaps "
                f"other splits: name one, or those that belong together by a pattern, as in {path}/train-*"
            )
    _check_complete(path, shards)
    return shards


def _check_waits_for_nobody(path: Path) -> None:
    """Raises DataError for a pipe or a device, which can be read only once, and a link to nowhere."""
    if path.is_symlink() and not path.exists():
        raise DataError(f"{path} is a link to {path.readlink()}, where there is no file")
    if not path.exists() or path.is_dir():
        return
    try:
        check_regular(path)
    except OSError as error:
        raise DataError(f"{path}: {error}: rows are read more than once, so write them to a file") from None


def _is_data(file: Path) -> bool:
    if file.name.startswith((".", "_")) or file.name in NOT_ROWS:
        return False
    suffix = _suffix(file.with_suffix("") if _suffix(file) in COMPRESSED else file)
    return suffix in (*PARQUET, *JSON_LINES, *TABLES) or _suffix(file) in UNREAD


def _suffix(file: Path) -> str:
    """ ".csv" of "x.CSV"."""
    return file.suffix.lower()


def _check_complete(path: Path, shards: Sequence[Path]) -> None:
    """Refuses a set of shards of which one is not there: "train-00000-of-00002" without "train-00001-of-00002"."""
    parts = [match.groups() for shard in shards if (match := _OF_SO_MANY.fullmatch(shard.name))]
    for stem, count, end in {(stem, count, end) for stem, _, count, end in parts}:
        numbers = {int(number) for s, number, c, e in parts if (s, c) == (stem, count)}
        missing = sorted(set(range(int(count))) - numbers)
        if missing and int(count) not in numbers:  # some count from 1
            name = f"{stem}{missing[0]:0{len(count)}d}-of-{count}{end}"
            raise DataError(f"{path}: {len(missing)} of {int(count)} shards are missing, the first: {name}")


def _open_file(path: Path) -> Rows:
    suffix = _suffix(path)
    if suffix in UNREAD:
        raise DataError(f"{path} {UNREAD[suffix]}")
    with path.open("rb") as file:
        head = file.read(64)
    if words := what_instead(head):
        raise DataError(f"{path} {words}")
    if suffix in PARQUET or head.startswith(b"PAR1"):
        return ParquetRows(path)
    if suffix not in COMPRESSED:
        for begin, advice in BEGINNINGS.items():
            if head.startswith(begin):
                raise DataError(f"{path} {advice}")
        return _open_text(path, suffix, path)
    inner = _suffix(path.with_suffix(""))
    if inner in (*PARQUET, *UNREAD):
        raise DataError(f"{path}: compressed once more outside: unpack it")
    copy = plain_copy(path, inner or ".jsonl", lambda target: _unpack(path, target))
    return _open_text(copy, inner, path)


def _open_text(path: Path, suffix: str, source: Path) -> Rows:
    if suffix in TABLES:
        return csv_rows(path, TABLES[suffix], source)
    if suffix == ".json" and _first_character(path) == b"[":
        return json_array(path, source)
    return json_lines(path, source)


def _first_character(path: Path) -> bytes:
    with path.open("rb") as file:
        return file.read(4096).removeprefix(b"\xef\xbb\xbf").lstrip()[:1]


def _unpack(path: Path, target: Path) -> None:
    try:
        with COMPRESSED[_suffix(path)](path, "rb") as packed, target.open("wb") as plain:
            shutil.copyfileobj(packed, plain, 2**20)
    except (gzip.BadGzipFile, zlib.error, lzma.LZMAError, EOFError) as error:
        raise DataError(f"{path}: cannot be unpacked: {error}") from None
    except OSError as error:
        if error.errno is None:  # bz2's way to say that it is none of its files
            raise DataError(f"{path}: cannot be unpacked: {error}") from None
        raise


class Shards:
    """Several files as one, in order."""

    def __init__(self, paths: Sequence[Path]) -> None:
        self._names = [path.name for path in paths]
        self._parts = [_open_file(path) for path in paths]
        self._ends = np.cumsum([len(part) for part in self._parts], dtype=np.int64)

    def __len__(self) -> int:
        return int(self._ends[-1])

    def read(self, index: int) -> Row:
        """Rows by number over all files."""
        part = int(np.searchsorted(self._ends, index, side="right"))
        row = self._parts[part].read(index - self._first(part))
        return replace(row, file=self._names[part])

    def read_all(self) -> Iterator[Row]:
        """Every row, file by file."""
        for name, part in zip(self._names, self._parts, strict=True):
            for row in part.read_all():
                yield replace(row, file=name)

    def suspects(self) -> list[int]:
        """Rows that looked wrong."""
        return [self._first(i) + row for i, part in enumerate(self._parts) for row in part.suspects()]

    def digest(self) -> str:
        """Of all files."""
        return hashlib.sha256(" ".join(part.digest() for part in self._parts).encode()).hexdigest()

    def _first(self, part: int) -> int:
        return int(self._ends[part - 1]) if part else 0
