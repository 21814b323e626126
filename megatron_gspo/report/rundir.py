"""The run directory: what a run leaves behind, and nothing else knows where it lies. Pure file work.

    config.toml                   the configuration as resolved
    manifest.json                 versions, layout, git commit, seeds, engine, start, end
    metrics.jsonl                 one StepReport a line (docs/metrics.md)
    rollouts/outer_00012.jsonl    responses to read, one a line
    checkpoints/  tensorboard/    written by others
    report.html                   written by ``report.html``
    .lock                         locked by the one process that writes, as long as it lives

Only the reporting rank writes. Readers take a run that is still going or crashed: a file that is missing is empty, and
a torn last line is ignored.
"""

from __future__ import annotations

import fcntl
import json
import os
import shutil
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO

from pydantic import ValidationError

from megatron_gspo.algorithm.base import Unread
from megatron_gspo.config import RunConfig, dump, parse, read
from megatron_gspo.errors import ConfigError, DataError
from megatron_gspo.report.metrics import INITIAL, PLACE, Record, clean, finite, strict
from megatron_gspo.storage import claiming, cut_torn_line, replace_text
from megatron_gspo.untrusted import open_regular, strange_entry

if TYPE_CHECKING:  # types imports torch, and reading a run needs none
    from megatron_gspo.types import RolloutRecord, StepReport

UNFINISHED = ".unfinished"


