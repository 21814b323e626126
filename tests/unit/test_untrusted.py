"""Names in a directory from elsewhere that are no files, and JSON of two meanings: refused at once, by their names."""

from __future__ import annotations

import json
import os
import shutil
import socket
import struct
import tempfile
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import save_file

from megatron_gspo.convert.kinds import kind_of
from megatron_gspo.data import load_prompts, load_tokenizer
from megatron_gspo.errors import ConfigError, DataError, UserError, WeightError
from megatron_gspo.hf.catalog import read_model
from megatron_gspo.hf.checkpoint import INDEX, SINGLE, HfReader, write_shards
from megatron_gspo.hf.directory import check_companions, copy_companions
from megatron_gspo.megatron.checkpoint_files import HEADER, METADATA, latest_in, read_header
from megatron_gspo.untrusted import MOST_DEPTH, MOST_DIGITS, leads_out, parse_json
from tests.unit.doctor_cases import Case, prepare

pytestmark = pytest.mark.timeout(200)


@pytest.fixture(scope="module")
def sound(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("sound") / "model"
    prepare().write_model(directory, seed=0)
    return directory


@pytest.fixture
def model(sound: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(sound, tmp_path / "model"))


def a_socket(path: Path) -> None:
    """A listening socket: opening one for reading fails, and a reader who asks first is told."""
    with tempfile.TemporaryDirectory(dir="/tmp") as short, socket.socket(socket.AF_UNIX) as server:
        server.bind(f"{short}/s")  # of at most 107 bytes, which a test's directory may exceed
        shutil.move(f"{short}/s", path)


def a_link_to_a_device(path: Path) -> None:
    path.symlink_to("/dev/zero")


def a_link_to_a_pipe(path: Path) -> None:
    os.mkfifo(path.parent.parent / "pipe")
    path.symlink_to("../pipe")


STRANGE: list[Callable[[Path], None]] = [os.mkfifo, a_socket, a_link_to_a_device, a_link_to_a_pipe]
READ = ("config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json", SINGLE, INDEX)
BESIDE = ("special_tokens_map.json", "added_tokens.json", "chat_template.jinja", "vocab.json", "merges.txt", "x.model")


def replace(path: Path, make: Callable[[Path], None]) -> None:
    path.unlink(missing_ok=True)
    make(path)


def everything(model: Path) -> None:
    """All that training, ``convert``, ``doctor`` and ``eval`` read of a model directory."""
    read_model(model)
    load_tokenizer(model)
    for name in (reader := HfReader(model)).names():
        reader.read(name)
    check_companions(model)


@pytest.mark.parametrize("make", STRANGE, ids=lambda make: make.__name__)
@pytest.mark.parametrize("name", READ + BESIDE)
def test_what_is_no_file_in_a_model_directory_is_refused_at_once_by_its_name(
    model: Path, name: str, make: Callable[[Path], None]
) -> None:
    everything(model)
    replace(model / name, make)
    refusals = []
    for reads in (read_model, load_tokenizer, HfReader, everything):
        try:
            reads(model)
        except UserError as error:
            refusals.append(str(error))
    assert refusals and all("\n" not in text and name in text for text in refusals), refusals
    assert "a named pipe" in refusals[-1] or "a socket" in refusals[-1] or "a device" in refusals[-1]


def test_an_index_may_name_a_file_that_is_a_pipe_or_a_device_and_it_is_refused_with_its_name(model: Path) -> None:
    for make in STRANGE[:3]:
        directory = model.parent / make.__name__
        directory.mkdir()
        (directory / "below").mkdir()
        make(directory / "below" / "w.safetensors")
        (directory / INDEX).write_text(json.dumps({"weight_map": {"a": "below/w.safetensors"}}))
        with pytest.raises(WeightError, match=r"below/w\.safetensors: a: it is not a regular file, but a "):
            HfReader(directory).read("a")


@pytest.mark.parametrize("name", [HEADER, "common.pt", "__0_0.distcp", "x"])
def test_what_is_no_file_in_a_checkpoint_is_refused_at_once_by_its_name(tmp_path: Path, name: str) -> None:
    checkpoint = tmp_path / "outer_00001"
    checkpoint.mkdir()
    (checkpoint / METADATA).touch()
    os.mkfifo(checkpoint / name)
    with pytest.raises(WeightError, match=f"{name} is a named pipe, where files are expected: remove it"):
        read_header(checkpoint)
    assert kind_of(checkpoint) == "megatron"


def test_latest_that_is_a_pipe_or_without_end_is_refused_at_once(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "latest")
    with pytest.raises(WeightError, match=r"latest cannot be read: it is not a regular file, but a named pipe"):
        latest_in(tmp_path)
    (tmp_path / "latest").unlink()
    (tmp_path / "latest").write_text("outer_" + "0" * 5000)
    with pytest.raises(WeightError, match=r"latest cannot be read: .*more than 1024 bytes"):
        latest_in(tmp_path)


@pytest.mark.parametrize("inside", ["", "of a directory", "of a pattern"])
@pytest.mark.parametrize("make", STRANGE[:3], ids=lambda make: make.__name__)
def test_data_that_are_no_files_are_refused_at_once(
    sound: Path, tmp_path: Path, make: Callable[[Path], None], inside: str
) -> None:
    shards = tmp_path / "data"
    shards.mkdir()
    (shards / "train-0.jsonl").write_text('{"prompt": "1+1="}\n')
    make(shards / "train-1.jsonl")
    path = {"": shards / "train-1.jsonl", "of a directory": shards, "of a pattern": shards / "train-*"}[inside]
    with pytest.raises(DataError, match=r"train-1\.jsonl: it is not a regular file, but a .*write them to a file"):
        load_prompts(path, tokenizer=load_tokenizer(sound))


def test_data_that_link_to_nowhere_are_called_so(sound: Path, tmp_path: Path) -> None:
    (tmp_path / "train.jsonl").symlink_to("gone.jsonl")
    with pytest.raises(DataError, match=r"train\.jsonl is a link to gone\.jsonl, where there is no file"):
        load_prompts(tmp_path / "train.jsonl", tokenizer=load_tokenizer(sound))


# ------------------------------------------------------------------------------------------------------ links, copies


def test_a_companion_that_links_out_of_the_directory_is_never_copied_beside_trained_weights(
    model: Path, tmp_path: Path
) -> None:
    (tmp_path / "id_ed25519").write_text("a key of yours")
    (model / "README.md").symlink_to("../id_ed25519")
    (tmp_path / "out").mkdir()
    words = r"README\.md is a link to .*/id_ed25519, outside of the directory, and would be copied"
    for refused in (check_companions, lambda source: copy_companions(source, tmp_path / "out")):
        with pytest.raises(WeightError, match=words):
            refused(model)
    assert not (tmp_path / "out" / "README.md").exists()
    case = Case(tmp_path).write()
    assert "id_ed25519" in case.check("model").detail and case.check("model").status == "error"


def test_code_below_the_directory_that_links_out_of_it_is_not_copied(model: Path, tmp_path: Path) -> None:
    (tmp_path / "yours").mkdir()
    (tmp_path / "yours" / "secret.py").write_text("PASSWORD = 1\n")
    (model / "sub").symlink_to("../yours")
    (model / "modeling.py").write_text("from .sub.secret import PASSWORD\n")
    config = json.loads((model / "config.json").read_text()) | {"auto_map": {"AutoModel": "modeling.M"}}
    (model / "config.json").write_text(json.dumps(config))
    (tmp_path / "out").mkdir()
    with pytest.raises(WeightError, match=r"sub/secret\.py is a link to .*outside of the directory"):
        copy_companions(model, tmp_path / "out")


def test_links_within_a_directory_and_of_hugging_faces_cache_are_followed_and_weights_may_lie_anywhere(
    model: Path, tmp_path: Path
) -> None:
    repository = tmp_path / "models--a--b"
    snapshot = repository / "snapshots" / "abc"
    (repository / "blobs").mkdir(parents=True)
    snapshot.mkdir(parents=True)
    for path in sorted(model.iterdir()):
        shutil.move(path, repository / "blobs" / f"hash-{path.name}")
        (snapshot / path.name).symlink_to(f"../../blobs/hash-{path.name}")
    everything(snapshot)
    (snapshot / SINGLE).unlink()
    shutil.move(repository / "blobs" / f"hash-{SINGLE}", tmp_path / "shared.safetensors")
    (snapshot / SINGLE).symlink_to(tmp_path / "shared.safetensors")
    everything(snapshot)
    (snapshot / "README.md").symlink_to("config.json")
    assert not leads_out(snapshot, snapshot / "README.md")
    linked = tmp_path / "linked"
    linked.symlink_to(snapshot)
    everything(linked)


# ------------------------------------------------------------------------------------------------------------- JSON


DEEP = '{"a": ' * 100_000 + "1" + "}" * 100_000
BAD = {
    "stands twice": '{"a": 1, "a": 2}',
    "nested more than 100 deep": DEEP,
    "an integer of 5000 digits": '{"a": ' + "9" * 5000 + "}",
}


@pytest.mark.parametrize("words", BAD)
@pytest.mark.parametrize("name", [*READ[:4], INDEX, "special_tokens_map.json", "added_tokens.json"])
def test_json_of_two_meanings_or_without_bounds_is_refused_in_one_line_by_its_name(
    model: Path, name: str, words: str
) -> None:
    (model / name).write_text(BAD[words])
    with pytest.raises((ConfigError, DataError, WeightError), match=rf"{name}: .*{words}") as caught:
        everything(model)
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 400
    assert "set_int_max_str_digits" not in str(caught.value)


@pytest.mark.parametrize("words", BAD)
def test_a_checkpoints_header_is_read_by_the_same_rules(tmp_path: Path, words: str) -> None:
    checkpoint = tmp_path / "outer_00001"
    checkpoint.mkdir()
    (checkpoint / HEADER).write_text(BAD[words])
    with pytest.raises(WeightError, match=rf"{HEADER}: ValueError: .*{words}"):
        read_header(checkpoint)


def with_header(path: Path, header: str, data: bytes) -> None:
    path.write_bytes(struct.pack("<Q", len(header)) + header.encode() + data)


def entry(start: int) -> str:
    return f'{{"dtype":"F32","shape":[1],"data_offsets":[{start},{start + 4}]}}'


@pytest.mark.parametrize(
    "twice",
    [
        f'{{"a":{entry(4)},"b":{entry(4)},"a":{entry(0)}}}',
        f'{{"a":{entry(4)},"b":{entry(4)},"\\u0061":{entry(0)}}}',
        f'{{"__metadata__":{{"format":"pt","format":"tf"}},"a":{entry(0)},"b":{entry(4)}}}',
    ],
    ids=["a tensor", "a tensor, escaped", "of the metadata"],
)
def test_a_key_that_stands_twice_in_a_safetensors_header_is_refused_by_its_file(tmp_path: Path, twice: str) -> None:
    with_header(tmp_path / SINGLE, twice, struct.pack("<2f", 1.0, 2.0))
    with safe_open(tmp_path / SINGLE, framework="pt") as library:
        assert library.get_tensor("a").tolist() == [1.0]  # of two, it takes the last one
    with pytest.raises(WeightError, match=rf"{SINGLE}: .*its header: the key '(a|format)' stands twice in one object"):
        HfReader(tmp_path).read("a")
    with_header(tmp_path / SINGLE, f'{{"a":{entry(0)},"b":{entry(4)}}}', struct.pack("<2f", 1.0, 2.0))
    assert HfReader(tmp_path).read("b").tolist() == [2.0]


@settings(max_examples=50)
@given(st.recursive(st.none() | st.booleans() | st.integers(-(2**80), 2**80) | st.floats() | st.text(), st.lists))
@example([[]])
def test_whatever_else_json_holds_is_read_as_the_standard_library_reads_it(tree: object) -> None:
    text = json.dumps({"a": tree})
    assert json.dumps(parse_json(text.encode())) == json.dumps(json.loads(text))


def test_depth_and_digits_are_allowed_up_to_their_bounds() -> None:
    parse_json(("[" * MOST_DEPTH + "]" * MOST_DEPTH).encode())
    with pytest.raises(ValueError, match="deep"):
        parse_json(("[" * (MOST_DEPTH + 1) + "]" * (MOST_DEPTH + 1)).encode())
    assert parse_json(b"-" + b"9" * (MOST_DIGITS - 1)) == -(10 ** (MOST_DIGITS - 1) - 1)
    with pytest.raises(ValueError, match=f"an integer of {MOST_DIGITS + 1} digits"):
        parse_json(b"-" + b"9" * (MOST_DIGITS + 1))


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ('{"prompt": "x", "n": ' + "9" * 5000 + "}", "an integer of 5000 digits: write it as a text"),
        ('{"prompt": "x", "n": ' + "[" * 100_000 + "]" * 100_000 + "}", "nested too deeply"),
    ],
)
@pytest.mark.parametrize("name", ["train.jsonl", "train.json"])
def test_a_row_without_bounds_is_refused_in_one_line_with_its_place(
    sound: Path, tmp_path: Path, name: str, line: str, words: str
) -> None:
    (tmp_path / name).write_text(line if name.endswith("l") else f"[{line}]")
    with pytest.raises(DataError, match=rf"{name}.*: .*{words}") as caught:
        load_prompts(tmp_path / name, tokenizer=load_tokenizer(sound))
    assert "set_int_max_str_digits" not in str(caught.value)


