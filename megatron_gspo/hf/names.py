"""What the files of a Hugging Face directory's weights are called."""

from __future__ import annotations

import re
from pathlib import Path

MODEL = "model"
"""What a model's files are called."""


def index_name(stem: str) -> str:
    """The index of several files."""
    return f"{stem}.safetensors.index.json"


def single_name(stem: str) -> str:
    """The one file that needs no index."""
    return f"{stem}.safetensors"


def shard_name(stem: str, number: int, count: int) -> str:
    """The file ``number`` (from 0) of ``count``, as transformers names it."""
    return single_name(stem) if count == 1 else f"{stem}-{number + 1:05d}-of-{count:05d}.safetensors"


INDEX, SINGLE = index_name(MODEL), single_name(MODEL)


def shards_in(directory: Path, stem: str) -> dict[int, dict[int, Path]]:
    """Files that say by their names which of how many they are: {count: {number from 1: file}}."""
    pattern = re.compile(rf"{re.escape(stem)}-(\d+)-of-(\d+)\.safetensors")
    found: dict[int, dict[int, Path]] = {}
    for path in sorted(directory.iterdir()) if directory.is_dir() else ():
        if match := pattern.fullmatch(path.name):
            found.setdefault(int(match[2]), {})[int(match[1])] = path
    return found


def holds_weights(directory: Path, stem: str = MODEL) -> bool:
    """Whether there are safetensors under the names that are read; they may be incomplete."""
    named = any((directory / name).is_file() for name in (index_name(stem), single_name(stem)))
    return named or bool(shards_in(directory, stem))