@dataclass(frozen=True)
class RunDirectory:
    """One run's files. ``create`` for a new run, ``open`` for one that exists."""

    path: Path

    @classmethod
    def create(cls, config: RunConfig) -> RunDirectory:
        """Makes ``train.run_dir`` with ``config.toml`` in it; it is there with both or not at all.

        Replaces a run under ``train.overwrite``, and under ``train.resume`` (where there was no checkpoint to continue
        from). Raises ConfigError if it exists otherwise, is being written, cannot be written, or if what would be
        replaced is not a run; WriteError when the disk is full.
        """
        path = Path(config.train.run_dir)
        if path.is_dir() and (config.train.overwrite or config.train.resume):
            _remove_run(path)
        elif path.exists() or path.is_symlink():
            raise ConfigError(
                f"train.run_dir = {path} exists: name another, or set train.resume = true to continue the run in it, "
                f"or train.overwrite = true to replace it"
            )
        unfinished = cls(path.with_name(path.name + UNFINISHED))
        with claiming(f"train.run_dir = {path}", path):
            shutil.rmtree(unfinished.path, ignore_errors=True)
            unfinished.checkpoints.mkdir(parents=True)
            unfinished.rollouts.mkdir()
            unfinished.config_file.write_text(dump(config), encoding="utf-8")
            unfinished.path.rename(path)
        return cls(path)

    @classmethod
    def open(cls, path: str | Path) -> RunDirectory:
        """A run that exists, finished or not. Raises DataError if ``path`` holds no run, or a pipe."""
        path = Path(path)
        if not path.is_dir():
            raise DataError(f"{path}: no such run directory")
        if problem := strange_entry(path):
            raise DataError(f"{path}: {problem}")
        if not _is_run(path):
            raise DataError(f"{path}: not a run directory (no config.toml, manifest.json or metrics.jsonl in it)")
        return cls(path)

    @property
    def config_file(self) -> Path:
        """The resolved configuration."""
        return self.path / "config.toml"

    @property
    def manifest_file(self) -> Path:
        """Versions, machine, starts."""
        return self.path / "manifest.json"

    @property
    def metrics_file(self) -> Path:
        """A line an optimizer step."""
        return self.path / "metrics.jsonl"

    @property
    def rollouts(self) -> Path:
        """Responses kept for reading."""
        return self.path / "rollouts"

    @property
    def checkpoints(self) -> Path:
        """Of the run, and ``latest``."""
        return self.path / "checkpoints"

    @property
    def tensorboard(self) -> Path:
        """TensorBoard events."""
        return self.path / "tensorboard"

    @property
    def report_file(self) -> Path:
        """The page."""
        return self.path / "report.html"

    @property
    def lock_file(self) -> Path:
        """Held while a run writes here."""
        return self.path / ".lock"

    def lock(self) -> TextIO:
        """Makes this process the one that writes, until it ends (however) or the result is closed.

        Raises ConfigError when another one is. A file system without locks takes any.
        """
        return lock(self.lock_file, f"train.run_dir = {self.path}")

    def is_locked(self) -> bool | None:
        """Whether a living process writes this run; None when that cannot be known."""
        try:
            with self.lock_file.open(encoding="utf-8") as file:
                fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except BlockingIOError:
            return True
        except OSError:
            return None
        return False

    def cut_back(self, config: RunConfig, outer_steps: int) -> None:
        """Leaves what a run had written after ``outer_steps`` outer steps, with ``config`` as its configuration.

        Raises ConfigError when the directory cannot be written, WriteError when the disk is full.
        """
        with claiming(f"train.run_dir = {self.path}", self.path):
            kept = [line for line in read_lines(self.metrics_file) if _is_step(line)]
            text = "".join(json.dumps(strict(line)) + "\n" for line in kept if line["outer_step"] < outer_steps)
            replace_text(self.metrics_file, text)
            for number, path in self.rollout_files().items():
                if number >= outer_steps:
                    path.unlink()
            replace_text(self.config_file, dump(config))

    def metrics_writer(self) -> MetricsWriter:
        """Opens ``metrics.jsonl`` for appending, after cutting off a torn last line."""
        return MetricsWriter(self.metrics_file)

    def write_manifest(self, manifest: Mapping[str, Any]) -> None:
        """Replaces ``manifest.json`` in one move, so that no reader sees half of it."""
        replace_text(self.manifest_file, json.dumps(manifest, indent=2) + "\n")

    def finish(self, status: str = "finished", error: str = "") -> None:
        """Adds how and when the run ended ("finished", "failed" or "stopped") to the manifest and its last start.

        ``error``: the line that says what failed.
        """
        end = {"status": status, "ended": datetime.now(UTC).isoformat(timespec="seconds")}
        end |= {"error": error} if error else {}
        manifest = {**self.manifest(), **end}
        if manifest.get("starts"):
            manifest["starts"] = [*manifest["starts"][:-1], {**manifest["starts"][-1], **end}]
        try:
            self.write_manifest(manifest)
        except OSError:  # a full disk, which is often why the run ended: it must not say that it goes on
            _overwrite(self.manifest_file, json.dumps(manifest, indent=2) + "\n")

    def write_rollouts(self, outer_step: int, records: Sequence[RolloutRecord]) -> Path:
        """Writes the responses of one outer step, replacing those of an earlier try at it."""
        path = self.rollouts / f"outer_{outer_step:05d}.jsonl"
        lines = [json.dumps(strict(record.as_record()), ensure_ascii=False) + "\n" for record in records]
        path.write_text("".join(lines), encoding="utf-8", errors="backslashreplace")  # a lone surrogate: JSON's escape
        return path

    def config(self) -> RunConfig | None:
        """The run's configuration; None when it is missing or this version cannot read it. No code that it names is
        run: an algorithm of the user's own is ``Unread``."""
        try:
            tree = read(self.config_file)
            return parse({**tree, "algorithm": Unread.in_place_of_own(tree.get("algorithm", {}))})
        except (ConfigError, ValidationError):
            return None

    def manifest(self) -> dict[str, Any]:
        """The manifest; empty when it is missing or torn."""
        try:
            manifest = json.loads(self.manifest_file.read_text(encoding="utf-8"))
        except (OSError, ValueError, RecursionError):
            return {}
        return manifest if isinstance(manifest, dict) else {}

    def metrics(self) -> list[Record]:
        """The lines of ``metrics.jsonl`` in order of step; of a step written twice (a resumed run) the later one."""
        lines = [_measured(line) for line in read_lines(self.metrics_file) if _is_step(line)]
        records = {tuple(line[name] for name in PLACE): line for line in lines}
        return [records[key] for key in sorted(records)]

    def rollout_files(self) -> dict[int, Path]:
        """Outer step -> file, in order."""
        files = {}
        for path in self.rollouts.glob("outer_*.jsonl"):
            number = path.stem.removeprefix("outer_")
            if number.isdecimal():
                files[int(number)] = path
        return dict(sorted(files.items()))


