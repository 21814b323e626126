"""Starting a run's ranks again after a failure: how often, and from where."""

from __future__ import annotations

from pathlib import Path

from megatron_gspo.errors import WeightError
from megatron_gspo.megatron.checkpoint_files import latest_in

CONTINUE = ("train.resume=true", "train.overwrite=false")
"""Settings of a start that goes on from what the one before has left."""


class Restarts:
    """How often the ranks of a run are started again, and with which settings.

    ``most`` starts in a row, as long as none of them leaves a new checkpoint: a run that gets on is started again as
    often as it takes, which ends because its outer steps do, and one that always fails at the same place is given up.

    A start continues only what this run has written. A directory of another run, which ``train.overwrite`` allows to
    replace or which is refused, is left to the settings that the user gave.
    """

    def __init__(self, run_dir: Path, most: int, *, resumes: bool) -> None:
        self._run_dir, self._most, self._resumes = run_dir, most, resumes
        self._found = _identity(run_dir)
        self._count = 0
        self._newest = self._latest() if resumes else None

    def after(self, why: str) -> tuple[str, tuple[str, ...]] | None:
        """A line that says so, and the settings of the next start, after one that failed; None to give up."""
        newest = self._latest() if self._continues() else None
        if newest not in (None, self._newest):
            self._count, self._newest = 0, newest
        if self._count == self._most:
            return None
        self._count += 1
        where = f"goes on from {newest}" if newest else "starts afresh, since there is no checkpoint yet"
        return f"restart {self._count} of {self._most}: {why}; {where}", CONTINUE if self._continues() else ()

    def given_up(self) -> str:
        """What to say then; nothing where no start was allowed."""
        if not self._most:
            return ""
        return f"train.max_restarts = {self._most}: that often started again without a new checkpoint, and given up"

    def _continues(self) -> bool:
        """Whether the directory is this run's own."""
        return self._resumes or _identity(self._run_dir) not in (None, self._found)

    def _latest(self) -> Path | None:
        try:
            return latest_in(self._run_dir / "checkpoints")
        except WeightError:
            return None


def _identity(run_dir: Path) -> tuple[int, int] | None:
    """Tells the configuration that a run has written from the one before it; None where there is none."""
    try:
        found = (run_dir / "config.toml").stat()
    except OSError:
        return None
    return found.st_ino, found.st_mtime_ns
