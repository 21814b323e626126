"""Rows of JSONL and Parquet files, with their places."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_gspo.errors import DataError, DependencyError

PARQUET_SUFFIXES = (".parquet", ".pq")


@dataclass(frozen=True)
class Row:
    """One row of a file: its fields, or what was wrong with it."""

    unit: str
    """"line" of a JSONL file, "row" of a Parquet file."""
    number: int
    """Counted from 1."""
    fields: dict[str, Any]
    problem: str = ""


def read_rows(path: Path) -> Iterator[Row]:
    """Rows in file order, a block at a time; Parquet by suffix, JSON lines otherwise. Raises DataError."""
    if not path.is_file():
        raise DataError(f"{path}: no such data file")
    yield from _parquet(path) if path.suffix in PARQUET_SUFFIXES else _jsonl(path)


def _jsonl(path: Path) -> Iterator[Row]:
    with path.open("rb") as lines:  # bytes: str lines would also break at U+2028, which JSON may hold unescaped
        for number, line in enumerate(lines, start=1):
            if line.strip():
                yield _json_row(number, line)


def _json_row(number: int, line: bytes) -> Row:
    try:
        fields = json.loads(line.decode("utf-8-sig"), object_pairs_hook=_object, parse_constant=_no_constant)
        if b"\\u" in line:  # an escape may stand for half a character, which no file of the run could hold
            json.dumps(fields, ensure_ascii=False).encode()
    except UnicodeEncodeError as error:
        return Row("line", number, {}, f"holds half a character (a lone surrogate): {error.object[error.start]!a}")
    except UnicodeDecodeError as error:
        return Row("line", number, {}, f"not UTF-8 at byte {error.start + 1}")
    except json.JSONDecodeError as error:
        return Row("line", number, {}, f"not JSON at character {error.pos + 1}: {error.msg}")
    except (ValueError, RecursionError) as error:  # an integer of thousands of digits, brackets without end
        return Row("line", number, {}, f"not JSON that can be read: {error}")
    if not isinstance(fields, dict):
        return Row("line", number, {}, f"expected one JSON object a line, got {type(fields).__name__}")
    return Row("line", number, fields)


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    fields = dict(pairs)
    if len(fields) < len(pairs):
        twice = next(name for name, count in Counter(name for name, _ in pairs).items() if count > 1)
        raise ValueError(f"the field {twice!r} stands twice")
    return fields


def _no_constant(word: str) -> None:
    raise ValueError(f"{word} is no JSON")


def _parquet(path: Path) -> Iterator[Row]:
    try:
        import pyarrow as pa
        import pyarrow.parquet as pq
    except ImportError:
        raise DependencyError(f"{path}: reading Parquet needs the pyarrow package") from None
    number = 0
    try:
        with pq.ParquetFile(path, page_checksum_verification=True) as file:
            names = file.schema_arrow.names
            if len(set(names)) < len(names):
                raise DataError(f"{path}: a column stands twice: {', '.join(names)}")
            for batch in file.iter_batches():
                for fields in batch.to_pylist():
                    number += 1
                    # Parquet gives every row every column: an absent field is a null there, and is not metadata.
                    yield Row("row", number, {key: value for key, value in fields.items() if value is not None})
    except DataError:
        raise
    except (pa.ArrowException, OSError, ValueError, ArithmeticError) as error:  # the latter: text that is none, dates
        raise DataError(f"{path}: after row {number}: {' '.join(str(error).split())}") from None
