"""A short hash of prompts (or examples) in their order: what was read, wherever the file lies."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from typing import Any


class Fingerprint:
    """Grows row by row."""

    def __init__(self) -> None:
        self._digest = hashlib.sha256()

    def add(self, row: tuple[Any, ...]) -> None:
        """Takes one row."""
        self._digest.update(repr(row).encode())

    def text(self) -> str:
        """16 hexadecimal digits."""
        return self._digest.hexdigest()[:16]


def fingerprint(rows: Iterable[tuple[Any, ...]]) -> str:
    """Of all rows."""
    growing = Fingerprint()
    for row in rows:
        growing.add(row)
    return growing.text()
