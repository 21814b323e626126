"""A run that is killed and resumed is the run that was not: the same tokens, metrics and weights, to the last bit."""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch

from megatron_gspo.config import RunConfig, load
from megatron_gspo.megatron import checkpoint_files
from megatron_gspo.report.status import summarise
from megatron_gspo.runs.rank import STOPPED
from tests.pool import RankError, RankPool
from tests.training.conftest import QUICKSTART, ROOT
from tests.training.test_runs import metrics_of, responses_of, train, weights_of

OUTER_STEPS = 6
SEED_OF_THE_KILL = 20260
MakeSettings = Callable[..., list[str]]


@pytest.fixture(scope="module")
def settings(quickstart: Path, server: str, tmp_path_factory: pytest.TempPathFactory) -> MakeSettings:
    """The quickstart's configuration cut to short outer steps, a checkpoint after every second, a reward with chance
    in it, and a place of its own."""
    shared = [
        f'model.path="{quickstart}/model"',
        f'data.path="{quickstart}/train.jsonl"',
        f'data.eval_path="{quickstart}/eval.jsonl"',
        f'reward.function="{Path(__file__).with_name("rewards.py")}:share_of_even_tokens_and_chance"',
        f'rollout.servers=["{server}"]',
        f"train.outer_steps={OUTER_STEPS}",
        "train.overwrite=false",
        "train.prompts_per_step=4",
        "train.minibatches=2",
        "train.checkpoint_every=2",
        "optimizer.schedule=linear",
        "eval.prompts=16",
        "eval.every=2",
    ]

    def make(*more: str, run_dir: Path | None = None) -> list[str]:
        directory = run_dir or tmp_path_factory.mktemp("resume") / "run"
        return [*shared, f'train.run_dir="{directory}"', *more]

    return make


def configure(settings: list[str], *more: str) -> RunConfig:
    return load(QUICKSTART / "gspo.toml", [*settings, *more])


@pytest.fixture(scope="module")
def undisturbed(ranks: RankPool, settings: MakeSettings) -> RunConfig:
    """A run of all outer steps."""
    config = configure(settings())
    ranks.run(2, train, config)
    return config


@pytest.fixture
def halfway(undisturbed: RunConfig, tmp_path: Path) -> Path:
    """The undisturbed run as a kill had left it that struck when the checkpoint of outer step 6 had its name and
    ``latest`` still named the one before; and the newer one is no good."""
    run = Path(shutil.copytree(undisturbed.train.run_dir, tmp_path / "run"))
    (run / "checkpoints" / "outer_00006" / "checkpoint.json").write_text("{}")
    shutil.rmtree(run / "hf")
    (run / "checkpoints" / "latest").write_text("outer_00004\n")
    (run / "manifest.json").write_text(json.dumps(manifest_of(run) | {"status": "running"}))
    return run


def manifest_of(run: Path) -> dict[str, Any]:
    return json.loads((run / "manifest.json").read_text())


def exact(record: dict[str, Any]) -> dict[str, Any]:
    """Without clocks, servers that come and go, and what the engine's own logprobs enter: what else is in a batch
    changes their last digits, and which requests meet in one is a matter of time."""
    inexact = ("time/", "servers/", "tokens_per_s", "kl/engine_", "rollout_logprobs")
    return {name: value for name, value in record.items() if not name.startswith(inexact)}


def assert_same_run(resumed: RunConfig, undisturbed: RunConfig) -> None:
    ours, theirs = responses_of(resumed), responses_of(undisturbed)
    assert [record["response"] for record in ours] == [record["response"] for record in theirs]
    assert list(map(exact, ours)) == list(map(exact, theirs))
    lines, references = metrics_of(resumed), metrics_of(undisturbed)
    assert list(map(exact, lines)) == list(map(exact, references))
    for line, reference in zip(lines, references, strict=True):
        assert line.get("kl/engine_k3", 0) == pytest.approx(reference.get("kl/engine_k3", 0), abs=1e-9)
    weights, expected = weights_of(resumed), weights_of(undisturbed)
    assert weights.keys() == expected.keys()
    assert all(torch.equal(weights[name], expected[name]) for name in weights)
    assert shards_of(resumed) == shards_of(undisturbed)  # optimizer state and all


def shards_of(config: RunConfig) -> dict[str, str]:
    """Hashes of the last checkpoint's tensors."""
    last = Path(config.train.run_dir) / "checkpoints" / f"outer_{config.train.outer_steps:05d}"
    header = checkpoint_files.read_header(last)
    return {entry["name"]: entry["sha256"] for entry in header["files"] if entry["name"].endswith(".distcp")}


# ------------------------------------------------------------------------------------------- killed, as processes


def start(settings: list[str], config: Path = QUICKSTART / "gspo.toml") -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "megatron_gspo.cli", "train", str(config), *settings]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    return subprocess.Popen(command, stderr=subprocess.PIPE, text=True, cwd=ROOT, env=environment)


