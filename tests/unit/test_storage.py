"""What the file system refuses: which failure it is, and what is said of it."""

from __future__ import annotations

import errno
import json
import os
import re
import resource
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from report_runs import make_config, make_report, make_rollout
from safetensors.torch import save_file

from megatron_gspo import cli
from megatron_gspo.config import SyncConfig
from megatron_gspo.errors import ConfigError, MegatronGspoError, SyncError, UserError, WriteError
from megatron_gspo.hf.checkpoint import HfReader
from megatron_gspo.report.evaluation_files import EvaluationDirectory
from megatron_gspo.report.html import write_page
from megatron_gspo.report.recorder import RunRecorder
from megatron_gspo.report.rundir import RunDirectory
from megatron_gspo.storage import claiming, free_space, refusal, writing
from megatron_gspo.sync.disk import DiskSync
from megatron_gspo.sync.peers import Peers
from megatron_gspo.types import Prompt, Rollout

ROOM = r"\(\d+\.\d [MG]B of \d+\.\d [MG]B free at .*\): make room, then "


@pytest.fixture
def small_files() -> Iterator[Callable[[int], None]]:
    """Within it, a file may grow to so many bytes: then writing fails as on a full disk, with another number."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    yield lambda size: resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    resource.setrlimit(resource.RLIMIT_FSIZE, before)


def refuse(number: int) -> Any:
    raise OSError(number, os.strerror(number))


def test_a_write_that_fails_is_a_failed_run_with_the_place_the_room_and_what_to_do(tmp_path: Path) -> None:
    with pytest.raises(WriteError) as caught, writing(tmp_path / "a" / "b", "the thing", "do it again"):
        refuse(errno.ENOSPC)
    assert re.fullmatch(
        rf"{tmp_path}/a/b: the thing cannot be written: \[Errno 28\] No space left on device {ROOM}do it again",
        str(caught.value),
    )
    assert f"free at {tmp_path})" in str(caught.value), "the nearest directory that is there"
    assert not isinstance(caught.value, UserError)
    with pytest.raises(WriteError, match=r"Permission denied.*: mend that, then start it again"), writing(tmp_path):
        refuse(errno.EACCES)


@pytest.mark.parametrize(
    ("number", "kind"),
    [
        *((number, WriteError) for number in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO)),
        *((number, ConfigError) for number in (errno.EACCES, errno.ENOTDIR, errno.EROFS, errno.ENAMETOOLONG)),
    ],
)
def test_a_place_that_cannot_be_had_is_a_mistake_and_a_full_disk_is_not(
    tmp_path: Path, number: int, kind: type[MegatronGspoError]
) -> None:
    with (
        pytest.raises(kind, match=r"^--out x cannot be written: ") as caught,
        claiming("--out x", tmp_path),
    ):
        refuse(number)
    assert type(caught.value) is kind


SAVES: dict[str, Callable[[torch.Tensor, Path], object]] = {
    "safetensors": lambda tensor, path: save_file({"a": tensor}, path),
    "torch": torch.save,
    "torch, into a file": lambda tensor, path: torch.save(tensor, path.open("wb")),
}


@pytest.mark.parametrize("save", SAVES.values(), ids=list(SAVES))
def test_the_cause_is_found_in_what_libraries_raise(
    save: Callable[[torch.Tensor, Path], object], tmp_path: Path, small_files: Callable[[int], None]
) -> None:
    small_files(10_000)
    with pytest.raises(WriteError, match=r"cannot be written: .*make room"), writing(tmp_path):
        save(torch.zeros(100_000), tmp_path / "a")


@pytest.mark.parametrize("error", [ValueError("x"), ConnectionResetError("x"), TimeoutError("x"), RuntimeError("CUDA")])
def test_what_has_nothing_to_do_with_files_passes_as_it_is(error: Exception, tmp_path: Path) -> None:
    assert refusal(error) is None
    with pytest.raises(type(error), match=str(error)) as caught, writing(tmp_path):
        raise error
    assert caught.value is error


def test_an_error_of_ours_passes_as_it_is(tmp_path: Path) -> None:
    for manager in (writing(tmp_path), claiming("x", tmp_path)):
        with pytest.raises(ConfigError, match=r"^mine$"), manager:
            raise ConfigError("mine")


def test_the_room_of_a_place_that_is_gone_is_that_of_what_is_left(tmp_path: Path) -> None:
    assert free_space(tmp_path / "x" / "y").endswith(f" free at {tmp_path}")


@pytest.mark.parametrize(
    ("number", "status"),
    [
        *((number, 1) for number in (errno.ENOSPC, errno.EDQUOT, errno.EIO, errno.ECONNRESET)),
        *((number, 2) for number in (errno.ENOENT, errno.EACCES, errno.EISDIR, errno.ENOTDIR)),
    ],
)
def test_the_exit_status_is_2_for_a_name_and_1_for_the_machine(
    number: int, status: int, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    def fail(*_: Any) -> Any:
        raise OSError(number, os.strerror(number), str(tmp_path / "report.html"))

    monkeypatch.setattr("megatron_gspo.report.html.write_report", fail)
    assert cli.main(["report", str(tmp_path)]) == status
    said = capsys.readouterr().err
    assert said.startswith("error: ") and said.count("\n") == 1
    assert (f"free at {tmp_path}): make room" in said) == (number in (errno.ENOSPC, errno.EDQUOT))


# ------------------------------------------------------------------------------------------------ what a run writes


def recorded(tmp_path: Path, **train: Any) -> RunRecorder:
    return RunRecorder(make_config(tmp_path / "run", train={"tensorboard": False, **train}), 2)


CONTINUE = "what the run records cannot be written: .*File too large.*: make room, then train.resume = true continues"


@pytest.mark.parametrize("kind", ["metrics", "rollouts", "TensorBoard"])
def test_a_run_that_cannot_write_its_records_fails_and_keeps_whole_lines(
    tmp_path: Path, small_files: Callable[[int], None], kind: str
) -> None:
    def write(recorder: RunRecorder) -> None:
        with recorder:
            recorder.steps([make_report(0, 0)])
            small_files(5000)
            if kind == "rollouts":
                recorder.rollouts(0, [make_rollout(0)] * 40)
            for minibatch in range(1, 400):
                recorder.steps([make_report(0, minibatch)])

    with pytest.raises(WriteError, match=rf"^{tmp_path}/run: {CONTINUE}"):
        write(recorded(tmp_path, tensorboard=kind == "TensorBoard"))
    small_files(10**9)
    run = RunDirectory.open(tmp_path / "run")
    run.metrics_writer().close()
    assert [json.loads(line)["minibatch"] for line in run.metrics_file.open()] == list(range(len(run.metrics())))
    assert len(run.metrics()) >= 1


def test_a_page_that_cannot_be_written_fails_a_run_that_is_done_and_says_how_to_draw_it(
    tmp_path: Path, small_files: Callable[[int], None]
) -> None:
    said = rf"run/report.html: the run is done, but its page cannot be written: .*`megatron-gspo report {tmp_path}/run`"
    recorder = recorded(tmp_path)
    with pytest.raises(WriteError, match=said), recorder:
        small_files(100_000)
    run = RunDirectory.open(tmp_path / "run")
    assert run.manifest()["status"] == "finished"
    assert not run.report_file.exists() and not list(run.path.glob("*.tmp"))


def test_a_page_that_cannot_be_written_leaves_the_one_before(
    tmp_path: Path, small_files: Callable[[int], None]
) -> None:
    page = write_page("old", tmp_path / "a.html")
    small_files(1000)
    with pytest.raises(OSError, match="File too large"):
        write_page("new" * 1000, page)
    assert page.read_text() == "old" and [path.name for path in tmp_path.iterdir()] == ["a.html"]


def test_a_run_that_a_full_disk_ended_says_so_in_its_manifest(tmp_path: Path) -> None:
    mount = ["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", str(tmp_path)]
    if subprocess.run(mount, capture_output=True, check=False).returncode:
        pytest.skip("only root can mount a file system, and not everywhere")
    try:
        run = RunDirectory(tmp_path)
        run.write_manifest({"status": "running", "starts": [{"started": "now"}]})
        with pytest.raises(OSError, match="No space left"):
            (tmp_path / "everything").write_bytes(bytes(100_000))
        run.finish("failed", "the disk is full")
        assert run.manifest()["status"] == run.manifest()["starts"][0]["status"] == "failed"
        run.finish("finished")
        assert run.manifest()["status"] == "finished"
    finally:
        subprocess.run(["umount", str(tmp_path)], check=True)


def test_a_run_directory_that_a_full_disk_refuses_is_no_mistake(
    tmp_path: Path, small_files: Callable[[int], None]
) -> None:
    small_files(100)
    with pytest.raises(WriteError, match=r"^train.run_dir = .*/run cannot be written: .*File too large"):
        RunDirectory.create(make_config(tmp_path / "run"))
    small_files(10**9)
    (tmp_path / "file").touch()
    with pytest.raises(ConfigError, match="Not a directory"):
        RunDirectory.create(make_config(tmp_path / "file" / "run"))


def test_cutting_back_on_a_full_disk_loses_nothing(tmp_path: Path, small_files: Callable[[int], None]) -> None:
    with recorded(tmp_path) as recorder:
        recorder.steps([make_report(outer_step, 0) for outer_step in range(12)])
    run = RunDirectory.open(tmp_path / "run")
    before = run.metrics_file.read_text()
    small_files(2000)
    with pytest.raises(WriteError, match="File too large"):
        run.cut_back(make_config(run.path), 8)
    assert run.metrics_file.read_text() == before and not list(run.path.glob("*.tmp"))


def test_an_evaluation_that_cannot_keep_its_responses_fails(tmp_path: Path, small_files: Callable[[int], None]) -> None:
    prompt = Prompt("p", "q" * 2000, (1,), "42")
    ids, logprobs = np.array([1], np.int32), np.array([-1.0], np.float32)
    out = EvaluationDirectory(tmp_path / "out", {})
    small_files(1000)
    with pytest.raises(WriteError, match=r"out: the responses cannot be written: .*File too large"), out:
        out.drawn([Rollout(prompt, 0, ids, logprobs, "stop", (0,), text="a" * 2000)])


def test_a_full_disk_under_a_weight_sync_is_said_and_what_was_written_goes(
    tmp_path: Path, small_files: Callable[[int], None]
) -> None:
    model, shared = tmp_path / "model", tmp_path / "shared"
    model.mkdir()
    shared.mkdir()
    (model / "config.json").write_text("{}")
    config = SyncConfig(method="disk", directory=str(shared))
    sync = DiskSync(config, ["http://127.0.0.1:1"], Peers(), model, {"a"})
    place = sync._begin()
    small_files(1000)
    with pytest.raises(
        SyncError, match=rf"^sync.directory = {shared} cannot be written: .*File too large.*{ROOM}start"
    ):
        sync._send(place, [("a", torch.zeros(10_000))])
    sync._abandon()
    assert not list(shared.iterdir())


# ------------------------------------------------------------------------------------------------------- an index


@pytest.mark.parametrize(
    "name", ["../w.safetensors", "/etc/w.safetensors", "a/../../w.safetensors", "", "..", "a\0b", "//x", 3]
)
def test_an_index_that_names_a_file_outside_its_directory_is_refused(tmp_path: Path, name: str) -> None:
    model = tmp_path / "model"
    model.mkdir()
    save_file({"a": torch.zeros(2)}, tmp_path / "w.safetensors")
    index = model / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"a": name}}))
    with pytest.raises(MegatronGspoError, match="which is not in its directory: correct the index") as caught:
        HfReader(model)
    assert str(caught.value).startswith(f"{index} names the file {name!r}") and isinstance(caught.value, UserError)


def test_links_into_the_blobs_of_a_cache_and_files_in_folders_below_are_read(tmp_path: Path) -> None:
    """Hugging Face's cache: snapshots/REVISION/FILE is a link to ../../blobs/HASH."""
    blobs, model = tmp_path / "blobs", tmp_path / "snapshots" / "main"
    blobs.mkdir()
    (model / "below").mkdir(parents=True)
    save_file({"a": torch.arange(2.0)}, blobs / "0123")
    save_file({"b": torch.arange(3.0)}, model / "below" / "w.safetensors")
    (model / "w.safetensors").symlink_to("../../blobs/0123")
    table = {"a": "w.safetensors", "b": "below/w.safetensors"}
    (blobs / "4567").write_text(json.dumps({"weight_map": table}))
    (model / "model.safetensors.index.json").symlink_to("../../blobs/4567")
    reader = HfReader(model)
    assert reader.read("a").tolist() == [0.0, 1.0] and reader.read("b").tolist() == [0.0, 1.0, 2.0]
