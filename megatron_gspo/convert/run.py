"""A conversion from its source to its destination, by one process or by torchrun's ranks."""

from __future__ import annotations

import contextlib
import json
import shutil
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import torch
import torch.distributed as dist

from megatron_gspo.convert.jobs import Job, Moved, Shard, make_job
from megatron_gspo.convert.kinds import check_replaceable, kind_of
from megatron_gspo.convert.sources import MegatronSource, open_source
from megatron_gspo.convert.workplace import PARTIAL, Watch, Workplace
from megatron_gspo.errors import ConfigError, WriteError
from megatron_gspo.megatron.checkpoint import POLICY, plain
from megatron_gspo.megatron.checkpoint_files import REPLACED, sync, verify
from megatron_gspo.megatron.groups import Groups
from megatron_gspo.parallel.exchange import broadcast_object, gather_objects, together
from megatron_gspo.storage import claiming, writing

HASHERS = 2
"""Threads that bring written files to disk and hash them, and hash the source's, while others are written."""
EARLY = 64 * 1024**2
"""Bytes that are written before the disk is told of them."""
ROOM = 1.01
"""Of the disk, as a part of the tensors' bytes: headers and companions."""


@dataclass(frozen=True)
class Options:
    """How to convert."""

    max_shard_bytes: int = 4 * 1024**3
    overwrite: bool = False
    config: Path | None = None
    """Where ``config.json`` and the tokenizer are, when not in the source."""
    drop_unknown: bool = False
    model: str = POLICY
    """Which model of a run's checkpoint."""
    eight_bits: bool = False
    """Write a Hugging Face directory for an engine in eight bits."""


@dataclass(frozen=True)
class Show:
    """What the conversion tells whoever watches; called on every rank."""

    note: Callable[[str], None] = lambda line: None
    total: Callable[[int], None] = lambda size: None
    """Bytes of tensors that this rank will write."""
    moved: Moved = lambda size: None


@dataclass(frozen=True)
class Converted:
    """What was written."""

    source: str
    destination: str
    kind: str
    """Of the destination."""
    tensors: int
    """In Hugging Face names."""
    bytes: int
    files: int
    kept_files: int
    """Of them, finished before by a conversion that was cut short."""


def convert(source: Path, destination: Path, options: Options, groups: Groups, show: Show) -> Converted:
    """Writes the checkpoint at ``source`` as one of the other kind at ``destination``. Collective.

    What was at ``destination`` is there until the new one is whole. A conversion that is cut short leaves its finished
    files in ``destination`` + ".partial", from where the next one continues. Raises ConfigError, WeightError or, when
    the disk does not take it, WriteError on all ranks.
    """
    world = groups.world
    first = dist.get_rank() == 0
    together(lambda: _check_paths(source, destination, options), world)
    chosen: dict[str, Any] = {"model": options.model, "drop_unknown": options.drop_unknown}
    opened = together(lambda: open_source(source, options.config, groups, **chosen), world)
    job = together(lambda: make_job(opened, options.max_shard_bytes, eight_bits=options.eight_bits), world)
    watch = Watch(opened.files())
    place = Workplace(destination)
    plan = _plan(job, watch, options)
    found = together(lambda: _open(place, plan, job, options) if first else "", world)
    show.note(found)
    layers = opened.model.shape.carried_layers
    if layers and not opened.carried and not opened.model.valued:
        show.note(f"no tensors of the {layers} layer(s) behind the last were found: the result has none of them")
    try:
        done = together(lambda: _write_share(job, place, watch, show), world)
        entries = {name: entry for part in gather_objects(done.entries, world) for name, entry in part.items()}
        together(watch.check, world)
        for line in together(lambda: _publish(job, place, entries, options) if first else [], world):
            show.note(line)
    finally:
        place.unlock()
    return Converted(
        source=str(source),
        destination=str(destination),
        kind=broadcast_object(kind_of(destination) if first else None, 0, world),
        tensors=len(opened.names()) + len(opened.repeated),
        bytes=sum(shard.bytes for shard in job.shards),
        files=len(job.shards),
        kept_files=sum(gather_objects(done.kept, world)),
    )


@dataclass
class _Done:
    entries: dict[str, dict[str, Any]]
    kept: int


