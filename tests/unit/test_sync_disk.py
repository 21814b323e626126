"""Files of ``sync.method = "disk"``: whose they are, who can read them, and what others leave in the same place."""

from __future__ import annotations

import fcntl
import json
import os
import shutil
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from megatron_gspo.config import SyncConfig
from megatron_gspo.errors import SyncError
from megatron_gspo.sync.base import BucketSync, make_weight_sync
from megatron_gspo.sync.disk import SETTLED_S, remove_abandoned
from megatron_gspo.sync.peers import Peers

pytestmark = pytest.mark.timeout(200)
TENSORS = {"a": torch.arange(6.0).reshape(2, 3), "b": torch.arange(4, dtype=torch.bfloat16)}
NOBODY = 65534


@pytest.fixture
def parent() -> Iterator[Path]:
    """A directory as /dev/shm is: everybody may write there, and only the owner of a thing may rename it."""
    with tempfile.TemporaryDirectory(dir="/dev/shm" if os.path.isdir("/dev/shm") else None) as path:
        os.chmod(path, 0o1777)
        yield Path(path)


@pytest.fixture
def make(parent: Path, tmp_path: Path) -> Iterator[Callable[..., BucketSync]]:
    """A sync whose servers look at the files when they are told to load them."""
    (tmp_path / "config.json").write_text('{"a": 1}')
    made: list[Any] = []

    class Servers:
        def __init__(self, look: Callable[[Path], None]) -> None:
            self.look, self.version = look, ""

        def update_from_disk(self, directory: str) -> None:
            self.look(Path(directory))

        def flush_when_idle(self) -> None: ...
        def check_version(self, version: str) -> None: ...

        def set_version(self, version: str) -> None:
            self.version = version

        def versions(self) -> list[str]:
            return [self.version]

    def make_one(look: Callable[[Path], None], *, shared: bool) -> BucketSync:
        config = SyncConfig(method="disk", directory=str(parent), bucket_mb=1, verify="off")
        urls, names = ["http://127.0.0.1:9"], list(TENSORS)
        sync: Any = make_weight_sync(config, urls, Peers(), model_path=tmp_path, expected_names=names, shared=shared)
        sync.servers = Servers(look)
        made.append(sync)
        return sync

    yield make_one
    for sync in made:
        sync.close()


def modes(place: Path) -> dict[str, str]:
    """Of what a server opens: the directory, the one above it, and the files."""
    found = {"above": place.parent, "weights": place} | {path.suffix: path for path in place.iterdir()}
    return {name: oct(path.stat().st_mode & 0o777) for name, path in found.items()}


def under_umask(umask: int, action: Callable[[], None]) -> None:
    before = os.umask(umask)
    try:
        action()
    finally:
        os.umask(before)


def test_servers_of_this_run_get_files_that_nobody_else_can_read(make: Callable[..., BucketSync]) -> None:
    seen: dict[str, Any] = {}

    def look(place: Path) -> None:
        seen.update(modes(place))
        index = json.loads((place / "model.safetensors.index.json").read_text())["weight_map"]
        for name, tensor in TENSORS.items():
            assert torch.equal(load_file(place / index[name])[name], tensor)

    sync = make(look, shared=False)
    under_umask(0o000, lambda: sync.push(iter(TENSORS.items()), 1))
    assert seen == {"above": "0o700", "weights": "0o700", ".json": "0o600", ".safetensors": "0o600"}


