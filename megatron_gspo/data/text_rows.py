"""Files of text: JSON lines, JSON arrays, CSV and TSV. What is held is where each row begins and ends."""

from __future__ import annotations

import csv
import hashlib
import io
import json
import os
import re
from array import array
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from megatron_gspo.data.messages import holds_messages
from megatron_gspo.data.rows import Row, integer, json_row
from megatron_gspo.errors import DataError

BLOCK = 2**23
"""Bytes read at a time."""
LONGEST_ROW = 2**26
"""Bytes of a row: a file without line ends is not read into memory."""
LONGEST_ELEMENT = 2**26
"""Characters of a JSON array's element; past them it is taken for one that never ends."""
LONGEST_CELL = 2**26
"""Characters of a CSV file's cell."""
_SPACE = re.compile(r"[ \t\r\n]*")


@dataclass(frozen=True)
class Index:
    """Where rows lie in a file."""

    starts: np.ndarray
    """[N] int64, bytes from the file's beginning."""
    ends: np.ndarray
    """[N] int64."""
    numbers: np.ndarray | None = None
    """[N] int64: each row's line, counted from 1; None when row i is number i + 1."""
    suspects: np.ndarray | None = None
    """Rows that look broken, ascending."""


class TextRows:
    """Rows of a text file, by byte offsets."""

    def __init__(self, path: Path, index: Index, parse: Callable[[int, bytes], Row], source: Path | None = None):
        """``source``: the file that ``path`` is a copy of; messages and ``digest`` are about it."""
        self._source = source or path
        self._index, self._parse = index, parse
        self._file = path.open("rb")
        self._state = _state(self._file.fileno())

    def __len__(self) -> int:
        return len(self._index.starts)

    def read(self, index: int) -> Row:
        """Rows by number."""
        start, end = int(self._index.starts[index]), int(self._index.ends[index])
        numbers = self._index.numbers
        number = index + 1 if numbers is None else int(numbers[index])
        if end - start > LONGEST_ROW:
            return Row("line", number, {}, f"has {end - start} bytes, a row has at most {LONGEST_ROW}")
        text = os.pread(self._file.fileno(), end - start, start)
        if len(text) < end - start or _state(self._file.fileno()) != self._state:
            raise DataError(f"{self._source} was changed while it was being read: start again")
        return self._parse(number, text)

    def read_all(self) -> Iterator[Row]:
        """Every row, in order."""
        return map(self.read, range(len(self)))

    def suspects(self) -> list[int]:
        """Rows that looked wrong."""
        return [] if self._index.suspects is None else self._index.suspects.tolist()

    def digest(self) -> str:
        """Of the file."""
        return digest(self._source)


def digest(path: Path) -> str:
    """SHA-256 of a file, in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def json_lines(path: Path, source: Path | None = None) -> TextRows:
    """One object a line; blank lines are counted and left out."""
    with path.open("rb") as file:
        index = _index_lines(file)
    return TextRows(path, index, json_row, source)


def json_array(path: Path, source: Path | None = None) -> TextRows:
    """One array of objects. Raises DataError where it is no JSON: nothing behind that place could be found."""
    with path.open("rb") as file:
        index = _index_array(file, source or path)
    return TextRows(path, index, lambda number, text: json_row(number, text, "row"), source)


def csv_rows(path: Path, delimiter: str, source: Path | None = None) -> TextRows:
    """A header and rows of as many cells, quoted as RFC 4180 has it; an empty cell is an absent field."""
    shown = source or path
    with path.open("rb") as file:
        header, index = _index_csv(file, delimiter, shown)
    twice = [name for name in header if header.count(name) > 1]
    if twice or not any(header):
        raise DataError(f"{shown}: the header has {f'{twice[0]!r} twice' if twice else 'no names'}: {header!r:.200}")
    return TextRows(path, index, lambda number, text: _csv_row(header, delimiter, number, text), source)


def _state(descriptor: int) -> tuple[int, int]:
    found = os.fstat(descriptor)
    return found.st_size, found.st_mtime_ns


def _index_lines(file: io.BufferedReader) -> Index:
    """Byte offsets of lines; each line that does not go from { to } is looked at."""
    starts, ends, odd = [], [], []
    begin, first, last, base = 0, None, 0, 0  # of the line that the block before left open
    while block := file.read(BLOCK):
        at = np.frombuffer(block, np.uint8)
        breaks = np.flatnonzero(at == ord("\n"))
        if first is None:
            first = int(at[0])
        if len(breaks):
            lines_start = np.concatenate([[begin], breaks[:-1] + 1 + base])
            firsts = np.concatenate([[first], at[breaks[:-1] + 1]])
            lasts = np.where(breaks > 0, at[np.maximum(breaks - 1, 0)], last)
            starts.append(lines_start)
            ends.append(breaks + base)
            odd.append((firsts != ord("{")) | ((lasts != ord("}")) & (lasts != ord("\r"))))
            begin = base + int(breaks[-1]) + 1
            first = int(at[breaks[-1] + 1]) if breaks[-1] + 1 < len(at) else None
        base, last = base + len(block), int(at[-1])
    if base > begin:  # the last line has no end
        starts.append(np.asarray([begin]))
        ends.append(np.asarray([base]))
        odd.append(np.asarray([first != ord("{") or last != ord("}")]))
    if not starts:
        return Index(np.zeros(0, np.int64), np.zeros(0, np.int64))
    return _without_blanks(file, np.concatenate(starts), np.concatenate(ends), np.flatnonzero(np.concatenate(odd)))


def _without_blanks(file: io.BufferedReader, starts: np.ndarray, ends: np.ndarray, odd: np.ndarray) -> Index:
    keep = starts < ends
    odd = odd[keep[odd]]
    for line in odd.tolist():
        file.seek(int(starts[line]))
        keep[line] = bool(file.read(min(int(ends[line] - starts[line]), LONGEST_ROW)).strip())
    suspects = (np.cumsum(keep) - 1)[odd[keep[odd]]]
    numbers = None if keep.all() else np.flatnonzero(keep) + 1
    return Index(starts[keep], ends[keep], numbers, suspects)


def _index_array(file: io.BufferedReader, shown: Path) -> Index:
    """Byte offsets of an array's elements, decoded one after another out of a window of text."""
    starts, ends = array("q"), array("q")
    window = _Window(file)
    try:
        window.take("[")
        more = window.peek() != "]" or window.take("]") != "]"
        while more:
            begin, end = window.element()
            starts.append(begin)
            ends.append(end)
            more = window.take(",]") == ","
        if window.peek():
            raise ValueError("text follows the array's end")
    except (ValueError, RecursionError) as error:
        problem = "it is nested too deeply" if isinstance(error, RecursionError) else error
        raise DataError(f"{shown}: after row {len(starts)}: not JSON that can be read: {problem}") from None
    return Index(np.frombuffer(starts, np.int64), np.frombuffer(ends, np.int64))


