"""Every model family: transformers' own tiny models, through loading, a training step in a layout, and saving."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from unittest import mock

import pytest
import torch
from safetensors.torch import load_file, save_file

from megatron_gspo import config
from megatron_gspo.hf.catalog import read_model
from megatron_gspo.megatron.groups import make_groups
from megatron_gspo.megatron.policy import Policy
from megatron_gspo.parity.check import Settings, compare_layout, compare_transformers, make_reference
from megatron_gspo.parity.layouts import parse_layout
from megatron_gspo.parity.models import make_model
from megatron_gspo.parity.ranks import LocalRanks
from megatron_gspo.parity.tensors import PARAMETERS
from megatron_gspo.runs.save import save_hugging_face
from megatron_gspo.train.assembly import expected_names
from tests.pool import RankPool

pytestmark = pytest.mark.distributed

FAMILIES = ("tiny-mixtral", "tiny-qwen2-moe", "tiny-olmoe", "tiny-deepseek-v3", "tiny-moonlight", "tiny-glm4-moe")
DENSE = ("tiny-qwen2", "tiny-llama")
"""With YaRN, and with Llama 3's rule for rotary frequencies."""
ALL = {"tensor": 2, "pipeline": 2, "expert": 2}
LAYOUTS = dict.fromkeys(FAMILIES, ALL) | {"tiny-mixtral": {"expert": 4}, "tiny-moonlight": {"expert": 4}}
"""Of four ranks that load a Hugging Face directory; ``tests/convert`` has others, of distributed checkpoints."""
Make = Callable[[str], Path]


@pytest.fixture(scope="module")
def make(tmp_path_factory: pytest.TempPathFactory) -> Make:
    def once(name: str) -> Path:
        path = root / name
        return path if path.exists() else make_model(name, path, seed=0)

    root = tmp_path_factory.mktemp("families")
    return once


@pytest.mark.parametrize("name", FAMILIES + DENSE)
def test_a_step_is_transformers_in_one_process_and_the_same_step_over_tensor_pipeline_and_expert_ranks(
    make: Make, tmp_path: Path, name: str
) -> None:
    ranks, path = LocalRanks(), make(name)
    reference = make_reference(Settings(layouts=[], path=str(path)), ranks, str(tmp_path))
    theirs = compare_transformers(reference, ranks, str(tmp_path))
    assert (theirs.verdict, theirs.reason) == ("held", "")
    assert 1e-9 < theirs.columns["logprobs"].error < 1e-5, "they round to float32 inside"
    assert theirs.columns["gradients"].error < 1e-5
    layout = parse_layout("TP2xPP2" if name in DENSE else "TP2xPP2xEP2")
    row = compare_layout(layout, reference, ranks, str(tmp_path), tolerance=1e-10)
    assert (row.verdict, row.reason) == ("held", "")
    assert 0.0 < row.columns["gradients"].error < 1e-11
    for column in ("logprobs", "loss", "parameters"):
        assert row.columns[column].error < 1e-11, column
    before, after = load_file(path / "model.safetensors"), load_file(tmp_path / PARAMETERS.format(step=1))
    kept = {tensor for tensor in before if torch.equal(before[tensor], after[tensor])}
    assert kept == {tensor for tensor in before if tensor.endswith("e_score_correction_bias")}, (
        "the step moves the rest"
    )


def stream(path: str, parallel: dict[str, int], dtype: str) -> dict[str, torch.Tensor]:
    """What this rank owns of a model that was only loaded, by Hugging Face name."""
    settings = config.parse(
        {
            "model": {"path": path, "dtype": dtype},
            "data": {"path": "unused"},
            "train": {"run_dir": "unused-run"},
            "parallel": parallel,
        },
        source="test",
    )
    return dict(Policy(settings, make_groups(settings.parallel), trainable=False).weights())


def test_an_expert_bias_is_float32_in_a_bfloat16_model(ranks: RankPool, make: Make) -> None:
    path = make("tiny-glm4-moe")
    stored = load_file(path / "model.safetensors")
    parts = ranks.run(2, stream, str(path), {"pipeline": 2}, "bfloat16")
    sent = {name: tensor for part in parts for name, tensor in part.items()}
    for name, tensor in stored.items():
        expected = tensor if name.endswith("e_score_correction_bias") else tensor.to(torch.bfloat16)
        assert sent[name].dtype == expected.dtype and torch.equal(sent[name], expected), name
    assert {tensor.dtype for tensor in sent.values()} == {torch.bfloat16, torch.float32}


@pytest.mark.parametrize("name", FAMILIES)
def test_what_a_layout_sends_is_the_file_byte_for_byte(ranks: RankPool, make: Make, name: str) -> None:
    path = make(name)
    stored = load_file(path / "model.safetensors")
    parts = ranks.run(4, stream, str(path), LAYOUTS[name], "float64")
    names = [tensor for part in parts for tensor in part]
    assert sorted(names) == sorted(stored), "each once, none more"
    for part in parts:
        for tensor, value in part.items():
            assert value.dtype == stored[tensor].dtype and torch.equal(value, stored[tensor]), tensor


def save(path: str, directory: str) -> None:
    settings = config.parse(
        {
            "model": {"path": path, "dtype": "float64"},
            "data": {"path": "unused"},
            "train": {"run_dir": "unused-run"},
            "parallel": {"tensor": 2},
        },
        source="test",
    )
    groups = make_groups(settings.parallel)
    save_hugging_face(Policy(settings, groups, trainable=False), settings, groups, Path(directory))


def expected_by_a_sync(path: Path) -> set[str]:
    settings = config.parse({"model": {"path": str(path)}, "data": {"path": "unused"}, "train": {"run_dir": "run"}})
    return expected_names(settings, mock.Mock(shape=read_model(path)[1]))


def test_prediction_layers_are_saved_as_they_were_and_no_sync_waits_for_them(
    ranks: RankPool, make: Make, tmp_path: Path
) -> None:
    source, saved = Path(shutil.copytree(make("tiny-glm4-moe"), tmp_path / "source")), tmp_path / "saved"
    stored = load_file(source / "model.safetensors")
    stored |= {"model.layers.4.eh_proj.weight": torch.rand(32, 64), "model.layers.4.enorm.weight": torch.rand(32)}
    save_file(stored, source / "model.safetensors")
    settings = json.loads((source / "config.json").read_text())
    settings.pop("num_mtp_layers", None)
    (source / "config.json").write_text(json.dumps(settings | {"num_nextn_predict_layers": 1}))
    ranks.run(2, save, str(source), str(saved))
    assert expected_by_a_sync(source) == {name for name in stored if not name.startswith("model.layers.4.")}
    written = {name: tensor for file in saved.glob("*.safetensors") for name, tensor in load_file(file).items()}
    assert set(written) == set(stored)
    assert all(written[name].dtype == stored[name].dtype for name in stored)
    assert all(torch.equal(written[name], stored[name]) for name in stored)