@pytest.mark.parametrize(
    ("umask", "directory", "file"), [(0o022, "0o755", "0o644"), (0o027, "0o750", "0o640"), (0o077, "0o700", "0o600")]
)
def test_servers_of_somebody_else_get_files_with_the_permissions_that_the_umask_leaves(
    make: Callable[..., BucketSync], umask: int, directory: str, file: str
) -> None:
    seen: dict[str, str] = {}
    sync = make(lambda place: seen.update(modes(place)), shared=True)
    under_umask(umask, lambda: sync.push(iter(TENSORS.items()), 1))
    assert seen == {"above": directory, "weights": directory, ".json": file, ".safetensors": file}


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can be another user for a moment")
@pytest.mark.parametrize("shared", [True, False])
def test_another_user_reads_the_files_where_servers_are_somebody_elses_and_only_there(
    make: Callable[..., BucketSync], parent: Path, shared: bool
) -> None:
    read: dict[str, int] = {}

    def look(place: Path) -> None:
        for path in [place, *place.iterdir()]:
            command = ["ls" if path.is_dir() else "cat", str(path)]
            done = subprocess.run(command, user=NOBODY, group=NOBODY, extra_groups=[], capture_output=True, check=False)
            same = path.is_dir() or done.stdout == path.read_bytes()
            read[path.name] = done.returncode or (0 if same else -1)

    sync = make(look, shared=shared)
    under_umask(0o022, lambda: sync.push(iter(TENSORS.items()), 1))
    assert len(read) == 4
    assert all(status == 0 for status in read.values()) if shared else all(status > 0 for status in read.values())


@pytest.mark.parametrize("left", [os.mkfifo, lambda path: path.symlink_to("/dev/zero"), Path.touch])
def test_what_others_left_under_our_prefix_is_not_opened_and_stays(
    make: Callable[..., BucketSync], parent: Path, left: Callable[[Path], None]
) -> None:
    theirs = parent / "megatron-gspo-theirs"
    left(theirs)
    os.utime(theirs, (0, 0), follow_symlinks=False)
    make(lambda place: None, shared=False).push(iter(TENSORS.items()), 1)
    assert os.path.lexists(theirs)


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can give a directory to somebody else")
def test_a_directory_of_another_user_stays_although_nobody_locks_it_also_where_root_could_remove_it(
    parent: Path,
) -> None:
    for name, owner in (("megatron-gspo-theirs", NOBODY), ("megatron-gspo-ours", os.geteuid())):
        (parent / name).mkdir()
        os.chown(parent / name, owner, owner)
        os.utime(parent / name, (0, 0))
    remove_abandoned(parent)
    assert [path.name for path in parent.iterdir()] == ["megatron-gspo-theirs"]


def test_a_link_to_a_directory_of_ours_is_not_followed(parent: Path, tmp_path: Path) -> None:
    (tmp_path / "precious").mkdir()
    os.utime(tmp_path / "precious", (0, 0))
    (parent / "megatron-gspo-x").symlink_to(tmp_path / "precious")
    remove_abandoned(parent)
    assert (tmp_path / "precious").is_dir()


def test_a_directory_in_which_every_user_may_replace_our_files_is_refused(
    make: Callable[..., BucketSync], parent: Path
) -> None:
    os.chmod(parent, 0o777)
    with pytest.raises(SyncError, match=r"every user may replace files in it \(mode 777\): .*chmod \+t"):
        make(lambda place: None, shared=False).push(iter(TENSORS.items()), 1)
    assert not list(parent.iterdir())


def test_a_version_replaces_the_one_before_and_closing_leaves_nothing(
    make: Callable[..., BucketSync], parent: Path
) -> None:
    places: list[Path] = []
    sync = make(places.append, shared=False)
    for version in (1, 2, 3):
        sync.push(iter(TENSORS.items()), version)
        assert [path.name for path in parent.iterdir()] == [places[-1].parent.name]
    assert len(set(places)) == 3
    sync.close()
    assert not list(parent.iterdir())


def test_directories_of_dead_processes_go_and_those_in_use_or_new_or_of_others_stay(tmp_path: Path) -> None:
    for name in ("megatron-gspo-dead", "megatron-gspo-used", "megatron-gspo-new", "somebody-else"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "weights").touch()
        if not name.endswith("new"):
            os.utime(tmp_path / name, (0, 0))
    used = os.open(tmp_path / "megatron-gspo-used", os.O_RDONLY)
    fcntl.flock(used, fcntl.LOCK_EX)
    remove_abandoned(tmp_path)
    os.close(used)
    assert SETTLED_S > 0
    assert {path.name for path in tmp_path.iterdir()} == {"megatron-gspo-used", "megatron-gspo-new", "somebody-else"}
    shutil.rmtree(tmp_path / "somebody-else")
