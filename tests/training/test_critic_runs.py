"""A critic in whole runs, against a stand-in that draws uniformly."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from megatron_gspo.algorithm.gae import ValueScale
from megatron_gspo.config import load
from megatron_gspo.hf.directory import write_json
from megatron_gspo.report.recorder import RunRecorder
from megatron_gspo.runs.loop import train
from tests.convert.ranks import convert, verify_rank
from tests.pool import RankError, RankPool
from tests.training.conftest import QUICKSTART
from tests.training.stand_in import StandIn
from tests.training.test_group_work import lines

pytestmark = pytest.mark.timeout(500)
Settings = Callable[..., list[str]]
PPO = (
    *('algorithm.name="ppo"', 'algorithm.credit="gae"', "algorithm.clip_low=0.2", "algorithm.clip_high=0.2"),
    *("critic.lr=1e-3", "critic.normalise=true", "critic.pretraining_steps=1", "algorithm.kl_reward_coef=0.01"),
)


@pytest.fixture
def settings(overrides: list[str], tmp_path: Path) -> Settings:
    def make(server: StandIn, *more: str) -> list[str]:
        own = [f'rollout.servers=["{server.url}"]', 'sync.method="disk"', f'sync.directory="{tmp_path}"']
        unchecked = ['sync.verify="off"', "rollout.max_engine_k3=0", "train.noise_floor_every=0"]
        return [*overrides, *own, *unchecked, "eval.every=0", "train.save_rollouts=0", *PPO, *more]

    return make


def run(settings: list[str]) -> None:
    train(load(QUICKSTART / "gspo.toml", settings), RunRecorder)


def tensors(directory: Path) -> dict[str, torch.Tensor]:
    return {name: t for file in sorted(directory.glob("*.safetensors")) for name, t in load_file(file).items()}


def beside(directory: Path) -> dict[str, bytes]:
    """Every file that holds no weights and lists none."""
    files = (path for path in directory.iterdir() if "safetensors" not in path.name)
    return {path.name: path.read_bytes() for path in files}


def check_conversions(ranks: RankPool, checkpoint: Path, run: Path, out: Path) -> None:
    """Both models of a checkpoint that a run left at its end are what the run exported then."""
    for model, directory in (("critic", "critic-hf"), ("policy", "hf")):
        convert(ranks, checkpoint, out / model, model=model)
        converted, exported = tensors(out / model), tensors(run / directory)
        assert converted.keys() == exported.keys()
        for name, tensor in exported.items():
            assert converted[name].dtype == tensor.dtype and torch.equal(converted[name], tensor), name
        assert beside(out / model) == beside(run / directory)
        (verdict,) = ranks.run(1, verify_rank, checkpoint, run / directory, model)
        assert verdict.held and verdict.equal == len(exported)
    (verdict,) = ranks.run(1, verify_rank, checkpoint, run / "hf", "critic")
    assert {found.what for found in verdict.differences} == {"missing", "extra", "values"}
    with pytest.raises(RankError, match="it holds the policy and the critic, and no teacher: name one of these"):
        convert(ranks, checkpoint, out / "teacher", model="teacher")
    with pytest.raises(RankError, match="eight bits are for engines, and no engine serves a critic"):
        convert(ranks, checkpoint, out / "eight", model="critic", eight_bits=True)


def test_a_run_with_a_critic_resumes_bit_for_bit_and_gives_a_critic_that_transformers_loads(
    ranks: RankPool, settings: Settings, quickstart: Path, tmp_path: Path
) -> None:
    """At TP 2, EP 2; the first outer step is the critic's alone."""
    from transformers import AutoModelForTokenClassification

    with StandIn(quickstart / "model") as server:
        ranks.run(2, run, settings(server))
        parts = settings(server, f'train.run_dir="{tmp_path / "parts"}"', "train.checkpoint_every=1")
        ranks.run(2, run, [*parts, "train.outer_steps=1"])
        alone = tensors(tmp_path / "parts" / "hf")
        first = tmp_path / "parts" / "checkpoints" / "outer_00001"
        scale = ValueScale(**json.loads((first / "checkpoint.json").read_text())["extra"]["critic"])
        assert scale.mean != 0.0 and scale.std != 1.0, "nothing is normalised, so nothing is compared"
        check_conversions(ranks, first, tmp_path / "parts", tmp_path / "converted")
        ranks.run(2, run, [*parts, "train.overwrite=false", "train.resume=true"])
    cold, whole = tensors(quickstart / "model"), tmp_path / "run"
    for name, tensor in cold.items():
        assert torch.equal(alone[name], tensor), f"{name} moved while the critic alone was trained"
    assert lines(tmp_path / "parts") == lines(whole)
    for kind in ("hf", "critic-hf"):
        resumed = tensors(tmp_path / "parts" / kind)
        assert resumed.keys() == tensors(whole / kind).keys()
        for name, tensor in tensors(whole / kind).items():
            assert torch.equal(resumed[name], tensor), name
    records = lines(whole)
    assert records[0]["lr"] == records[0]["grad_norm"] == 0.0 < records[-1]["lr"]
    assert all(line["critic/grad_norm"] > 0 for line in records)
    assert np.isfinite([line["critic/explained_variance"] for line in records]).all()
    model = AutoModelForTokenClassification.from_pretrained(whole / "critic-hf")
    assert model.num_labels == 1 and float(model.score.weight.detach().abs().max()) > 0
    header = json.loads(next((whole / "checkpoints").glob("outer_*/checkpoint.json")).read_text())
    assert header["models"]["critic"]["step"] >= 1


