"""The files of checkpoints: which is the latest, which go, and what is said of one that is damaged."""

from __future__ import annotations

import json
import pickle
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.distributed.checkpoint.metadata import MetadataIndex
from torch.distributed.checkpoint.planner import WriteItemType

from megatron_gspo.errors import WeightError
from megatron_gspo.megatron import checkpoint_files as files


def make(root: Path, number: int, **extra: Any) -> Path:
    directory = root / files.name_of(number)
    unfinished = directory.with_name(directory.name + files.UNFINISHED)
    files.make_empty(unfinished)
    (unfinished / "__0_0.distcp").write_bytes(bytes(range(256)) * min(number, 100))
    (unfinished / files.METADATA).write_bytes(pickle.dumps({"step": number}))
    entries = [files.describe(path) for path in unfinished.iterdir()]
    files.publish(unfinished, directory, {"step": number, "model": {}, "extra": extra}, entries)
    return directory


def check(directory: Path) -> dict[str, Any]:
    header = files.read_header(directory)
    files.verify(directory, header["files"])
    files.read_metadata(directory)
    return header


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """Checkpoints after 4 and 8 outer steps."""
    for number in (4, 8):
        files.move_latest(make(tmp_path, number))
    return tmp_path


@pytest.mark.parametrize(
    ("keep_last", "keep_every", "kept"),
    [(1, 0, [12]), (2, 0, [10, 12]), (1, 4, [4, 8, 12]), (2, 6, [6, 10, 12]), (9, 0, [2, 4, 6, 8, 10, 12])],
)
def test_the_newest_and_every_kth_stay(tmp_path: Path, keep_last: int, keep_every: int, kept: list[int]) -> None:
    for number in range(2, 14, 2):
        newest = make(tmp_path, number)
    files.retire(newest, keep_last=keep_last, keep_every=keep_every)
    assert list(files.checkpoints_in(tmp_path)) == kept
    assert sorted(path.name for path in tmp_path.iterdir()) == [files.name_of(number) for number in kept]


def test_checkpoints_of_a_history_that_was_given_up_go_with_the_next_save(root: Path) -> None:
    """Somebody wrote outer_00004 into ``latest``, and the run saved after its outer step 6."""
    newest = make(root, 6)
    files.retire(newest, keep_last=2, keep_every=8)
    assert list(files.checkpoints_in(root)) == [4, 6]


def test_names_are_compared_as_numbers(tmp_path: Path) -> None:
    for number in (99_998, 99_999, 100_000):
        newest = make(tmp_path, number)
    files.retire(newest, keep_last=2, keep_every=0)
    assert list(files.checkpoints_in(tmp_path)) == [99_999, 100_000]


def test_latest_is_what_its_file_names_and_without_the_file_the_newest(root: Path) -> None:
    assert files.latest_in(root) == root / "outer_00008"
    files.move_latest(root / "outer_00004")
    assert (root / "latest").read_text() == "outer_00004\n"
    assert files.latest_in(root) == root / "outer_00004"
    (root / "latest").unlink()  # killed between the first checkpoint's name and ``latest``
    assert files.latest_in(root) == root / "outer_00008"
    assert files.latest_in(root / "nowhere") is None


@pytest.mark.parametrize("text", ["", "../../etc", "outer_00004.unfinished", "step 4", "\x00"])
def test_a_latest_that_names_no_checkpoint_is_refused_with_those_that_are_there(root: Path, text: str) -> None:
    (root / "latest").write_text(text)
    with pytest.raises(WeightError, match=r"names no checkpoint; also there: outer_00004, outer_00008 \(write a name"):
        files.latest_in(root)


def test_leftovers_of_a_kill_go_and_checkpoints_stay(root: Path) -> None:
    for name in ("outer_00012.unfinished", "outer_00008.replaced", "outer_00002.removed"):
        (root / name).mkdir()
        (root / name / "__0_0.distcp").touch()
    (root / "latest.unfinished").touch()
    files.clear_leftovers(root)
    assert sorted(path.name for path in root.iterdir()) == ["latest", "outer_00004", "outer_00008"]


def test_a_whole_checkpoint_is_accepted_and_replaced_as_a_whole(root: Path) -> None:
    assert check(root / "outer_00008")["step"] == 8
    make(root, 8, again=True)
    assert check(root / "outer_00008")["extra"] == {"again": True}


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[100] ^= 1
    path.write_bytes(content)


def edit_step(path: Path) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | {"step": 7}))


