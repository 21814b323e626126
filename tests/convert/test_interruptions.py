"""A conversion that is cut short: what was there is still there, and the next one goes on."""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import resource
import shutil
import signal
from pathlib import Path
from typing import Any
from unittest import mock

import pytest

from tests import oracle
from tests.convert.ranks import convert, convert_rank, tensors_of
from tests.pool import RankError, RankPool

pytestmark = pytest.mark.distributed

SMALL = 40_000


def die(*args: Any, **kwargs: Any) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def killed_at(target: str, call: int) -> Any:
    """Makes the ``call``-th call of a method the last thing that its process does."""
    import importlib

    module, _, attribute = target.rpartition(":")
    owner_name, _, method = attribute.rpartition(".")
    owner = getattr(importlib.import_module(module), owner_name) if owner_name else importlib.import_module(module)
    genuine = getattr(owner, method)
    calls = [0]

    def counted(*args: Any, **kwargs: Any) -> Any:
        calls[0] += 1
        return die() if calls[0] == call else genuine(*args, **kwargs)

    return mock.patch.object(owner, method, counted)


def killed_rank(source: Path, destination: Path, options: dict[str, Any], target: str, call: int) -> None:
    with killed_at(target, call):
        convert_rank(source, destination, options)


POINTS = {
    "in a file": ("megatron_gspo.megatron.checkpoint_stream:BlockWriter.tensor", 20),
    "before a file is noted": ("megatron_gspo.convert.workplace:Workplace.finish", 3),
    "before the description": ("megatron_gspo.convert.jobs:write_description", 1),
    "before the header": ("megatron_gspo.convert.jobs:write_header", 1),
    "between two renames": ("megatron_gspo.megatron.checkpoint_files:_move_in", 1),
}


KEPT = {"before the description": 5, "before the header": 5, "between two renames": 5}
"""Files that the next try does not write again; threads finish them while the next are written."""


@pytest.mark.parametrize("point", POINTS)
def test_a_kill_at_any_point_leaves_what_was_there(ranks: RankPool, tiny: Path, tmp_path: Path, point: str):
    """What was there is another conversion; the next try brings the new one, and nothing else is left."""
    other = oracle.make_tiny_qwen3_moe(tmp_path / "other", layers=1)
    destination = tmp_path / "megatron"
    convert(ranks, other, destination)
    before = {path.name: path.read_bytes() for path in destination.iterdir()}
    options = {"max_shard_bytes": SMALL, "overwrite": True}
    with pytest.raises(RankError, match="the process died"):
        ranks.run(1, killed_rank, tiny, destination, options, *POINTS[point])
    kept = destination if destination.exists() else tmp_path / "megatron.replaced"
    assert {path.name: path.read_bytes() for path in kept.iterdir()} == before
    done = convert(ranks, tiny, destination, **options)
    convert(ranks, destination, tmp_path / "back")
    assert tensors_of(tmp_path / "back") == tensors_of(tiny)
    assert done.kept_files == KEPT.get(point, done.kept_files)
    assert {path.name for path in tmp_path.iterdir()} == {"other", "megatron", "back"}


def test_a_finished_file_that_was_altered_is_written_again(ranks: RankPool, tiny: Path, tmp_path: Path):
    target = "megatron_gspo.convert.jobs:write_description"
    options = {"max_shard_bytes": SMALL}
    with pytest.raises(RankError):
        ranks.run(1, killed_rank, tiny, tmp_path / "m", options, target, 1)
    partial = tmp_path / "m.partial"
    files = sorted(partial.glob("*.distcp"))
    damage(files[1])
    done = convert(ranks, tiny, tmp_path / "m", **options)
    assert done.kept_files == len(files) - 1
    convert(ranks, tmp_path / "m", tmp_path / "back")
    assert tensors_of(tmp_path / "back") == tensors_of(tiny)


def test_finished_files_of_another_source_are_not_kept(ranks: RankPool, tiny: Path, tmp_path: Path):
    source = tmp_path / "source"
    shutil.copytree(tiny, source)
    options = {"max_shard_bytes": SMALL}
    with pytest.raises(RankError):
        ranks.run(1, killed_rank, source, tmp_path / "m", options, "megatron_gspo.convert.jobs:write_description", 1)
    oracle.make_tiny_qwen3_moe(source, layers=2, mlp_only_layers=[0], seed=1)
    assert convert(ranks, source, tmp_path / "m", **options).kept_files == 0
    convert(ranks, tmp_path / "m", tmp_path / "back")
    assert tensors_of(tmp_path / "back") == tensors_of(source)


