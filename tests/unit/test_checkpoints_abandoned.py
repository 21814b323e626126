"""A run that fails with a checkpoint and an export on their way to disk."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from megatron_gspo.runs.checkpoints import Checkpoints
from megatron_gspo.runs.save import Exports


class OnItsWay:
    """A directory that is being written, and has not got its name."""

    def __init__(self, path: Path) -> None:
        self.path = path
        path.mkdir(parents=True)

    def discard(self) -> None:
        self.path.rmdir()


def on_their_way(root: Path) -> tuple[Checkpoints, list[Path]]:
    checkpoints: Any = Checkpoints.__new__(Checkpoints)
    exports: Any = Exports.__new__(Exports)
    paths = [root / "checkpoints" / "outer_00002.unfinished", root / "exports" / "outer_00002.unfinished"]
    checkpoints._pending, exports._pending = map(OnItsWay, paths)
    checkpoints._exports = exports
    checkpoints._wait_for_hook = lambda error: None
    return checkpoints, paths


def test_both_are_removed_when_the_run_fails_and_stay_when_it_does_not(tmp_path: Path) -> None:
    failing, gone = on_their_way(tmp_path / "failed")
    with pytest.raises(OSError, match="full"), failing:
        raise OSError("full")
    sound, there = on_their_way(tmp_path / "sound")
    with sound:
        pass
    assert not any(path.exists() for path in gone) and all(path.exists() for path in there)


def test_a_run_that_fails_with_nothing_on_its_way_says_what_failed(tmp_path: Path) -> None:
    checkpoints, _ = on_their_way(tmp_path)
    checkpoints._pending = checkpoints._exports._pending = None
    with pytest.raises(OSError, match="full"), checkpoints:
        raise OSError("full")
