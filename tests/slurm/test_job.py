"""The job script on a real Slurm: two nodes, a time limit, a requeue, and the numbers of a run that nobody stopped."""

from __future__ import annotations

import re
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from megatron_gspo.config import load
from tests.cluster.runs import of_stand_ins, settings_of, undisturbed_with_stand_in
from tests.cluster.stand_in_server import DELAY_S, python_of_stand_ins
from tests.pool import RankPool
from tests.slurm.actor import PLACE
from tests.slurm.machine import Slurm, slurm, why_not
from tests.training.conftest import QUICKSTART, ROOT
from tests.training.test_resume import assert_same_run, manifest_of

pytestmark = [pytest.mark.slurm_suite, pytest.mark.timeout(1800)]
SCRIPT = ROOT / "examples" / "qwen3_30b_a3b" / "train.slurm"
OUTER_STEPS, STEP_S = 24, 0.5
"""32 responses a step, of which a server draws 8 one after the other: four seconds at least."""
MINUTES, BEFORE_S = 2, 30
"""Of the time limit, and when the signal comes before it: up to a minute earlier, says Slurm."""


@pytest.fixture(scope="module")
def cluster() -> Iterator[Slurm]:
    if reason := why_not():
        pytest.skip(reason)
    with slurm() as made:
        yield made


def test_a_job_that_hits_its_time_limit_is_queued_again_and_finishes_as_one_that_was_not_stopped(
    ranks: RankPool, cluster: Slurm, quickstart: Path, tmp_path: Path
) -> None:
    """Ranks and a server on each of two nodes."""
    shared = [*settings_of(quickstart), *of_stand_ins(tmp_path)]
    shared += [f"train.outer_steps={OUTER_STEPS}", "train.checkpoint_every=0"]
    whole = undisturbed_with_stand_in(ranks, shared, tmp_path / "whole", quickstart / "model")
    run, log = tmp_path / "run", tmp_path / "job.log"
    python = python_of_stand_ins(tmp_path, ROOT)
    settings = [*shared, f'train.run_dir="{run}"', "rollout.local_servers=1", f'rollout.server_python="{python}"']
    options = ["--nodes=2", f"--time={MINUTES}", f"--signal=B:USR1@{BEFORE_S}", f"--output={log}", f"--chdir={ROOT}"]
    variables = {"SERVERS": "each", "NPROC_PER_NODE": "1", "PYTHON": sys.executable, "PYTHONPATH": str(ROOT)}
    variables |= {"SERVERS_FROM": str(tmp_path / "servers"), "GLOO_SOCKET_IFNAME": "lo", DELAY_S: str(STEP_S)}
    begin = time.monotonic()
    command = ["sbatch", "--parsable", *options, str(SCRIPT), str(QUICKSTART / "gspo.toml"), *settings]
    job = cluster.run(*command, **variables).strip()
    state = wait_for(cluster, job, begin)
    said = log.read_text()
    print(said)
    assert state["JobState"] == "COMPLETED", said
    restarts = int(state["Restarts"])  # more than one where the machine is slow
    assert restarts >= 1, said
    assert "told to stop" in said and "stopped by SIGUSR1 after outer step" in said and "queued again" in said
    starts = manifest_of(run)["starts"]
    assert [start["status"] for start in starts] == ["stopped"] * restarts + ["finished"]
    assert 0 < starts[1]["outer_step"] < OUTER_STEPS
    assert_same_run(load(QUICKSTART / "gspo.toml", [*settings, "train.overwrite=false"]), whole)
    for node in ("n1", "n2"):
        assert "generate" in (tmp_path / "servers" / node / "sglang-0.log").read_text()


def test_the_script_starts_servers_again_and_queues_the_job_again_once_the_last_node_has_saved(
    cluster: Slurm, tmp_path: Path
) -> None:
    """What it starts is played by actors, which compute nothing."""
    python, log = tmp_path / "python", tmp_path / "job.log"
    python.write_text(f'#!/bin/sh\nexec {sys.executable} {Path(__file__).with_name("actor.py")} "$@"\n')
    python.chmod(0o755)
    variables = {"SERVERS": "each", "NPROC_PER_NODE": "1", "PYTHON": str(python), PLACE: str(tmp_path)}
    options = ["--nodes=2", "--time=1", "--signal=B:USR1@20", f"--output={log}", f"--chdir={ROOT}"]
    job = cluster.run("sbatch", "--parsable", *options, str(SCRIPT), "run.toml", "a.b=1", **variables).strip()
    state = wait_for(cluster, job, time.monotonic(), finish=tmp_path / "finish")
    said = log.read_text()
    assert (state["JobState"], state["Restarts"]) == ("COMPLETED", "1"), said
    for node in ("n1", "n2"):
        assert f"{node}: the servers ended with exit status 1, and are started again" in said
    assert said.count("saved\n") == 2 and said.count("told to stop") == 1, said
    assert "the trainers ended with exit status 75" in said and "the trainers ended with exit status 0" in said
    assert len(re.findall(r"train run\.toml a\.b=1 .*server_nodes=2 train\.resume=true", said)) == 4


def wait_for(cluster: Slurm, job: str, begin: float, finish: Path | None = None) -> dict[str, str]:
    """Its last state; says each change. ``finish`` is made when it runs for the second time."""
    known = ""
    while True:
        state = cluster.state_of(job)
        if state["JobState"] != known:
            known = state["JobState"]
            after = time.monotonic() - begin
            print(f"{after:6.1f} s: job {job} is {known} (restarts: {state['Restarts']})", flush=True)
        if finish and (known, state["Restarts"]) == ("RUNNING", "1"):
            finish.touch()
        if known not in ("PENDING", "RUNNING", "COMPLETING", "CONFIGURING", "REQUEUED", "SIGNALING"):
            return state
        time.sleep(1)
