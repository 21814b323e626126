"""Items of a file that are made when they are asked for."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from typing import Generic, TypeVar, overload

import numpy as np

from megatron_gspo.data.rows import Row, Rows
from megatron_gspo.errors import DataError

T = TypeVar("T")
HELD_ITEMS, HELD_TOKENS = 8192, 2**20
"""Items that are kept after they were made, those used last, as many as both allow."""


class Cache(Generic[T]):
    """The items used last, by their row."""

    def __init__(self, tokens_of: Callable[[T], int]) -> None:
        self._tokens_of, self._tokens = tokens_of, 0
        self._items: OrderedDict[int, T] = OrderedDict()

    def get(self, row: int) -> T | None:
        """What was put; None if it is gone."""
        if row in self._items:
            self._items.move_to_end(row)
        return self._items.get(row)

    def put(self, row: int, item: T) -> None:
        """Keeps it, and lets the oldest go."""
        self._items[row] = item
        self._tokens += self._tokens_of(item)
        while len(self._items) > HELD_ITEMS or (self._tokens > HELD_TOKENS and len(self._items) > 1):
            _, oldest = self._items.popitem(last=False)
            self._tokens -= self._tokens_of(oldest)


class LazyItems(Sequence[T], Generic[T]):
    """``make`` of each row that ``rows_N`` names, made when it is asked for.

    Asking for an item whose row is bad raises DataError with the file and the place.
    """

    def __init__(self, path: str, rows: Rows, rows_N: np.ndarray, make: Callable[[Row], T], cache: Cache[T]) -> None:
        """``rows_N``: [N] int64, indices into ``rows``."""
        self._path, self._rows, self._rows_N, self._make, self._cache = path, rows, rows_N, make, cache

    def __len__(self) -> int:
        return len(self._rows_N)

    @overload
    def __getitem__(self, index: int) -> T: ...
    @overload
    def __getitem__(self, index: slice) -> LazyItems[T]: ...
    def __getitem__(self, index: int | slice) -> T | LazyItems[T]:
        if isinstance(index, slice):
            return self._of(self._rows_N[index])
        return self._item(int(self._rows_N[index]))

    def __iter__(self) -> Iterator[T]:
        return (self._item(int(row)) for row in self._rows_N)

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Sequence) or isinstance(other, str):
            return NotImplemented
        return len(self) == len(other) and all(a == b for a, b in zip(self, other, strict=True))

    __hash__ = None  # type: ignore[assignment]  # as a list's

    def place(self, index: int) -> str:
        """Where an item stands: "path, line 7". Reads its row."""
        return f"{self._path}, {self._rows.read(int(self._rows_N[index])).place}"

    def without(self, indices: Sequence[int]) -> LazyItems[T]:
        """The others, in their order."""
        return self._of(np.delete(self._rows_N, list(indices)))

    def _of(self, rows_N: np.ndarray) -> LazyItems[T]:
        return LazyItems(self._path, self._rows, rows_N, self._make, self._cache)

    def _item(self, index: int) -> T:
        held = self._cache.get(index)
        if held is not None:
            return held
        row = self._rows.read(index)
        try:
            item = self._make(row)
        except DataError as error:
            raise DataError(f"{self._path}, {row.place}: {error}") from error
        self._cache.put(index, item)
        return item