@torch.no_grad()
def _write_share(job: Job, place: Workplace, watch: Watch, show: Show) -> _Done:
    """This rank's shards: read, written, and in threads hashed; and its share of the source's hashes."""
    rank, ranks = dist.get_rank(), dist.get_world_size()
    mine = job.shards[rank::ranks]
    show.total(sum(shard.bytes for shard in mine))
    done = _Done({}, 0)
    waiting: dict[str, Future[dict[str, Any]]] = {}
    with EarlySync() as early, ThreadPoolExecutor(HASHERS, thread_name_prefix="hash") as pool:
        source = pool.submit(_verify_source, job, rank, ranks)
        for shard in mine:
            kept = place.finished(shard.name)
            if kept is not None:
                done.entries[shard.name] = kept
                done.kept += 1
                show.moved(shard.bytes)
                continue
            contents = _write(job, place, shard, watch, early.told_of(place.unfinished(shard.name), show.moved))
            waiting[shard.name] = pool.submit(place.finish, shard.name, contents)
        for name, future in waiting.items():
            with _writing(place):
                done.entries[name] = future.result()
        source.result()
    job.source.release()
    return done


class EarlySync:
    """Brings files to disk while they are written: else the disk has nothing to do until the first one is whole."""

    def __init__(self) -> None:
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="sync")
        self._last: Future[None] | None = None
        self._waiting = 0

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._pool.shutdown()  # waits for what is under way

    def told_of(self, path: Path, moved: Moved) -> Moved:
        """``moved``, and of every ``EARLY`` bytes that go to ``path`` the disk hears."""

        def told(size: int) -> None:
            moved(size)
            self._waiting += size
            if self._waiting >= EARLY and (self._last is None or self._last.done()):
                self._waiting = 0
                self._last = self._pool.submit(_sync_if_there, path)

        return told


def _sync_if_there(path: Path) -> None:
    with contextlib.suppress(OSError):  # it may be whole by now, under its name; what fails is said there
        sync(path)


def _write(job: Job, place: Workplace, shard: Shard, watch: Watch, moved: Moved) -> Any:
    watch.check()
    try:
        with _writing(place):
            return job.write(shard, place.unfinished(shard.name), moved)
    except Exception:
        place.discard(shard.name)  # a full disk needs the room
        raise


def _verify_source(job: Job, rank: int, ranks: int) -> None:
    """Holds a checkpoint's files against the hashes that were written with them. Hugging Face has none.

    Of a checkpoint of a run those that are read, of a converted one all: a file that is gone is read by nobody.
    """
    source = job.source
    if isinstance(source, MegatronSource) and source.header:
        read = {path.name for path in source.files()}
        whole = "converted_from" in source.header["extra"]
        listed = [entry for entry in source.header["files"] if whole or entry["name"] in read]
        verify(source.directory, listed[rank::ranks])


def _plan(job: Job, watch: Watch, options: Options) -> dict[str, Any]:
    """What must be the same for finished files to be of use."""
    plan = {
        "source": str(job.source.directory.resolve()),
        "home": str(job.source.model.home.resolve()),
        "model": plain(job.source.model.shape),
        "which": job.source.model.name,
        "files": watch.stamps(),
        "shards": [[shard.name, shard.bytes] for shard in job.shards],
        "drop_unknown": options.drop_unknown,
        "eight_bits": options.eight_bits,
    }
    return dict(json.loads(json.dumps(plan)))  # as it is read back


def _open(place: Workplace, plan: dict[str, Any], job: Job, options: Options) -> str:
    with claiming(str(place.destination), place.path):
        place.destination.parent.mkdir(parents=True, exist_ok=True)
        found = place.open(plan)
        check_replaceable(place.destination, overwrite=options.overwrite)  # which may have been brought back
        there = sum(path.stat().st_size for path in place.path.iterdir() if path.is_file())
        needed = int(sum(shard.bytes for shard in job.shards) * ROOM) - there
        free = shutil.disk_usage(place.path).free
    if needed > free:
        raise WriteError(
            f"{place.path}: the conversion needs {needed / 1e9:.2f} GB more, and the disk has {free / 1e9:.2f} GB "
            f"free: make room, or name another destination"
        )
    return found


def _publish(job: Job, place: Workplace, entries: dict[str, dict[str, Any]], options: Options) -> list[str]:
    with _writing(place):
        said = job.complete(place.path, {shard.name: entries[shard.name] for shard in job.shards})
        check_replaceable(place.destination, overwrite=options.overwrite)  # hours may have passed
        place.publish()
    return said


def _check_paths(source: Path, destination: Path, options: Options) -> None:
    kind_of(source)
    if destination.name in ("", ".."):
        raise ConfigError(f"{destination}: name the directory that is to be made")
    place, read = destination.resolve(), source.resolve()
    if place == read or read in place.parents:
        raise ConfigError(f"{destination} is {source} or lies in it: name another destination")
    for name in (place, *(place.with_name(place.name + suffix) for suffix in (PARTIAL, REPLACED))):
        if name == read or name in read.parents:
            raise ConfigError(f"{source} is {name} or lies in it, which a conversion to {destination} replaces")
    check_replaceable(destination, overwrite=options.overwrite)


def _writing(place: Workplace) -> contextlib.AbstractContextManager[None]:
    return writing(place.path, then="the same command continues: finished files stay there")
