"""Parquet files: a row is read out of its row group."""

from __future__ import annotations

import contextlib
from collections import OrderedDict
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from megatron_gspo.data.copies import plain_copy
from megatron_gspo.data.rows import Row
from megatron_gspo.data.text_rows import digest
from megatron_gspo.errors import DataError, DependencyError

if TYPE_CHECKING:
    import pyarrow as pa

SMALL_FILE_BYTES, SMALL_FILE_ROWS = 2**26, 30_000
"""A file up to both is read from where it is, whatever its row groups; its row groups then stay in memory."""
SMALL_GROUP_ROWS, SMALL_GROUP_BYTES = 2_000, 2**25
"""A row group up to both can be read for the sake of one row."""
COPIED_ROWS = 64
"""Rows of a copy that are read at a time."""
HELD_BYTES = 2**26
"""Of decoded row groups, the last one used aside."""


class ParquetRows:
    """Rows of a Parquet file.

    Parquet cannot be read from the middle of a row group, and one written by pandas has a million rows: such a file is
    copied once into an Arrow file of small batches (``copies.plain_copy``), and rows are read from the copy.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        with self._saying(0):
            self._file = _open(path)
            names = self._file.schema_arrow.names
            if len(set(names)) < len(names):
                raise DataError(f"{self._path}: a column stands twice: {', '.join(names)}")
            self._short = _short_floats(self._file.schema_arrow)
            meta = self._file.metadata
            groups = [meta.row_group(i) for i in range(meta.num_row_groups)]
        self._ends = np.cumsum([group.num_rows for group in groups], dtype=np.int64)
        sizes = [group.total_byte_size for group in groups]
        small_groups = all(
            group.num_rows <= SMALL_GROUP_ROWS and size <= SMALL_GROUP_BYTES
            for group, size in zip(groups, sizes, strict=True)
        )
        small_file = sum(sizes) <= SMALL_FILE_BYTES and len(self) <= SMALL_FILE_ROWS
        self._from_here = small_groups or small_file
        self._copy: Any = None
        self._held: OrderedDict[int, pa.Table] = OrderedDict()

    def __len__(self) -> int:
        return int(self._ends[-1]) if len(self._ends) else 0

    def read(self, index: int) -> Row:
        """Rows by number."""
        if not self._from_here:
            return self._read_copy(index)
        group = int(np.searchsorted(self._ends, index, side="right"))
        first = int(self._ends[group - 1]) if group else 0
        with self._saying(index):
            (fields,) = self._group(group).slice(index - first, 1).to_pylist(maps_as_pydicts="strict")
        return self._row(index + 1, fields)

    def read_all(self) -> Iterator[Row]:
        """Every row, in order."""
        number = 0
        batches = self._file.iter_batches(batch_size=1024)
        while True:
            with self._saying(number):
                batch = next(batches, None)
                if batch is None:
                    return
                rows = batch.to_pylist(maps_as_pydicts="strict")
            for fields in rows:
                number += 1
                yield self._row(number, fields)

    def suspects(self) -> list[int]:
        """Rows that looked wrong."""
        return []

    def digest(self) -> str:
        """Of the file."""
        return digest(self._path)

    def _group(self, group: int) -> pa.Table:
        """A row group, decoded; of those used before, as many as ``HELD_BYTES`` allow are held."""
        if group not in self._held:
            self._held[group] = self._file.read_row_group(group, use_threads=False)
            while len(self._held) > 1 and sum(table.nbytes for table in self._held.values()) > HELD_BYTES:
                self._held.popitem(last=False)
        self._held.move_to_end(group)
        return self._held[group]

    def _read_copy(self, index: int) -> Row:
        import pyarrow as pa

        if self._copy is None:
            self._copy = pa.ipc.open_file(pa.OSFile(str(plain_copy(self._path, ".arrow", self._write_copy))))
        with self._saying(index):
            batch = self._copy.get_batch(index // COPIED_ROWS)
            (fields,) = batch.slice(index % COPIED_ROWS, 1).to_pylist(maps_as_pydicts="strict")
        return self._row(index + 1, fields)

    def _write_copy(self, target: Path) -> None:
        """Batches of ``COPIED_ROWS`` rows, the last one shorter: row i is in batch i // COPIED_ROWS."""
        import pyarrow as pa

        schema, done = self._file.schema_arrow, 0
        batches = self._file.iter_batches(batch_size=16 * COPIED_ROWS)
        left = schema.empty_table()
        with pa.ipc.new_file(str(target), schema, options=pa.ipc.IpcWriteOptions(compression="lz4")) as writer:
            while True:
                with self._saying(done):
                    batch = next(batches, None)
                    if batch is None:
                        break
                    rows = pa.concat_tables([left, pa.Table.from_batches([batch])]).combine_chunks()
                done += batch.num_rows
                whole = rows.num_rows - rows.num_rows % COPIED_ROWS
                writer.write_table(rows.slice(0, whole), max_chunksize=COPIED_ROWS)
                left = rows.slice(whole)
            writer.write_table(left)

    def _row(self, number: int, fields: dict[str, Any]) -> Row:
        # Parquet gives every row every column: an absent field is a null there, and is not metadata.
        present = {key: value for key, value in fields.items() if value is not None}
        for name, kind in self._short.items():
            if name in present:
                present[name] = _shortest(present[name], kind)
        return Row("row", number, present)

    @contextlib.contextmanager
    def _saying(self, rows: int) -> Iterator[None]:
        """Turns what pyarrow raises into one line that says how far it was."""
        import pyarrow as pa

        try:
            yield
        except DataError:
            raise
        except (pa.ArrowException, OSError, ValueError, ArithmeticError) as error:  # text that is none, dates
            raise DataError(f"{self._path}: after row {rows}: {' '.join(str(error).split())}") from None


def _open(path: Path) -> Any:
    try:
        import pyarrow.parquet as pq
    except ImportError:
        raise DependencyError(f"{path}: reading Parquet needs the pyarrow package") from None
    return pq.ParquetFile(path, page_checksum_verification=True, buffer_size=2**20, pre_buffer=False)


def _short_floats(schema: pa.Schema) -> dict[str, pa.DataType]:
    """Columns with floats of 16 or 32 bits in them, at any depth: as a float of 64 their 0.1 is 0.10000000149011612."""
    return {column.name: column.type for column in schema if _has_short_floats(column.type)}


def _has_short_floats(kind: pa.DataType) -> bool:
    inside = (kind.field(i).type for i in range(kind.num_fields))
    return str(kind) in ("float", "halffloat") or any(map(_has_short_floats, inside))


def _shortest(value: Any, kind: pa.DataType) -> Any:
    """A value of this type, with each float of 32 bits as the shortest number that it stands for."""
    import pyarrow as pa

    if value is None or not _has_short_floats(kind):
        return value
    if pa.types.is_struct(kind):
        return {name: _shortest(item, kind.field(name).type) for name, item in value.items()}
    if pa.types.is_map(kind):
        return {key: _shortest(item, kind.item_type) for key, item in value.items()}
    if isinstance(value, list):
        return [_shortest(item, kind.value_type) for item in value]
    return float(str(np.float32(value)))