def shortened(model: Path, layers: int) -> Path:
    """The model without its later layers, in place."""
    config = json.loads((model / "config.json").read_text())
    write_json(model / "config.json", config | {"num_hidden_layers": layers})
    later = re.compile(rf"\.layers\.({'|'.join(map(str, range(layers, config['num_hidden_layers'])))})\.")
    save_file({name: t for name, t in tensors(model).items() if not later.search(name)}, model / "model.safetensors")
    return model


def test_a_critic_starts_from_a_critic(ranks: RankPool, settings: Settings, quickstart: Path, tmp_path: Path) -> None:
    """Of fewer layers than the policy has, which both of its Hugging Face directories say."""
    one = ("parallel.tensor=1", "parallel.expert=1", "train.outer_steps=1", "critic.normalise=false")
    with StandIn(quickstart / "model") as server:
        ranks.run(1, run, settings(server, *one))
        again = settings(server, *one, f'train.run_dir="{tmp_path / "again"}"')
        short = shortened(tmp_path / "run" / "critic-hf", 2)
        ranks.run(1, run, [*again, f'critic.path="{short}"'])
    written, made = tmp_path / "again" / "critic-hf", tmp_path / "made"
    convert(ranks, tmp_path / "again" / "checkpoints" / "outer_00001", made, model="critic")
    assert beside(written) == beside(made) == beside(short) and tensors(written).keys() == tensors(short).keys()
    first, second = lines(tmp_path / "run")[0], lines(tmp_path / "again")[0]
    assert first["critic/values"] == 0.0 != second["critic/values"]


@pytest.mark.parametrize("credit", ["group", "batch"])
def test_a_kl_to_the_reference_is_taken_off_rewards_before_credit_is_given(
    ranks: RankPool, settings: Settings, quickstart: Path, tmp_path: Path, credit: str
) -> None:
    """The same on one rank and two; of the policy itself, the penalty is 0 in the first step, and not in the second."""
    own = (f'algorithm.credit="{credit}"', "critic.lr=1e-5", "critic.normalise=false", "critic.pretraining_steps=0")
    found = []
    for data in (1, 2):
        with StandIn(quickstart / "model") as server:
            layout = ("parallel.tensor=1", "parallel.expert=1", f"parallel.data={data}", "optimizer.lr=1e-2")
            at = f'train.run_dir="{tmp_path / str(data)}"'
            ranks.run(data, run, settings(server, *own, *layout, at, "algorithm.kl_reward_coef=0.5"))
        by_step = {line["outer_step"]: line for line in lines(tmp_path / str(data))}
        found.append([by_step[0]["reward/kl_penalty"], by_step[1]["reward/kl_penalty"]])
    (first, second), (_, other) = found
    assert abs(first) < 1e-6 and abs(second) > 1e-3
    assert other == pytest.approx(second, rel=1e-2)