def wait_until(condition: Callable[[], bool], process: subprocess.Popen[str], timeout: float = 300.0) -> None:
    deadline = time.monotonic() + timeout
    while not condition():
        assert process.poll() is None, process.communicate()[1]
        assert time.monotonic() < deadline
        time.sleep(0.01)


def alive(pid: int) -> bool:
    try:
        return "State:\tZ" not in Path(f"/proc/{pid}/status").read_text()
    except OSError:
        return False


def ranks_of(launcher: int) -> list[int]:
    children = map(int, Path(f"/proc/{launcher}/task/{launcher}/children").read_text().split())
    return [child for child in children if "megatron_gspo.cli" in Path(f"/proc/{child}/cmdline").read_text()]


def test_a_run_killed_at_a_random_moment_and_resumed_is_the_undisturbed_run_bit_for_bit(
    settings: MakeSettings, undisturbed: RunConfig, tmp_path: Path
) -> None:
    """The launcher alone is killed; its ranks go with it. Then the same command runs again, unchanged."""
    run = tmp_path / "run"
    command = settings("train.resume=true", run_dir=run)
    draw = random.Random(SEED_OF_THE_KILL)
    after, more_s = draw.randrange(1, OUTER_STEPS - 1), draw.uniform(0.0, 0.7)
    print(f"killed {more_s:.2f} s after the metrics of outer step {after}")
    process = start(command)
    written = run / "rollouts" / f"outer_{after:05d}.jsonl"
    wait_until(written.exists, process)
    time.sleep(more_s)
    ranks = ranks_of(process.pid)
    assert len(ranks) == 2
    process.kill()
    process.communicate()
    wait_until(lambda: not any(map(alive, ranks)), mock.Mock(poll=lambda: None), timeout=60)
    config = configure(command)
    assert summarise(run)["status"] == "killed"
    resumed = start(command)
    _, said = resumed.communicate(timeout=300)
    assert resumed.returncode == 0, said
    assert_same_run(config, undisturbed)
    starts = manifest_of(run)["starts"]
    assert [s["status"] for s in starts] == ["killed", "finished"]
    assert "resumed 1x" not in said and f"continues from outer_{starts[1]['outer_step']:05d}" in said


def test_sigterm_saves_after_the_outer_step_and_ends_with_a_status_of_its_own(
    ranks: RankPool, settings: MakeSettings, undisturbed: RunConfig, tmp_path: Path
) -> None:
    """As a scheduler that preempts does it; the signal goes to the launcher and to the ranks, as Slurm's would."""
    run = tmp_path / "run"
    command = settings("train.checkpoint_every=0", run_dir=run)
    process = start(command)
    wait_until((run / "rollouts" / "outer_00000.jsonl").exists, process)
    for pid in (*ranks_of(process.pid), process.pid):
        os.kill(pid, signal.SIGTERM)
    _, said = process.communicate(timeout=300)
    assert process.returncode == STOPPED == 75, said
    assert "error" not in said
    done = int((run / "checkpoints" / "latest").read_text().strip().removeprefix("outer_"))
    assert 1 <= done < OUTER_STEPS
    assert f"stopped by SIGTERM after outer step {done} of {OUTER_STEPS}, which is saved" in said
    assert manifest_of(run)["status"] == summarise(run)["status"] == "stopped"
    config = configure(command, "train.resume=true", "train.checkpoint_every=2")
    ranks.run(2, train, config)
    assert_same_run(config, undisturbed)
    second = manifest_of(run)["starts"][1]
    assert second["outer_step"] == done
    assert second["changes"] == {"train.checkpoint_every": [0, 2]}


# ----------------------------------------------------------------------------------- what a resumed run starts from


def events_of(path: Path) -> list[Any]:
    from tensorboard.backend.event_processing.event_file_loader import RawEventFileLoader
    from tensorboard.compat.proto.event_pb2 import Event

    return [Event.FromString(record) for record in RawEventFileLoader(str(path)).Load()]


def is_loss(event: Any) -> bool:
    return any(value.tag == "loss" for value in event.summary.value)


def test_what_was_written_after_the_checkpoint_is_written_anew(
    ranks: RankPool, settings: MakeSettings, undisturbed: RunConfig, halfway: Path
) -> None:
    """Metrics, rollouts and TensorBoard of steps that no checkpoint has must not be there twice."""
    later = json.dumps({"step": 11, "outer_step": 5, "minibatch": 1, "reward/mean": 99.0}) + "\n"
    metrics = halfway / "metrics.jsonl"
    metrics.write_text(metrics.read_text() + later + '{"step": 12, "ou')
    (halfway / "rollouts" / "outer_00007.jsonl").write_text("{}\n")
    (halfway / "checkpoints" / "outer_00006.unfinished").mkdir()
    config = configure(settings("train.resume=true", run_dir=halfway))
    ranks.run(2, train, config)
    assert_same_run(config, undisturbed)
    steps = [line["step"] for line in metrics_of(config)]
    assert steps == [-1, *range(2 * OUTER_STEPS)]
    assert sorted(path.name for path in (halfway / "checkpoints").iterdir()) == ["latest", "outer_00004", "outer_00006"]
    written = [event for path in sorted((halfway / "tensorboard").iterdir()) for event in events_of(path)]
    (restart,) = [index for index, event in enumerate(written) if event.HasField("session_log")]
    before, after = (
        [event.step for event in part if is_loss(event)] for part in (written[:restart], written[restart:])
    )
    assert written[restart].step == 8, "from where TensorBoard forgets what it has read"
    assert (before, after) == (list(range(12)), list(range(8, 12)))


