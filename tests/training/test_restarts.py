"""A run whose ranks are killed goes on by itself, and is the undisturbed run to the last bit."""

from __future__ import annotations

import os
import signal
from pathlib import Path

from megatron_gspo.config import load
from tests.pool import RankPool
from tests.training.conftest import QUICKSTART
from tests.training.test_resume import assert_same_run, manifest_of, ranks_of, start, wait_until
from tests.training.test_runs import train

STEPS = 30


def test_a_killed_rank_costs_the_steps_since_the_last_checkpoint_and_no_bit(
    ranks: RankPool, quickstart: Path, tmp_path: Path
) -> None:
    """Fine-tuning needs no server. ``train.overwrite`` is as it stands in the file: a restart must not follow it."""
    shared = [f'model.path="{quickstart}/model"', f'data.path="{quickstart}/sft.jsonl"', "train.prompts_per_step=40"]
    shared += [f"train.outer_steps={STEPS}", "train.checkpoint_every=5", "optimizer.warmup_steps=2"]
    shared += ["parallel.tensor=1", "parallel.expert=1"]
    undisturbed = load(QUICKSTART / "sft.toml", [*shared, f'train.run_dir="{tmp_path}/whole"'])
    ranks.run(1, train, undisturbed)
    run = tmp_path / "run"
    command = [*shared, f'train.run_dir="{run}"', "train.max_restarts=1"]
    process = start(command, QUICKSTART / "sft.toml")
    wait_until((run / "checkpoints" / "latest").exists, process)
    os.kill(ranks_of(process.pid)[0], signal.SIGKILL)
    _, said = process.communicate(timeout=300)
    assert process.returncode == 0, said
    assert "restart 1 of 1: rank 0 was ended by SIGKILL" in said, said
    assert f"goes on from {run}/checkpoints/outer_000" in said
    assert_same_run(load(QUICKSTART / "sft.toml", command), undisturbed)
    assert [s["status"] for s in manifest_of(run)["starts"]][1:] == ["finished"]