class _Window:
    """The part of a JSON text that is looked at, and where it lies in the file."""

    def __init__(self, file: io.BufferedReader) -> None:
        self._bytes = 3 if file.peek(3)[:3] == b"\xef\xbb\xbf" else 0  # before ``self._at``, in the file
        self._text = io.TextIOWrapper(file, encoding="utf-8-sig", newline="")
        self._decode = json.JSONDecoder(parse_int=integer).raw_decode
        self._window, self._at = "", 0

    def peek(self) -> str:
        """The next character that is no white space; "" at the end."""
        while True:
            passed = _SPACE.match(self._window, self._at).end()  # type: ignore[union-attr]  # it matches nothing too
            self._bytes, self._at = self._bytes + passed - self._at, passed
            if self._at < len(self._window):
                return self._window[self._at]
            self._window, self._at = self._text.read(BLOCK), 0
            if not self._window:
                return ""

    def take(self, expected: str) -> str:
        """The next character, which must be one of these."""
        found = self.peek()
        if not found:
            raise ValueError("the file ends within its array: was it cut off?")
        if found not in expected:
            raise ValueError(f"expected {' or '.join(expected)}, got {self._window[self._at : self._at + 20]!r}")
        self._bytes, self._at = self._bytes + 1, self._at + 1
        return found

    def element(self) -> tuple[int, int]:
        """Passes one value: its first byte, and the one behind it."""
        if not self.peek():
            raise ValueError("the file ends within its array: was it cut off?")
        while True:
            try:
                _, end = self._decode(self._window, self._at)
                break
            except json.JSONDecodeError as error:
                more = self._text.read(BLOCK) if len(self._window) - self._at < LONGEST_ELEMENT else ""
                if not more:
                    raise ValueError(f"{error.msg} in an element") from None
                self._window, self._at = self._window[self._at :] + more, 0
        begin = self._bytes
        self._bytes += len(self._window[self._at : end].encode())
        self._at = end
        return begin, self._bytes


def _index_csv(file: io.BufferedReader, delimiter: str, shown: Path) -> tuple[list[str], Index]:
    """The header, and byte offsets of the rows under it; a quoted cell may go over several lines."""
    starts, ends, numbers = array("q"), array("q"), array("q")
    at, line = 0, 0

    def lines() -> Iterator[str]:
        nonlocal at, line
        for raw in file:
            at, line = at + len(raw), line + 1
            yield raw.decode("utf-8-sig" if line == 1 else "utf-8")

    _allow_long_cells()
    reader = csv.reader(lines(), delimiter=delimiter, strict=True)
    try:
        header = [name.strip() for name in next(reader, [])]
        while True:
            begin, number = at, line + 1
            cells = next(reader, None)
            if cells is None:
                break
            if cells:
                starts.append(begin)
                ends.append(at)
                numbers.append(number)
    except (csv.Error, UnicodeDecodeError) as error:
        raise DataError(f"{shown}: at line {line}: not CSV: {error}") from None
    return header, Index(
        np.frombuffer(starts, np.int64), np.frombuffer(ends, np.int64), np.frombuffer(numbers, np.int64)
    )


def _csv_row(header: list[str], delimiter: str, number: int, text: bytes) -> Row:
    _allow_long_cells()
    (cells,) = csv.reader(io.StringIO(text.decode(), newline=""), delimiter=delimiter, strict=True)
    if len(cells) != len(header):
        return Row("line", number, {}, f"has {len(cells)} cells, the header has {len(header)}")
    fields = {name: cell for name, cell in zip(header, cells, strict=True) if name and cell}
    for name, cell in fields.items():
        if holds_messages(cell):
            return Row("line", number, {}, f"the cell {name!r} holds chat messages as text: use JSON lines or Parquet")
    return Row("line", number, fields)


def _allow_long_cells() -> None:
    if csv.field_size_limit() < LONGEST_CELL:
        csv.field_size_limit(LONGEST_CELL)
