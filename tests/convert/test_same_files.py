"""A model that is saved by training, exported beside it or converted back is the same directory, file by file."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from tests.convert.ranks import convert, make_policy, tensors_of, verify_rank
from tests.pool import RankPool
from tests.unit.test_weights_elsewhere import split, stack

pytestmark = pytest.mark.distributed

SMALL = 40_000
"""Bytes of a shard: several of the tiny model."""
BESIDE = {
    "tokenizer_config.json": '{"auto_map": {"AutoTokenizer": ["tokenization_x.Tokenizer", null]}}',
    "tokenization_x.py": "from .words import words\n",
    "words.py": "words = 1\n",
    "tiktoken.model": "a 0\n",
    "chat_template.jinja": "{{ messages }}",
    "chat_template.json": "{}",
    "generation_config.json": "{}",
    "special_tokens_map.json": "{}",
    "LICENSE": "free",
    "README.md": "# a model",
    "additional_chat_templates/tools.jinja": "{{ tools }}",
}


@pytest.fixture
def source(tiny: Path, tmp_path: Path) -> Path:
    """The tiny model as transformers 4 would describe it, with code of its own."""
    path = Path(shutil.copytree(tiny, tmp_path / "source"))
    config = json.loads((path / "config.json").read_text())
    config["torch_dtype"] = config.pop("dtype")
    config["auto_map"] = {"AutoConfig": "someone/else--configuration.Config"}
    (path / "config.json").write_text(json.dumps(config))
    for name, text in BESIDE.items():
        (path / name).parent.mkdir(exist_ok=True)
        (path / name).write_text(text)
    return path


def save_every_way(source: Path, root: Path) -> None:
    """What training writes at its end, what it exports meanwhile, and a checkpoint of its own."""
    from megatron_gspo.megatron.checkpoint import save_checkpoint
    from megatron_gspo.runs import save

    policy = make_policy(source, {}, "bfloat16")
    with mock.patch.object(save, "SHARD_BYTES", SMALL):
        save.save_hugging_face(policy, policy.config, policy.groups, root / "saved")
        save.BackgroundSave(policy, policy.config, root / "exported").finish()
    save_checkpoint({"policy": policy}, root / "checkpoint", {"config": {"model": {"path": str(source)}}})


def beside(directory: Path) -> dict[str, bytes]:
    """Every file but those of weights."""
    files = [path for path in directory.rglob("*") if path.is_file() and ".safetensors" not in path.name]
    return {str(path.relative_to(directory)): path.read_bytes() for path in files}


def check_files_of_weights(directory: Path) -> None:
    """Names, metadata and the index are what transformers writes."""
    files = sorted(directory.glob("*.safetensors"))
    assert [path.name for path in files] == [
        f"model-{number:05d}-of-{len(files):05d}.safetensors" for number in range(1, len(files) + 1)
    ]
    assert len(files) > 1
    held: dict[str, str] = {}
    for path in files:
        with safe_open(path, framework="pt") as file:
            assert file.metadata() == {"format": "pt"}
            held |= dict.fromkeys(file.keys(), path.name)
    size = sum(tensor.nbytes for path in files for tensor in load_file(path).values())
    index: dict[str, Any] = json.loads((directory / "model.safetensors.index.json").read_text())
    assert index == {"metadata": {"total_size": size}, "weight_map": held}
    assert list(index["weight_map"]) == sorted(held)


def test_every_way_to_save_a_model_gives_the_same_directory(ranks: RankPool, source: Path, tmp_path: Path) -> None:
    ranks.run(1, save_every_way, source, tmp_path)
    convert(ranks, tmp_path / "checkpoint", tmp_path / "back", max_shard_bytes=SMALL)
    expected = beside(source)
    config = json.loads(expected.pop("config.json")) | {"torch_dtype": "bfloat16"}
    assert set(BESIDE) <= set(expected)
    tensors = tensors_of(tmp_path / "saved")
    for name in ("saved", "exported", "back"):
        found = beside(tmp_path / name)
        assert json.loads(found.pop("config.json")) == config
        assert found == expected
        check_files_of_weights(tmp_path / name)
        assert tensors_of(tmp_path / name) == tensors
    assert {dtype for dtype, _, _ in tensors.values()} == {"torch.bfloat16"}


def test_there_and_back_every_file_is_the_same(ranks: RankPool, source: Path, tmp_path: Path) -> None:
    convert(ranks, source, tmp_path / "megatron", max_shard_bytes=SMALL)
    convert(ranks, tmp_path / "megatron", tmp_path / "back", max_shard_bytes=SMALL)
    assert beside(tmp_path / "back") == beside(source)
    check_files_of_weights(tmp_path / "back")
    assert tensors_of(tmp_path / "back") == tensors_of(source)


def weights_of(source: Path) -> dict[str, Any]:
    from tests.convert.ranks import plain

    return {name: plain(tensor) for name, tensor in make_policy(source, {}, "float32").weights()}


@pytest.mark.parametrize("form", ["stacked", "without an index"])
def test_other_forms_of_the_same_weights_are_trained_and_converted(
    ranks: RankPool, source: Path, tmp_path: Path, form: str
) -> None:
    """What comes back is the form of the family's table, an expert a tensor."""
    other = Path(shutil.copytree(source, tmp_path / "other"))
    if form == "stacked":
        save_file(stack(load_file(source / "model.safetensors")), other / "model.safetensors", {"format": "pt"})
    else:
        split(other, 3)
    (loaded,) = ranks.run(1, weights_of, other)
    assert loaded == tensors_of(source)
    convert(ranks, other, tmp_path / "megatron")
    convert(ranks, tmp_path / "megatron", tmp_path / "back")
    assert tensors_of(tmp_path / "back") == tensors_of(source)
    verdict = ranks.run(1, verify_rank, other, source)[0]
    assert verdict.held and verdict.tensors == len(tensors_of(source))


def test_a_reference_without_its_code_is_noted_by_a_conversion(ranks: RankPool, source: Path, tmp_path: Path) -> None:
    (source / "words.py").unlink()
    notes = ranks.run(1, notes_of_conversion, source, tmp_path / "megatron")[0]
    said = "there is no words.py, which tokenization_x.py imports"
    assert any(said in note for note in notes)
    assert json.loads((tmp_path / "megatron" / "tokenizer_config.json").read_text()) == {}


def notes_of_conversion(source: Path, destination: Path) -> list[str]:
    from megatron_gspo.config import ParallelConfig
    from megatron_gspo.convert.run import Options, Show
    from megatron_gspo.convert.run import convert as run
    from megatron_gspo.megatron.groups import make_groups

    notes: list[str] = []
    run(source, destination, Options(), make_groups(ParallelConfig()), Show(note=notes.append))
    return notes