def test_files_that_were_finished_by_another_configuration_are_not_kept(ranks: RankPool, tiny: Path, tmp_path: Path):
    """Of equal shapes: another size of heads, say, would cut query, key and value otherwise."""
    home = tmp_path / "home"
    home.mkdir()
    config = json.loads((tiny / "config.json").read_text())
    (home / "config.json").write_text(json.dumps(config | {"rms_norm_eps": 0.125}))
    options = {"max_shard_bytes": SMALL, "config": home}
    with pytest.raises(RankError, match="the process died"):
        ranks.run(1, killed_rank, tiny, tmp_path / "m", options, *POINTS["before the header"])
    (home / "config.json").write_text(json.dumps(config))
    assert convert(ranks, tiny, tmp_path / "m", **options).kept_files == 0


def test_two_converters_do_not_write_to_one_place(ranks: RankPool, tiny: Path, tmp_path: Path):
    partial = tmp_path / "m.partial"
    partial.mkdir()
    with locked(partial), pytest.raises(RankError, match=r"m.partial is being written by another converter"):
        convert(ranks, tiny, tmp_path / "m")
    convert(ranks, tiny, tmp_path / "m")


@contextlib.contextmanager
def locked(directory: Path) -> Any:
    descriptor = os.open(directory, os.O_RDONLY)
    fcntl.flock(descriptor, fcntl.LOCK_EX)
    yield
    os.close(descriptor)


def change_source_rank(source: Path, destination: Path, options: dict[str, Any]) -> None:
    """Somebody writes into the source once the first file of the result is finished."""
    from megatron_gspo.convert.workplace import Workplace

    genuine = Workplace.finish

    def finish(self: Workplace, name: str, contents: Any) -> Any:
        os.utime(source / "model.safetensors", ns=(1, 1))
        return genuine(self, name, contents)

    with mock.patch.object(Workplace, "finish", finish):
        convert_rank(source, destination, options)


@pytest.mark.parametrize("max_shard_bytes", [SMALL, 10**9], ids=["before the last file", "after it"])
def test_a_source_that_changes_is_noticed(ranks: RankPool, tiny: Path, tmp_path: Path, max_shard_bytes: int):
    source = tmp_path / "source"
    shutil.copytree(tiny, source)
    with pytest.raises(RankError, match=r"model\.safetensors changed while it was read"):
        ranks.run(1, change_source_rank, source, tmp_path / "m", {"max_shard_bytes": max_shard_bytes})
    assert not (tmp_path / "m").exists()


def little_room_rank(source: Path, destination: Path, options: dict[str, Any]) -> None:
    """A file may grow to 50 kB, after which writing fails as it does on a full disk."""
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, 50_000))
    convert_rank(source, destination, options)


@pytest.mark.parametrize("direction", ["to Megatron", "to Hugging Face"])
def test_a_disk_that_fills_up_leaves_what_was_there(ranks: RankPool, tiny: Path, tmp_path: Path, direction: str):
    source = tiny
    if direction == "to Hugging Face":
        source = tmp_path / "source"
        convert(ranks, tiny, source)
    convert(ranks, source, tmp_path / "m", max_shard_bytes=SMALL)
    before = sorted(path.name for path in (tmp_path / "m").iterdir())
    with pytest.raises(RankError, match=r"m.partial cannot be written: .*File too large"):
        ranks.run(1, little_room_rank, source, tmp_path / "m", {"max_shard_bytes": 10**9, "overwrite": True})
    assert sorted(path.name for path in (tmp_path / "m").iterdir()) == before


def full_disk_rank(source: Path, destination: Path, options: dict[str, Any]) -> None:
    usage = mock.Mock(free=1000)
    with mock.patch("shutil.disk_usage", return_value=usage):
        convert_rank(source, destination, options)


def test_a_disk_without_room_is_noticed_before_anything_is_written(ranks: RankPool, tiny: Path, tmp_path: Path):
    with pytest.raises(RankError, match=r"the conversion needs 0.00 GB more, and the disk has 0.00 GB free"):
        ranks.run(1, full_disk_rank, tiny, tmp_path / "m", {})
    assert not (tmp_path / "m").exists()


def damage(path: Path) -> None:
    with path.open("r+b") as file:
        file.seek(path.stat().st_size // 2)
        byte = file.read(1)[0]
        file.seek(-1, os.SEEK_CUR)
        file.write(bytes([byte ^ 1]))
