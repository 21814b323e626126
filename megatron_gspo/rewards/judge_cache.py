"""What judges said before: in memory, and in a run's directory."""

from __future__ import annotations

import contextlib
import json
import os
import re
from collections import OrderedDict
from pathlib import Path

from megatron_gspo.storage import writing

DIRECTORY = "judge"
MOST_FILES = 4096
MOST_BYTES = 256 * 2**20
"""Of a process's file: what comes later is not written."""
KEY = re.compile("[0-9a-f]{64}")


class JudgeCache:
    """Grades in [0, 1] by the hash of what was asked; the least recently used go first.

    With a run's directory, each process appends its own to ``judge/RANK.jsonl`` there, as soon as the directory is the
    run's, and reads those of all at the start. Lines that are torn, or no grades, are passed over.
    """

    def __init__(self, most: int, run_dir: str = "") -> None:
        self._most, self._known = most, OrderedDict[str, float]()
        self._run_dir = Path(run_dir) if run_dir else None
        self._unwritten: list[tuple[str, float]] = []
        if self._run_dir is not None:
            self._read(self._run_dir / DIRECTORY)

    def get(self, key: str) -> float | None:
        """What is known."""
        if key in self._known:
            self._known.move_to_end(key)
        return self._known.get(key)

    def put(self, key: str, grade: float) -> None:
        """Keeps it."""
        if not self._most:
            return
        self._known[key] = grade
        if len(self._known) > self._most:
            self._known.popitem(last=False)
        if self._run_dir is not None and len(self._unwritten) < self._most:
            self._unwritten.append((key, grade))

    def write(self) -> None:
        """Appends what is new, once there is a run. Raises WriteError."""
        if self._run_dir is None or not self._unwritten or not (self._run_dir / "config.toml").is_file():
            return
        path = self._run_dir / DIRECTORY / f"{int(os.environ.get('RANK', '0'))}.jsonl"
        with writing(path, "what the judge said"):
            path.parent.mkdir(exist_ok=True)
            if not path.exists() or path.stat().st_size < MOST_BYTES:
                lines = "".join(json.dumps([key, grade]) + "\n" for key, grade in self._unwritten)
                with path.open("a", encoding="utf-8") as file:
                    file.write(lines)
        self._unwritten.clear()

    def _read(self, directory: Path) -> None:
        for path in sorted(directory.glob("*.jsonl"))[:MOST_FILES]:
            with contextlib.suppress(OSError), path.open(encoding="utf-8", errors="replace") as file:
                for line in file:
                    with contextlib.suppress(ValueError, TypeError):
                        key, grade = json.loads(line)
                        if KEY.fullmatch(key) and isinstance(grade, float) and 0 <= grade <= 1:
                            self._known[key] = grade
                            if len(self._known) > self._most:
                                self._known.popitem(last=False)