# ------------------------------------------------------------------------------------------------------- permissions


@pytest.mark.parametrize(("umask", "mode"), [(0o022, 0o644), (0o077, 0o600), (0o002, 0o664)])
def test_exported_files_have_the_permissions_that_the_umask_leaves(
    model: Path, tmp_path: Path, umask: int, mode: int
) -> None:
    out = tmp_path / "out"
    before = os.umask(umask)
    try:
        out.mkdir()
        write_shards(out, [("a", torch.zeros(3))], owner=0, max_bytes=100)
        copy_companions(model, out, dtype="bfloat16")
    finally:
        os.umask(before)
    assert len(list(out.iterdir())) > 4
    assert {path.name: oct(path.stat().st_mode & 0o777) for path in out.iterdir()} == {
        path.name: oct(mode) for path in out.iterdir()
    }


def test_a_written_file_is_byte_for_byte_what_the_safetensors_library_writes(tmp_path: Path) -> None:
    tensors = {
        "b": torch.arange(5, dtype=torch.bfloat16),
        "a": torch.arange(6.0).reshape(2, 3).t(),
        "c": torch.zeros(0, 4, dtype=torch.float64),
        "z": torch.tensor(2.5),
    }
    write_shards(tmp_path, tensors.items(), owner=0, max_bytes=10**6)
    save_file({name: t.contiguous() for name, t in tensors.items()}, tmp_path / "theirs", {"format": "pt"})
    (ours,) = tmp_path.glob("model-*")
    assert ours.read_bytes() == (tmp_path / "theirs").read_bytes()
