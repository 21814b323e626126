"""What is wrong with a checkpoint is said by file and tensor, before anything is written."""

from __future__ import annotations

import json
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import psutil
import pytest
import torch
from safetensors.torch import load_file, save_file

from megatron_gspo.errors import WeightError
from megatron_gspo.megatron.checkpoint_stream import MOST_OPEN, BlockWriter, DistributedReader, write_description
from tests.convert.ranks import convert, convert_rank, tensors_of
from tests.convert.test_interruptions import SMALL, damage
from tests.pool import RankError, RankPool

pytestmark = pytest.mark.distributed

UP = "model.layers.1.mlp.experts.3.up_proj.weight"
DOWN = "model.layers.1.mlp.experts.3.down_proj.weight"


@pytest.fixture(scope="module")
def sharded(ranks: RankPool, tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny model in several files with an index."""
    directory = tmp_path_factory.mktemp("sharded")
    convert(ranks, tiny, directory / "megatron")
    convert(ranks, directory / "megatron", directory / "hf", max_shard_bytes=SMALL)
    return directory / "hf"


@pytest.fixture(scope="module")
def megatron(sharded: Path) -> Path:
    return sharded.parent / "megatron"


def file_of(directory: Path, name: str) -> Path:
    index = json.loads((directory / "model.safetensors.index.json").read_text())
    return directory / index["weight_map"][name]


def without_a_shard(path: Path) -> None:
    file_of(path, UP).unlink()


def with_half_a_shard(path: Path) -> None:
    file = file_of(path, UP)
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])


def with_an_index_that_lies(path: Path) -> None:
    index = path / "model.safetensors.index.json"
    table = json.loads(index.read_text())
    table["weight_map"][UP] = next(file for file in table["weight_map"].values() if file != table["weight_map"][UP])
    index.write_text(json.dumps(table))


def rewrite(path: Path, change: Callable[[dict[str, torch.Tensor]], None], name: str = UP) -> None:
    file = file_of(path, name)
    tensors = load_file(file)
    change(tensors)
    save_file({key: tensor.contiguous() for key, tensor in tensors.items()}, file, {"format": "pt"})


def with_a_wrong_shape(path: Path) -> None:
    rewrite(path, lambda tensors: tensors.update({UP: tensors[UP][:-1]}))


def with_another_dtype(path: Path) -> None:
    rewrite(path, lambda tensors: tensors.update({UP: tensors[UP].half()}))


def with_eight_bits(path: Path) -> None:
    rewrite(path, lambda tensors: tensors.update({UP: tensors[UP].to(torch.float8_e4m3fn)}))


def with_one_expert_of_another_dtype(path: Path) -> None:
    """Its own parameters agree; Megatron stores a layer's experts as one tensor."""
    rewrite(path, lambda tensors: tensors.update({DOWN: tensors[DOWN].half()}), DOWN)


def with_the_scale_of_no_eight_bits(path: Path) -> None:
    rewrite(path, lambda tensors: tensors.update({f"{UP}_scale_inv": torch.ones(1, 1)}))
    index = path / "model.safetensors.index.json"
    table = json.loads(index.read_text())
    table["weight_map"][f"{UP}_scale_inv"] = table["weight_map"][UP]
    index.write_text(json.dumps(table))


def with_one_file_beside_the_index(path: Path) -> None:
    save_file({UP: torch.zeros(2, 2)}, path / "model.safetensors")


def without_a_tensor(path: Path) -> None:
    index = path / "model.safetensors.index.json"
    table = json.loads(index.read_text())
    del table["weight_map"][UP]
    index.write_text(json.dumps(table))


def with_a_stranger(path: Path) -> None:
    index = path / "model.safetensors.index.json"
    table = json.loads(index.read_text())
    file = file_of(path, UP)
    rewrite(path, lambda tensors: tensors.update({"model.stranger": torch.zeros(2)}))
    table["weight_map"]["model.stranger"] = file.name
    index.write_text(json.dumps(table))


def of_an_unknown_architecture(path: Path) -> None:
    config = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(json.dumps(config | {"architectures": ["NobodyForCausalLM"]}))


BAD_HF = {
    without_a_shard: r"model-0000\d-of-0000\d\.safetensors: model\..*No such file",
    with_half_a_shard: r"model-0000\d-of-0000\d\.safetensors: model\..*(truncated|incomplete|Incomplete|InvalidHeader)",
    with_an_index_that_lies: rf"model-0000\d-of-0000\d\.safetensors: {UP}: ",
    with_a_wrong_shape: rf"safetensors: {UP} has shape \(23, 32\), and config.json asks for \(24, 32\)",
    with_another_dtype: rf"{UP} is torch.float16: Megatron keeps them in one matrix",
    with_eight_bits: rf"safetensors: {UP} is stored as F8_E4M3: weights must be",
    without_a_tensor: rf"{UP} missing: config.json asks for them",
    with_a_stranger: r"safetensors: model.stranger in the files, .* --drop-unknown",
    with_one_expert_of_another_dtype: r"3\.down_proj\.weight is torch\.float16: Megatron keeps them in one tensor",
    with_the_scale_of_no_eight_bits: rf"{UP}_scale_inv in the files",
    with_one_file_beside_the_index: r"both model\.safetensors and model\.safetensors\.index\.json",
    of_an_unknown_architecture: r"architecture NobodyForCausalLM is not supported \(known: Qwen3ForCausalLM, ",
}


@pytest.mark.parametrize("spoil", BAD_HF, ids=lambda spoil: spoil.__name__)
def test_a_hugging_face_directory(ranks: RankPool, sharded: Path, tmp_path: Path, spoil: Callable[[Path], None]):
    source = tmp_path / "source"
    shutil.copytree(sharded, source)
    spoil(source)
    with pytest.raises(RankError, match=BAD_HF[spoil]):
        convert(ranks, source, tmp_path / "m")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["source"]


def test_a_stranger_is_left_out_when_asked(ranks: RankPool, sharded: Path, tmp_path: Path):
    source = tmp_path / "source"
    shutil.copytree(sharded, source)
    with_a_stranger(source)
    done = convert(ranks, source, tmp_path / "m", drop_unknown=True)
    assert done.tensors == len(json.loads((sharded / "model.safetensors.index.json").read_text())["weight_map"])


class Command:
    """A pickle that would run a command."""

    def __reduce__(self) -> tuple[object, tuple[str, ...]]:
        import os

        return os.system, ("touch pickle-ran",)


def with_a_command(path: Path) -> None:
    (path / ".metadata").write_bytes(pickle.dumps(Command()))


def with_a_function_that_runs_text(path: Path) -> None:
    """``dataclass`` makes source of field names and runs it; the module of descriptions imports it."""
    (path / ".metadata").write_bytes(b"\x80\x02ctorch.distributed.checkpoint.metadata\ndataclass\n.")


def with_attributes_for_a_class(path: Path) -> None:
    slots = b"}X\x04\x00\x00\x00sizeK\x01s"
    found = b"ctorch.distributed.checkpoint.metadata\nMetadata\n"
    (path / ".metadata").write_bytes(b"\x80\x02" + found + b"N" + slots + b"\x86b.")


def with_a_block_less(path: Path) -> None:
    metadata = pickle.loads((path / ".metadata").read_bytes())
    metadata.state_dict_metadata["decoder.layers.1.mlp.experts.experts.linear_fc2.weight"].chunks.pop()
    (path / ".metadata").write_bytes(pickle.dumps(metadata))


def with_half_a_file(path: Path) -> None:
    file = path / "__0_0.distcp"
    file.write_bytes(file.read_bytes()[:1000])


def with_a_flipped_bit(path: Path) -> None:
    damage(path / "__0_0.distcp")


def of_another_model(path: Path) -> None:
    config = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(json.dumps(config | {"vocab_size": 66}))


BAD_MEGATRON = {
    with_a_command: r"\.metadata: UnpicklingError: .*system has no place in a description of tensors",
    with_a_function_that_runs_text: r"metadata\.dataclass has no place in a description of tensors",
    with_attributes_for_a_class: r"the class Metadata gets no attributes in a description of tensors",
    with_a_block_less: r"linear_fc2\.weight: its blocks hold 0 of the 768 elements|linear_fc2\.weight: no file has",
    with_half_a_file: r"__0_0\.distcp",
    with_a_flipped_bit: r"__0_0\.distcp: it was altered: sha256",
    of_another_model: r"a checkpoint of another model: vocab_size is 67 there and 66 here",
}


@pytest.mark.parametrize("spoil", BAD_MEGATRON, ids=lambda spoil: spoil.__name__)
def test_a_distributed_checkpoint(ranks: RankPool, megatron: Path, tmp_path: Path, spoil: Callable[[Path], None]):
    source = tmp_path / "source"
    shutil.copytree(megatron, source)
    spoil(source)
    with pytest.raises(RankError, match=BAD_MEGATRON[spoil]):
        convert(ranks, source, tmp_path / "hf")
    assert not (tmp_path / "hf").exists()
    assert not Path("pickle-ran").exists()


def test_a_destination_that_is_there_is_kept(ranks: RankPool, tiny: Path, tmp_path: Path):
    (tmp_path / "m").mkdir()
    (tmp_path / "m" / "thesis.tex").write_text("years of work")
    for overwrite, line in ((False, "replace it with --overwrite"), (True, "holds no checkpoint, so nothing replaces")):
        with pytest.raises(RankError, match=line):
            convert(ranks, tiny, tmp_path / "m", overwrite=overwrite)
    assert (tmp_path / "m" / "thesis.tex").read_text() == "years of work"


@pytest.mark.parametrize("name", ["m.partial", "m.replaced"])
def test_what_no_conversion_left_is_kept(ranks: RankPool, tiny: Path, tmp_path: Path, name: str):
    (tmp_path / name).mkdir()
    (tmp_path / name / "thesis.tex").write_text("years of work")
    with pytest.raises(RankError, match=rf"{name} was left by no conversion, and one needs its name"):
        convert(ranks, tiny, tmp_path / "m")
    assert (tmp_path / name / "thesis.tex").read_text() == "years of work"
    assert not (tmp_path / "m").exists()


@pytest.mark.parametrize("name", ["m.partial", "m.replaced", "m/hf"])
def test_a_source_that_the_conversion_would_replace_is_refused(ranks: RankPool, tiny: Path, tmp_path: Path, name: str):
    shutil.copytree(tiny, tmp_path / name)
    if name == "m/hf":  # and its parent is one more checkpoint
        shutil.copytree(tiny, tmp_path / "m", dirs_exist_ok=True)
    with pytest.raises(RankError, match=r"which a conversion to .*/m replaces"):
        convert(ranks, tmp_path / name, tmp_path / "m", overwrite=True)
    assert tensors_of(tmp_path / name) == tensors_of(tiny)


def test_what_appears_at_the_destination_meanwhile_is_kept(ranks: RankPool, tiny: Path, tmp_path: Path):
    with pytest.raises(RankError, match="m exists: name another destination"):
        ranks.run(1, raced_rank, tiny, tmp_path / "m")
    assert (tmp_path / "m" / "thesis.tex").read_text() == "years of work"


def raced_rank(source: Path, destination: Path) -> None:
    from megatron_gspo.convert import jobs

    genuine = jobs.write_description

    def raced(*arguments: Any) -> None:
        destination.mkdir()
        (destination / "thesis.tex").write_text("years of work")
        genuine(*arguments)

    with mock.patch.object(jobs, "write_description", raced):
        convert_rank(source, destination, {})


def test_a_file_of_a_converted_checkpoint_that_is_gone_is_missed(ranks: RankPool, megatron: Path, tmp_path: Path):
    source = Path(shutil.copytree(megatron, tmp_path / "source"))
    (source / "metadata.json").unlink()  # which nothing here reads
    with pytest.raises(RankError, match=r"metadata\.json: it is missing"):
        convert(ranks, source, tmp_path / "hf")


def test_blocks_that_overlap_do_not_hide_a_gap(tmp_path: Path):
    writer = BlockWriter(tmp_path / "__0_0.distcp")
    for row in (0, 1):
        writer.tensor("w", (row, 0), torch.ones(2, 3))
    writer.close()
    write_description(tmp_path, {"w": (torch.float32, (4, 3))}, {"__0_0.distcp": writer.blocks})
    with pytest.raises(WeightError, match="w: its blocks hold 9 of the 12 elements"):
        DistributedReader(tmp_path).read("w", (0, 0), (4, 3))


def test_a_checkpoint_of_many_files_is_read_with_few_of_them_open(ranks: RankPool, tiny: Path, tmp_path: Path):
    convert(ranks, tiny, tmp_path / "m", max_shard_bytes=1)
    assert len(list((tmp_path / "m").glob("*.distcp"))) > 2 * MOST_OPEN
    reader = DistributedReader(tmp_path / "m")
    most = 0
    for key in sorted(reader.keys()):
        shape = reader.shape(key)
        assert reader.read(key, (0,) * len(shape), shape).shape == shape
        most = max(most, sum(file.path.endswith(".distcp") for file in psutil.Process().open_files()))
    assert most == MOST_OPEN


def test_a_model_that_is_not_there_is_named_with_those_that_are(ranks: RankPool, megatron: Path, tmp_path: Path):
    with pytest.raises(RankError, match="megatron: it holds the policy, and no critic: name one of these"):
        convert(ranks, megatron, tmp_path / "critic", model="critic")
    with pytest.raises(RankError, match="is a Hugging Face directory, which holds one model: --model critic chooses"):
        convert(ranks, megatron.parent / "hf", tmp_path / "critic", model="critic")
    stranger = shutil.copytree(megatron, tmp_path / "stranger")
    (stranger / "checkpoint.json").unlink()
    with pytest.raises(RankError, match=r"stranger has no checkpoint\.json, .*: without one, it is a policy's"):
        convert(ranks, stranger, tmp_path / "critic", model="critic")
    assert not (tmp_path / "critic").exists()


def test_a_destination_inside_the_source_is_refused(ranks: RankPool, tiny: Path):
    with pytest.raises(RankError, match="lies in it"):
        convert(ranks, tiny, tiny / "megatron")
