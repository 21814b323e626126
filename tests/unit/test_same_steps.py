"""``tools/same_steps.py``: what counts as a difference of two runs."""

from __future__ import annotations

import json
import runpy
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

compare = runpy.run_path(str(Path(__file__).parents[2] / "tools" / "same_steps.py"))["compare"]
RECORD = {"loss": 0.5, "reward/mean": 0.25, "time/train_s": 3.0, "kl/engine_k3": 1e-9, "tokens_per_s": 100}
RESPONSE = {"text": "12", "rollout_logprobs": [-0.1]}


def run_of(directory: Path, weight: float = 1.0, response: dict[str, Any] = RESPONSE, **metrics: Any) -> Path:
    (directory / "hf").mkdir(parents=True)
    (directory / "rollouts").mkdir()
    (directory / "metrics.jsonl").write_text(json.dumps(RECORD | metrics) + "\n")
    (directory / "rollouts" / "outer_00001.jsonl").write_text(json.dumps(response) + "\n")
    save_file({"w": torch.tensor([weight]), "v": torch.zeros(2)}, directory / "hf" / "model.safetensors")
    return directory


@pytest.mark.parametrize(
    ("other", "differences", "gained"),
    [
        ({"time/train_s": 4.0, "kl/engine_k3": 2e-9, "tokens_per_s": 1}, [], []),
        ({"response": RESPONSE | {"rollout_logprobs": [-0.2]}}, [], []),
        ({"dropped/ungraded": 0.0}, [], ["dropped/ungraded"]),
        ({"loss": 0.5000001}, ["metrics.jsonl: line 1, loss: 0.5 and 0.5000001"], []),
        ({"response": {"text": "13"}}, ["rollouts/outer_00001.jsonl: line 1, text: '12' and '13'"], []),
        ({"weight": 1.0000001}, ["1 tensors differ, w first"], []),
    ],
)
def test_a_number_that_changed_is_named_and_what_is_the_machines_or_new_is_none(
    tmp_path: Path, other: dict[str, Any], differences: list[str], gained: list[str]
) -> None:
    found = compare(run_of(tmp_path / "before"), run_of(tmp_path / "after", **other))
    assert found == (differences, gained)


def test_a_metric_that_is_gone_is_a_difference_and_so_are_weights_that_are_not_there(tmp_path: Path) -> None:
    before, after = run_of(tmp_path / "before", gone=1.0), run_of(tmp_path / "after")
    assert compare(before, after) == (["metrics.jsonl: line 1, gone: 1.0 and None"], [])
    for run_dir in (before, after):
        (run_dir / "hf" / "model.safetensors").unlink()
    assert compare(before, after)[0][-1] == "other tensors"
