"""Training from a converted checkpoint, and what training leaves for others while it goes on."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from unittest import mock

import pytest

from megatron_gspo.config import RunConfig, load
from tests.convert.ranks import convert, tensors_of
from tests.pool import RankPool
from tests.training.conftest import QUICKSTART, MakeConfig
from tests.training.test_runs import responses_of, steps_of, train

MakeSft = Callable[..., RunConfig]


@pytest.fixture(scope="module")
def megatron(ranks: RankPool, quickstart: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("converted") / "megatron"
    convert(ranks, quickstart / "model", directory, max_shard_bytes=400_000)
    return directory


@pytest.fixture
def sft(quickstart: Path, tmp_path: Path) -> MakeSft:
    def make(name: str, model: Path, *more: str) -> RunConfig:
        return load(
            QUICKSTART / "sft.toml",
            [
                f'model.path="{model}"',
                f'data.path="{quickstart}/sft.jsonl"',
                f'train.run_dir="{tmp_path}/{name}"',
                "train.outer_steps=2",
                "optimizer.schedule=constant",
                "optimizer.warmup_steps=0",
                "parallel.tensor=1",
                "parallel.expert=1",
                "train.prompts_per_step=8",
                "train.tensorboard=false",
                *more,
            ],
        )

    return make


def test_the_first_step_from_a_converted_checkpoint_is_that_from_its_source(
    ranks: RankPool, quickstart: Path, megatron: Path, sft: MakeSft
) -> None:
    """On one rank to the last bit; on two tensor ranks to float32's rounding."""
    runs = {
        "source": (1, sft("source", quickstart / "model")),
        "one": (1, sft("one", megatron)),
        "two": (2, sft("two", megatron, "parallel.tensor=2")),
    }
    for world, config in runs.values():
        ranks.run(world, train, config)
    source, one, two = (steps_of(config) for _, config in runs.values())
    assert one == source
    for name in ("loss", "grad_norm"):
        assert two[0][name] == pytest.approx(source[0][name], rel=1e-5) and source[0][name] > 0.01
    final = tensors_of(Path(runs["source"][1].train.run_dir) / "hf")
    assert tensors_of(Path(runs["one"][1].train.run_dir) / "hf") == final
    assert final != tensors_of(quickstart / "model"), "nothing was learned, so nothing is compared"


def test_reinforcement_learning_starts_from_a_converted_checkpoint(
    ranks: RankPool, megatron: Path, make_config: MakeConfig, tmp_path: Path
) -> None:
    """To the last bit, but for the engine's own logprobs: what else is in its batch moves their last digits."""
    more = ["train.outer_steps=1", "eval.every=0", "train.save_hf=false"]
    plain = make_config(*more, f'train.run_dir="{tmp_path}/plain"')
    converted = make_config(*more, f'train.run_dir="{tmp_path}/converted"', f'model.path="{megatron}"')
    for config in (plain, converted):
        ranks.run(2, train, config)
    assert [r["response"] for r in responses_of(converted)] == [r["response"] for r in responses_of(plain)]
    ours, theirs = (
        [
            {name: value for name, value in step.items() if not name.startswith("kl/engine_")}
            for step in steps_of(config)
        ]
        for config in (converted, plain)
    )
    assert ours == theirs and len(ours) == 2
    assert all(step["kl/engine_k3"] < 1e-9 for step in steps_of(converted))


def slow_train(config: RunConfig) -> None:
    """A run whose exports take longer than its steps: the files of one are written while the next step runs."""
    import time

    from megatron_gspo.runs import save

    genuine = save.write_shards

    def slowly(*args: object, **kwargs: object) -> dict[str, str]:
        time.sleep(1.0)
        return genuine(*args, **kwargs)  # type: ignore[arg-type]

    with mock.patch.object(save, "write_shards", slowly):
        train(config)


def test_exports_hold_the_weights_of_their_step(ranks: RankPool, quickstart: Path, sft: MakeSft) -> None:
    """In the background, on two ranks: weights that training moves meanwhile are not in them."""
    model = quickstart / "model"
    exporting = sft("exporting", model, "train.save_hf_every=1", "parallel.tensor=2", "train.outer_steps=3")
    ranks.run(2, slow_train, exporting)
    run = Path(exporting.train.run_dir)
    assert sorted(path.name for path in (run / "exports").iterdir()) == ["outer_00001", "outer_00002", "outer_00003"]
    assert tensors_of(run / "exports" / "outer_00003") == tensors_of(run / "hf")
    short = sft("short", model, "parallel.tensor=2", "train.outer_steps=3")
    ranks.run(2, stopped_after_one, short)
    assert tensors_of(run / "exports" / "outer_00001") == tensors_of(Path(short.train.run_dir) / "one")
    config = json.loads((run / "exports" / "outer_00001" / "config.json").read_text())
    assert config["dtype"] == exporting.model.dtype


def stopped_after_one(config: RunConfig) -> None:
    """The same run, which writes its weights after the first step and waits until they are there."""
    from megatron_gspo.runs.checkpoints import Checkpoints
    from megatron_gspo.runs.save import save_hugging_face

    genuine = Checkpoints.after_step

    def after_step(self: Checkpoints, progress: object, *, last: bool) -> None:
        if progress.outer_steps == 1:  # type: ignore[attr-defined]
            policy = self._models["policy"]
            save_hugging_face(policy, config, policy.groups, Path(config.train.run_dir) / "one")
        genuine(self, progress, last=last)  # type: ignore[arg-type]

    with mock.patch.object(Checkpoints, "after_step", after_step):
        train(config)


@pytest.mark.parametrize(
    ("setting", "parent", "name"), [("save_hf_every=1", "exports", "outer_00001"), ("save_hf=true", ".", "hf")]
)
def test_a_disk_that_fills_up_under_an_export_is_said(
    ranks: RankPool, quickstart: Path, sft: MakeSft, setting: str, parent: str, name: str
) -> None:
    config = sft("full", quickstart / "model", "train.outer_steps=1", f"train.{setting}")
    said = rf"WriteError: .*{name}: the export cannot be written: .*No space left on device .* free at .*: make room"
    with pytest.raises(AssertionError, match=said):
        ranks.run(1, train_on_a_full_disk, config)
    run = Path(config.train.run_dir)
    assert not [path for path in (run / parent).iterdir() if path.name.startswith(name)]
    shutil.rmtree(run)


def train_on_a_full_disk(config: RunConfig) -> None:
    from megatron_gspo.runs import save

    with mock.patch.object(save, "write_shards", mock.Mock(side_effect=OSError(28, "No space left on device"))):
        train(config)
