"""Damaged checkpoint folders. What is accepted is compared with what was written, byte by byte."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from megatron_gspo.errors import WeightError
from megatron_gspo.megatron import checkpoint_files as files
from tests.fuzz.mutations import (
    BYTE_MUTATIONS,
    HANG_S,
    MUTATIONS,
    as_json,
    assert_says,
    fuzz,
    mutated,
    mutated_bytes,
)
from tests.unit.test_checkpoint_files import check, make

pytestmark = pytest.mark.timeout(HANG_S)

NAMES = ("__0_0.distcp", "__1_0.distcp", files.METADATA, "common.pt", "metadata.json", files.HEADER)


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Checkpoints after 4 and 8 outer steps, with the files that a run of two ranks has."""
    root = tmp_path_factory.mktemp("checkpoints")
    for number in (4, 8):
        directory = make(root, number, outer_step=number, cursor={"epoch": 0, "position": number})
        for name, content in {"__1_0.distcp": bytes(1000), "common.pt": b"common", "metadata.json": b"{}"}.items():
            (directory / name).write_bytes(content)
        header = files.read_header(directory)
        entries = [files.describe(path) for path in directory.iterdir() if path.name != files.HEADER]
        unfinished = directory.with_name(directory.name + files.UNFINISHED)
        shutil.copytree(directory, unfinished)
        (unfinished / files.HEADER).unlink()
        files.publish(unfinished, directory, {name: header[name] for name in ("step", "model", "extra")}, entries)
    files.move_latest(root / "outer_00008")
    return root


@pytest.fixture
def checkpoint(root: Path, tmp_path: Path) -> Path:
    """A copy to be damaged, with a sound one beside it."""
    shutil.copytree(root, tmp_path / "checkpoints")
    return tmp_path / "checkpoints" / "outer_00008"


def content_of(directory: Path) -> dict[str, bytes]:
    return {name: (directory / name).read_bytes() for name in NAMES}


def judge(damaged: Path, sound: Path) -> None:
    """Refused with the checkpoint, the file and what else there is, or the same as it was written."""
    try:
        header = check(damaged)
    except WeightError as error:
        assert_says(error, f"{damaged}: ", "; also there: outer_00004 (")
        assert any(name in str(error) for name in (*NAMES, "no such checkpoint"))
        return
    ours, theirs = content_of(damaged), content_of(sound)
    assert header == files.read_header(sound)
    ours.pop(files.HEADER), theirs.pop(files.HEADER)  # JSON may be written in many ways; its content was compared
    assert ours == theirs


def again(damaged: Path, sound: Path) -> None:
    """Repairs what a round has damaged."""
    for path in damaged.parent.glob(f"{damaged.name}*"):
        shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink()
    shutil.copytree(sound, damaged)


@fuzz(250)
@given(st.sampled_from(NAMES), BYTE_MUTATIONS)
def test_bytes_that_change_are_noticed(checkpoint: Path, root: Path, name: str, mutations: list[Any]) -> None:
    path = checkpoint / name
    path.write_bytes(mutated_bytes(path.read_bytes(), mutations))
    judge(checkpoint, root / checkpoint.name)
    again(checkpoint, root / checkpoint.name)


@fuzz(200)
@given(MUTATIONS, st.booleans())
@example([("set", 1, 0, None)], True)
@example([("set", 0, 0, [])], True)
def test_a_header_is_what_was_written_or_refused(
    checkpoint: Path, root: Path, mutations: list[Any], signed: bool
) -> None:
    """``signed``: with the hash that its new content has, as a program that goes wrong would write it. Its numbers then
    are its own, and only the files are held against it."""
    path, sound = checkpoint / files.HEADER, root / checkpoint.name
    header = json.loads(path.read_text())
    written = header.pop("sha256")
    changed = mutated(header, mutations)
    if isinstance(changed, dict):
        changed.setdefault("sha256", written)
    if signed and isinstance(changed, dict):
        try:
            changed.pop("sha256")
            changed["sha256"] = files._digest(changed)
        except (ValueError, TypeError):
            signed = False
    path.write_bytes(as_json(changed))
    if signed and isinstance(changed, dict):
        try:
            accepted = check(checkpoint)
            listed = {entry["name"] for entry in accepted["files"]}
            assert all(content_of(checkpoint)[name] == content_of(sound)[name] for name in listed)
        except WeightError as error:
            assert_says(error)
    else:
        judge(checkpoint, sound)
    again(checkpoint, sound)


@fuzz(150)
@given(
    st.sampled_from(
        ["delete", "swap", "empty", "directory", "dangling", "loop", "away", "outside", "stale", "extra", "unreadable"]
    ),
    st.sampled_from(NAMES),
    st.sampled_from(NAMES),
)
def test_files_that_are_gone_swapped_or_something_else_are_noticed(
    checkpoint: Path, root: Path, operation: str, name: str, other: str
) -> None:
    path, sound = checkpoint / name, root / checkpoint.name
    content = path.read_bytes()
    if operation == "swap":
        path.write_bytes((checkpoint / other).read_bytes())
        (checkpoint / other).write_bytes(content)
    elif operation == "stale":
        path.write_bytes((root / "outer_00004" / name).read_bytes())
    elif operation == "extra":
        (checkpoint / "__9_9.distcp").write_bytes(content)
    elif operation == "away":
        shutil.rmtree(checkpoint)
    elif operation == "empty":
        path.write_bytes(b"")
    else:
        path.unlink()
        if operation == "directory":
            path.mkdir()
        elif operation == "dangling":
            path.symlink_to("nowhere")
        elif operation == "loop":
            path.symlink_to(name)
        elif operation == "outside":  # a link to the very bytes is those bytes
            path.symlink_to(sound / name)
        elif operation == "unreadable":
            path.symlink_to("/proc/self/mem")
    judge(checkpoint, sound)
    again(checkpoint, sound)


@fuzz(100)
@given(st.one_of(st.binary(max_size=30), BYTE_MUTATIONS.map(lambda m: mutated_bytes(b"outer_00008\n", m))))
def test_latest_names_a_checkpoint_or_is_refused(root: Path, checkpoint: Path, content: bytes) -> None:
    latest = checkpoint.parent / files.LATEST
    latest.write_bytes(content)
    try:
        named = files.latest_in(checkpoint.parent)
    except WeightError as error:
        assert_says(error, latest)
        return
    assert named is not None and named.parent == checkpoint.parent and named.name == content.decode().strip()
    if named.name not in ("outer_00004", "outer_00008"):
        with pytest.raises(WeightError, match="no such checkpoint; also there: outer_00004, outer_00008"):
            files.read_header(named)
