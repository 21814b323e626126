"""Short hashes of files, so that another content under the same name is noticed."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from pathlib import Path

WHOLE = 8 * 1024**2
"""Bytes of a file up to which all of it is hashed."""
PIECES, PIECE = 64, 16 * 1024
"""Of a larger file, so many pieces of so many bytes, spread evenly: a terabyte of weights takes seconds. Training
changes every tensor."""


def files_digest(paths: Iterable[Path]) -> str:
    """A short hash of files' names, sizes and contents (of large ones, pieces); those that are missing are left out."""
    digest = hashlib.sha256()
    for path in paths:
        if path.is_file():
            size = path.stat().st_size
            digest.update(f"{path.name} {size}\n".encode())
            with path.open("rb") as file:
                for start, length in _spread(size):
                    file.seek(start)
                    digest.update(file.read(length))
    return digest.hexdigest()[:16]


def weights_digest(directory: Path) -> str:
    """Of a model's ``config.json`` and weights, in safetensors or a Megatron checkpoint."""
    weights = [*directory.glob("*.safetensors"), *directory.glob("*.distcp")]
    return files_digest([directory / "config.json", *sorted(weights)])


def _spread(size: int) -> list[tuple[int, int]]:
    if size <= WHOLE:
        return [(0, size)]
    return [(round(i * (size - PIECE) / (PIECES - 1)), PIECE) for i in range(PIECES)]
