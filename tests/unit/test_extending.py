"""What docs/extending.md promises: an algorithm, a pass and a correction from outside of the package."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_gspo.algorithm.correction import Correction
from megatron_gspo.algorithm.importance import correct
from megatron_gspo.algorithm.objective import objective
from megatron_gspo.algorithm.ratios import segment_sum
from megatron_gspo.config import dump, load, parse
from megatron_gspo.errors import ConfigError
from megatron_gspo.report.rundir import RunDirectory
from megatron_gspo.train.passes import find_pass
from tests.unit.algorithm_cases import shard_of

TOY = """
from typing import ClassVar, Literal

import torch

from megatron_gspo.algorithm.base import Algorithm
from megatron_gspo.section import PositiveFloat
from megatron_gspo.types import Axis, Column

DOUBTS = Column("doubts_T", Axis.PREDICTION, None, "what the toy pass makes", made_by="the toy pass")


class Toy(Algorithm):
    \"\"\"-sum weight / |y| tanh(sharpness log w) A, where the toy pass has no doubts.\"\"\"

    source: ClassVar = "this test"

    name: str = "toy"
    sharpness: PositiveFloat = 1.0
    \"\"\"A setting.\"\"\"

    @property
    def passes(self):
        return (*super().passes, "toy:toy_pass")

    def loss(self, shard, new_logprobs_T, sequence_sum):
        from megatron_gspo.algorithm.surrogate import log_ratios, token_loss, trained_advantages

        ratios = log_ratios(shard, new_logprobs_T, sequence_sum)
        sure_T = (1 - shard[DOUBTS]) * trained_advantages(shard)
        nothing_T = torch.zeros_like(shard.mask_T)
        terms_T = torch.tanh(self.sharpness * ratios.of_tokens_T) * sure_T
        return token_loss(shard, terms_T, nothing_T, nothing_T, ratios, sequence_sum)


def toy_pass(run, batches):
    return [{DOUBTS: torch.zeros(batch.num_tokens)} for batch in batches]


def half(log_rho, low, high):
    return torch.full_like(log_rho, 0.5)
"""


@pytest.fixture
def toy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    (tmp_path / "toy.py").write_text(TOY)
    monkeypatch.syspath_prepend(str(tmp_path))
    return tmp_path / "toy.py"


def tree(**sections: dict[str, Any]) -> dict[str, Any]:
    return {"model": {"path": "m"}, "data": {"path": "d"}, "train": {"run_dir": "r"}, **sections}


@pytest.mark.parametrize("named", ["toy:Toy", "{path}:Toy"])
def test_an_algorithm_of_ones_own_is_a_class_in_a_file(toy: Path, tmp_path: Path, named: str) -> None:
    name = named.format(path=toy)
    config = parse(tree(algorithm={"name": name, "sharpness": 2.0}))
    assert config.algorithm.clip_range() is None and config.algorithm.draws_responses
    (tmp_path / "c.toml").write_text(dump(config))
    assert load(tmp_path / "c.toml") == config
    with pytest.raises(ConfigError, match=r"algorithm.sharpness = -1.0: input should be greater than 0"):
        parse(tree(algorithm={"name": name, "sharpness": -1.0}))


def test_it_trains_on_what_its_own_pass_and_a_correction_of_ones_own_have_made(toy: Path) -> None:
    from tests.oracle import random_samples

    algorithm = parse(tree(algorithm={"name": "toy:Toy"})).algorithm
    samples = random_samples(groups=2)
    new = [torch.full((s.num_trained,), -1.0, dtype=torch.float64, requires_grad=True) for s in samples]
    old = [torch.full((s.num_trained,), -1.5, dtype=torch.float64) for s in samples]
    shard, new_T = shard_of(samples, new, old, old)
    (run_pass,) = (find_pass(name) for name in algorithm.passes)
    (made,) = run_pass(None, [shard])  # type: ignore[list-item, arg-type]
    corrected = correct(shard, Correction(rule="toy:half"), segment_sum)
    shard = (shard | made).replace(corrections_T=corrected.weights_T)
    output = objective(algorithm, shard, new_T, segment_sum)
    expected = [-0.5 * s.weight * s.advantage * torch.tanh(torch.tensor(0.5)).item() for s in samples]
    assert output.loss_S.tolist() == pytest.approx(expected)
    assert torch.autograd.grad(output.loss, new[0])[0].abs().min() > 0


def test_a_pass_that_is_none_is_named() -> None:
    with pytest.raises(ConfigError, match=r'pass "refrence" is none \(known: reference, values, or module:function'):
        find_pass("refrence")
    with pytest.raises(ConfigError, match=r'pass = "os:refrence": AttributeError'):
        find_pass("os:refrence")


@pytest.mark.parametrize("source", ["raise RuntimeError('out of paper')", "import sys; sys.exit(0)", "def f(:"])
def test_an_algorithm_whose_file_cannot_be_imported_is_one_line(tmp_path: Path, source: str) -> None:
    (tmp_path / "odd.py").write_text(source)
    with pytest.raises(ConfigError, match=r'algorithm: name = ".*odd.py:Toy": (RuntimeError|SystemExit|SyntaxError)'):
        parse(tree(algorithm={"name": f"{tmp_path}/odd.py:Toy"}))


def test_a_run_is_read_about_without_running_the_algorithm_that_it_names(toy: Path, tmp_path: Path) -> None:
    config = parse(tree(algorithm={"name": f"{toy}:Toy", "sharpness": 2.0}))
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "config.toml").write_text(dump(config))
    toy.write_text("raise SystemExit('it was run')")
    sys.modules.pop(f"megatron_gspo_named:{toy}")
    found = RunDirectory(tmp_path / "run").config()
    assert found is not None and found.algorithm.name == f"{toy}:Toy" and found.optimizer == config.optimizer