class MetricsWriter:
    """Appends to ``metrics.jsonl``; a line is on disk when ``write`` returns. A ``MetricSink``."""

    def __init__(self, path: Path) -> None:
        cut_torn_line(path)
        self._file: TextIO = path.open("a", encoding="utf-8")

    def write(self, report: StepReport) -> None:
        """Writes one line. Metrics that are NaN or infinite are left out: strict JSON has no word for them."""
        place = {"step": report.step, "outer_step": report.outer_step, "minibatch": report.minibatch}
        self._file.write(json.dumps(place | clean(report.metrics)) + "\n")
        self._file.flush()

    def close(self) -> None:
        """Closes the file."""
        self._file.close()


def lock(path: Path, name: str) -> TextIO:
    """Locks the file at ``path`` until this process ends (however) or the result is closed.

    Raises ConfigError, calling what is locked ``name``, when another process has it or the file cannot be made;
    WriteError when the disk is full. A file system without locks takes any.
    """
    with claiming(name, path):
        file = path.open("w", encoding="utf-8")
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        file.close()
        raise ConfigError(f"{name} is being written by another process") from None
    except OSError:
        pass
    return file


def initial_evaluation(metrics: Mapping[str, float]) -> StepReport:
    """The evaluation before any training, as a report: its step, outer step and mini-batch are -1.

    Later evaluations go on the last line of the outer step that they follow. So on every line ``eval/*`` belongs to
    the weights after that line's optimizer step.
    """
    from megatron_gspo.types import StepReport

    return StepReport(step=INITIAL, outer_step=INITIAL, minibatch=INITIAL, metrics=dict(metrics))


def read_lines(path: Path) -> Iterator[Record]:
    """The objects of a JSON-lines file; nothing if it is missing; lines that are not whole objects are skipped."""
    try:
        with open_regular(path) as file:
            text = file.read().decode("utf-8", errors="replace")
    except OSError:
        return
    for line in text.split("\n"):  # not splitlines: a response may hold U+2028, which JSON does not escape
        try:
            record = json.loads(line)
        except (ValueError, RecursionError):
            continue
        if isinstance(record, dict):
            yield record


def _is_step(line: Record) -> bool:
    return all(isinstance(line.get(name), int) and finite(line[name]) for name in PLACE)


def _measured(line: Record) -> Record:
    """The line without what is no finite number: somebody else's NaN, or text, is nothing to reckon with."""
    return {name: value for name, value in line.items() if finite(value)}


def _is_run(path: Path) -> bool:
    return any((path / name).is_file() for name in ("config.toml", "manifest.json", "metrics.jsonl"))


def _overwrite(path: Path, text: str) -> None:
    """Writes a file in its own place, where no second one can be made. Raises OSError before it changes anything."""
    content = text.encode()
    with path.open("r+b") as file:
        os.posix_fallocate(file.fileno(), 0, len(content))
        file.write(content)
        file.truncate()


def is_replaceable(path: Path) -> bool:
    """Whether a directory is empty or wholly a run's: nothing that a mistyped path would be missed in."""
    return not any(path.iterdir()) or ((path / "config.toml").is_file() and (path / "checkpoints").is_dir())


def _remove_run(path: Path) -> None:
    """Removes a run directory, but nothing that a mistyped path would be missed in, and no run that is going on."""
    if RunDirectory(path).is_locked():
        raise ConfigError(f"train.run_dir = {path} is being written by another process")
    if not is_replaceable(path):
        raise ConfigError(
            f"train.run_dir = {path} is not a run directory (no config.toml and checkpoints/ in it), "
            f"so nothing replaces it: remove it yourself or name another"
        )
    shutil.rmtree(path)
