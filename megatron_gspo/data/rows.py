"""Rows of data files, with their places. A file is indexed, not held: a row is read when it is asked for."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Protocol

from megatron_gspo.untrusted import without_twins


@dataclass(frozen=True)
class Row:
    """One row of a file: its fields, or what was wrong with it."""

    unit: str
    """"line" where rows are lines of text, else "row"."""
    number: int
    """Counted from 1."""
    fields: dict[str, Any]
    problem: str = ""
    file: str = ""
    """The shard's name, where the data are a directory of them."""

    @property
    def place(self) -> str:
        """ "line 7", or "train-00001.jsonl, line 7"."""
        return f"{self.file}, {self.unit} {self.number}" if self.file else f"{self.unit} {self.number}"

    @property
    def default_id(self) -> str:
        """ "line-7", or "train-00001.jsonl:line-7": no two rows of the data have the same."""
        return f"{self.file}:{self.unit}-{self.number}" if self.file else f"{self.unit}-{self.number}"


class Rows(Protocol):
    """The rows of a file or of a directory of shards, by their index from 0."""

    def __len__(self) -> int: ...

    def read(self, index: int) -> Row:
        """One row. Raises DataError when the file itself cannot be read, or has changed since it was opened."""
        ...

    def read_all(self) -> Iterator[Row]:
        """Every row in order, a block at a time. Raises DataError as ``read`` does."""
        ...

    def suspects(self) -> list[int]:
        """Rows that look broken from their first and last byte alone: a line that was cut off, say. Ascending."""
        ...

    def digest(self) -> str:
        """SHA-256 of the files' bytes."""
        ...


def json_row(number: int, text: bytes, unit: str = "line") -> Row:
    """One JSON object. What is wrong with it becomes ``Row.problem``."""
    try:
        fields = json.loads(
            text.decode("utf-8-sig"),
            object_pairs_hook=without_twins,
            parse_int=integer,
            parse_float=_finite,
            parse_constant=_no_constant,
        )
        if b"\\u" in text:  # an escape may stand for half a character, which no file of the run could hold
            json.dumps(fields, ensure_ascii=False).encode()
    except UnicodeEncodeError as error:
        return Row(unit, number, {}, f"holds half a character (a lone surrogate): {error.object[error.start]!a}")
    except UnicodeDecodeError as error:
        return Row(unit, number, {}, f"not UTF-8 at byte {error.start + 1}")
    except json.JSONDecodeError as error:
        return Row(unit, number, {}, f"not JSON at character {error.pos + 1}: {error.msg}{_hint(text, unit)}")
    except ValueError as error:  # an integer of thousands of digits
        return Row(unit, number, {}, f"not JSON that can be read: {error}")
    except RecursionError:
        return Row(unit, number, {}, "not JSON that can be read: it is nested too deeply")
    if not isinstance(fields, dict):
        return Row(unit, number, {}, f"expected one JSON object a {unit}, got {type(fields).__name__}")
    return Row(unit, number, fields)


def _hint(text: bytes, unit: str) -> str:
    """What a line that is no JSON is, where it is what many files have."""
    line = text.strip()
    if unit != "line":
        return ""
    if b"\r" in line:
        return " (its lines end in a carriage return alone: end them in a line feed)"
    if line.startswith(b"["):
        return " (an array of rows: give the file a name that ends in .json)"
    if line == b"{":
        return " (an object over several lines: write each on one line, or all as one array in a .json file)"
    if line.startswith(b"{'"):
        return " (as Python prints it: write it with json.dumps)"
    return " (rows have no comma between them)" if line.endswith((b"},", b"}, ")) else ""


def _finite(digits: str) -> float:
    """A JSON number with a point or an exponent. Raises ValueError where a float has no room for it."""
    value = float(digits)
    if math.isinf(value):
        raise ValueError(f"{digits[:40]} is more than a float holds: write it as a text")
    return value


def integer(digits: str) -> int:
    """A JSON integer of as many digits as Python reads. Raises ValueError."""
    try:
        return int(digits)
    except ValueError:
        raise ValueError(f"an integer of {len(digits.lstrip('-'))} digits: write it as a text") from None


def _no_constant(word: str) -> None:
    raise ValueError(f"{word} is no JSON")