def test_a_checkpoint_of_tensor_and_expert_ranks_goes_on_at_pipeline_stages_with_the_same_next_step(
    ranks: RankPool, settings: MakeSettings, undisturbed: RunConfig, halfway: Path
) -> None:
    layout = ["parallel.tensor=1", "parallel.expert=1", "parallel.pipeline=2", "train.checkpoint_async=true"]
    config = configure(settings("train.resume=true", *layout, run_dir=halfway))
    assert (undisturbed.parallel.tensor, undisturbed.parallel.expert) == (2, 2)
    ranks.run(2, train, config)
    ours, theirs = ([line for line in metrics_of(c) if line["outer_step"] == 4] for c in (config, undisturbed))
    assert len(ours) == 2
    for line, reference in zip(ours, theirs, strict=True):
        assert line["lr"] == reference["lr"]
        for metric in ("reward/mean", "loss", "grad_norm", "entropy", "length/mean"):
            assert line[metric] == pytest.approx(reference[metric], rel=2e-4, abs=1e-7), metric
    changes = manifest_of(halfway)["starts"][1]["changes"]
    assert changes["parallel.pipeline"] == [1, 2] and changes["train.checkpoint_async"] == [False, True]


def test_fine_tuning_resumes_bit_for_bit(ranks: RankPool, quickstart: Path, tmp_path: Path) -> None:
    shared = [f'model.path="{quickstart}/model"', f'data.path="{quickstart}/sft.jsonl"', "train.prompts_per_step=40"]
    shared += ["train.outer_steps=6", "train.checkpoint_every=3", "optimizer.warmup_steps=2"]
    whole = load(QUICKSTART / "sft.toml", [*shared, f'train.run_dir="{tmp_path}/whole"'])
    ranks.run(2, train, whole)
    run = Path(shutil.copytree(tmp_path / "whole", tmp_path / "run"))
    shutil.rmtree(run / "checkpoints" / "outer_00006")
    (run / "checkpoints" / "latest").write_text("outer_00003\n")
    more = ["train.overwrite=false", "train.resume=true", f'train.run_dir="{run}"']
    resumed = load(QUICKSTART / "sft.toml", [*shared, *more])
    ranks.run(2, train, resumed)
    assert_same_run(resumed, whole)
    assert [line["step"] for line in metrics_of(resumed)] == list(range(6))


def test_resume_starts_afresh_where_there_is_no_checkpoint(ranks: RankPool, quickstart: Path, tmp_path: Path) -> None:
    shared = [f'model.path="{quickstart}/model"', f'data.path="{quickstart}/sft.jsonl"', "train.prompts_per_step=4"]
    more = ["train.outer_steps=1", "optimizer.warmup_steps=0", "train.overwrite=false", "train.resume=true"]
    config = load(QUICKSTART / "sft.toml", [*shared, *more, f'train.run_dir="{tmp_path}/run"'])
    ranks.run(2, train, config)  # there is no directory
    first = metrics_of(config)
    shutil.rmtree(tmp_path / "run" / "checkpoints")
    (tmp_path / "run" / "checkpoints").mkdir()
    ranks.run(2, train, config)  # killed before its first checkpoint
    assert [line["loss"] for line in metrics_of(config)] == [line["loss"] for line in first]
    assert len(manifest_of(tmp_path / "run")["starts"]) == 1


def test_another_experiment_and_a_damaged_checkpoint_are_refused_in_one_line(
    ranks: RankPool, settings: MakeSettings, halfway: Path
) -> None:
    before = (halfway / "metrics.jsonl").read_text()
    config = configure(settings("train.resume=true", "train.seed=1", run_dir=halfway))
    with pytest.raises(RankError, match=r"train\.seed was 0 and is 1.*train\.resume_changes = \[\"train\.seed\"\]"):
        ranks.run(2, train, config)
    assert (halfway / "metrics.jsonl").read_text() == before
    (halfway / "checkpoints" / "outer_00004" / "__1_0.distcp").unlink()
    config = configure(settings("train.resume=true", run_dir=halfway))
    with pytest.raises(RankError, match=r"outer_00004: the checkpoint is damaged: __1_0.distcp: it is missing"):
        ranks.run(2, train, config)