@pytest.mark.parametrize(
    ("name", "damage", "said"),
    [
        ("__0_0.distcp", Path.unlink, "__0_0.distcp: it is missing"),
        ("__0_0.distcp", lambda path: path.write_bytes(b"x" * 99), "it has 99 bytes and was written with 2048"),
        ("__0_0.distcp", flip, r"__0_0.distcp: it was altered: sha256 \w{12}..., not what was written"),
        (".metadata", Path.unlink, ".metadata: it is missing"),
        ("checkpoint.json", Path.unlink, "checkpoint.json: FileNotFoundError"),
        ("checkpoint.json", lambda path: path.write_text("{"), "checkpoint.json: JSONDecodeError"),
        ("checkpoint.json", lambda path: path.write_text("[]"), "checkpoint.json: "),
        ("checkpoint.json", edit_step, "checkpoint.json: it was altered"),
    ],
)
def test_damage_names_the_file_and_the_checkpoint_before_it(root: Path, name: str, damage: Any, said: str) -> None:
    damage(root / "outer_00008" / name)
    with pytest.raises(WeightError, match=rf"outer_00008: the checkpoint is damaged: .*{said}") as caught:
        check(root / "outer_00008")
    assert "; also there: outer_00004 (" in str(caught.value)
    assert check(root / "outer_00004")["step"] == 4


class Evil:
    def __reduce__(self) -> tuple[Any, tuple[str]]:
        return Path.touch, (Path("touched"),)


def test_metadata_that_would_run_code_is_refused_even_with_the_right_hash(root: Path, monkeypatch: Any) -> None:
    monkeypatch.chdir(root)
    directory = root / "outer_00008"
    metadata = directory / files.METADATA
    metadata.write_bytes(pickle.dumps(Evil()))
    with pytest.raises(WeightError, match=r"\.metadata: UnpicklingError: .* has no place in a description of tensors"):
        files.read_metadata(directory)
    assert not (root / "touched").exists()


def nested(depth: int) -> tuple[Any, ...]:
    """A tuple of two of one of two of ...: few bytes, and 2**depth values to whoever hashes or compares it."""
    value: tuple[Any, ...] = ("x",)
    for _ in range(depth):
        value = (value, value)
    return value


class Built:
    """Pickles as a call, or an object found by name, that is then given attributes."""

    def __init__(self, *reduced: Any) -> None:
        self.reduced = reduced

    def __reduce__(self) -> tuple[Any, ...]:
        return self.reduced


def index_at(offset: Any) -> MetadataIndex:
    index = MetadataIndex("a")
    object.__setattr__(index, "offset", offset)  # as a pickle does, past the constructor
    return index


def as_key(key: Any, *, single: bool = True) -> bytes:
    """The pickle of {key: None}. To make the dictionary here would take as long as to read it."""
    body = pickle.dumps(key, protocol=2)[2:-1]
    if single:
        return b"\x80\x02}" + body + b"Ns."
    return b"\x80\x02}(" + body + b"Nu."


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (Built(WriteItemType, (1,), {"_value_": 7, "name": "EVIL"}), "WriteItemType gets no attributes"),
        (as_key(nested(40)), "tuple is no key"),
        (as_key(nested(40), single=False), "tuple is no key"),
        (as_key(index_at(nested(40))), "nested deeper"),
        (Built(torch.Size, (nested(40),)), "nested deeper"),
        (Built(WriteItemType, (nested(40),)), "nested deeper"),
        ({1, 2}, "sets"),
        (frozenset({1}), "sets"),
    ],
)
def test_metadata_cannot_change_what_torch_shares_or_take_exponential_time(root: Path, content: Any, said: str) -> None:
    before = [(item.name, item.value) for item in WriteItemType]
    metadata = root / "outer_00008" / files.METADATA
    metadata.write_bytes(content if isinstance(content, bytes) else pickle.dumps(content))
    started = time.process_time()
    with pytest.raises(WeightError, match=rf"\.metadata: UnpicklingError: .*{said}"):
        files.read_metadata(root / "outer_00008")
    assert time.process_time() - started < 1
    assert [(item.name, item.value) for item in WriteItemType] == before


def test_metadata_above_the_bound_is_not_read(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(files, "MOST_METADATA_BYTES", 10)
    with pytest.raises(WeightError, match=r"\.metadata: ValueError: \d+ bytes: .* at most 10"):
        files.read_metadata(root / "outer_00008")
