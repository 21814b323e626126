"""Whole comparisons: what a person who starts one, and stops it, may rely on."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any
from unittest import mock

import pytest

from megatron_gspo.cli import main
from megatron_gspo.config import load
from tests.pool import RankPool
from tests.training.conftest import QUICKSTART, ROOT, MakeConfig
from tests.training.test_resume import exact
from tests.training.test_runs import metrics_of, train

STEPS = 3


def start(out: Path, settings: list[str]) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "megatron_gspo.cli", "compare", str(QUICKSTART / "gspo.toml"), "--out", str(out)]
    asked = ["--losses", "grpo,gspo", "--seeds", "1", "--first-seed", "7", "--jobs", "1", "--json"]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    return subprocess.Popen(
        [*command, *asked, *settings],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        cwd=ROOT,
        env=environment,
    )


def wait_for(path: Path, process: subprocess.Popen[str]) -> None:
    deadline = time.monotonic() + 240
    while not path.exists():
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.01)


def lines(run: Path) -> list[dict[str, Any]]:
    return [exact(json.loads(line)) for line in (run / "metrics.jsonl").read_text().splitlines()]


def test_the_command_trains_every_cell_and_draws_its_page_and_again_where_that_is_asked_for(
    overrides: list[str], server: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "comparison"
    own = [text for text in overrides if not text.startswith("train.run_dir")]
    cut = ["parallel.tensor=1", "parallel.expert=1", "train.outer_steps=1", "eval.start=false", "eval.every=0"]
    arms = ["--losses", "gspo", "--replay", "off,r2", "--seeds", "1", "--jobs", "1", "--json", "--out", str(out)]
    words = [str(QUICKSTART / "gspo.toml"), *arms, *own, *cut, f'rollout.servers=["{server}"]']
    with mock.patch.dict(os.environ):
        status = main(["compare", *words])
    said = capsys.readouterr()
    assert status == 0, said.err
    result = json.loads(said.out)
    assert (result["cells"], result["finished"], result["failed"]) == (2, 2, [])
    off, r2 = (lines(out / "cells" / f"gspo-{mode}" / "seed_000") for mode in ("off", "r2"))
    assert off[0]["reward/mean"] == r2[0]["reward/mean"] and len(off) == len(r2) == 2
    page = out / "report.html"
    assert result["report"] == str(page) and page.stat().st_size > 100_000
    page.unlink()
    assert main(["compare", "--redraw", str(out)]) == 0
    assert capsys.readouterr().out == f"{page}\n" and page.stat().st_size > 100_000


def test_a_comparison_that_was_stopped_finishes_the_rest_and_leaves_what_is_finished(
    ranks: RankPool, overrides: list[str], server: str, tmp_path: Path
) -> None:
    out = tmp_path / "comparison"
    own = [text for text in overrides if not text.startswith("train.run_dir")]
    cut = [
        "parallel.tensor=1",
        "parallel.expert=1",
        f"train.outer_steps={STEPS}",
        "eval.greedy=false",
        "optimizer.lr=1e-2",
    ]
    settings = [*own, *cut, f'rollout.servers=["{server}"]']
    grpo, gspo = (out / "cells" / name / "seed_007" for name in ("grpo-off", "gspo-off"))

    stopped = start(out, settings)
    wait_for(gspo / "rollouts" / "outer_00000.jsonl", stopped)
    stopped.send_signal(signal.SIGTERM)
    said, warned = stopped.communicate(timeout=240)
    assert stopped.returncode == 130, warned
    assert "error" not in warned
    assert [cell.with_suffix(".json").exists() for cell in (grpo, gspo)] == [True, False]
    result = json.loads(said)
    assert (result["cells"], result["finished"], result["failed"]) == (2, 1, [])
    finished = {path: path.stat().st_mtime_ns for path in (grpo.with_suffix(".json"), grpo / "metrics.jsonl")}

    again = start(out, settings)
    said, warned = again.communicate(timeout=240)
    assert again.returncode == 0, warned
    assert json.loads(said)["finished"] == 2
    assert {path: path.stat().st_mtime_ns for path in finished} == finished
    starts = json.loads((gspo / "manifest.json").read_text())["starts"]
    assert [s["status"] for s in starts] == ["stopped", "finished"]
    assert (out / "report.html").stat().st_size > 100_000
    assert json.loads((out / "comparison.json").read_text())

    first, second = lines(grpo), lines(gspo)
    assert [(line["outer_step"], line["minibatch"]) for line in first[1:]] == [
        (s, m) for s in range(STEPS) for m in (0, 1)
    ]
    assert first[0] == second[0], "the same cold start, evaluated alike"
    same = ("reward/mean", "entropy", "length/mean")  # and the same responses, until the losses part
    assert [first[1][name] for name in same] == [second[1][name] for name in same]
    assert first[-1]["reward/mean"] != second[-1]["reward/mean"]
    digest = json.loads(gspo.with_suffix(".json").read_text())["cell"]
    assert (digest["arm"], digest["seed"], digest["replay"]) == ("gspo-off", 7, "off")
    assert digest["wall_s"] > 1 and 200 < digest["peak_memory_mb"] < 20_000

    config = load(gspo / "config.toml", [f'train.run_dir="{tmp_path}/alone"', "train.resume=false"])
    ranks.run(1, train, config)
    assert list(map(exact, metrics_of(config))) == second, "a cell is the run that train makes of its configuration"


def test_noise_on_the_servers_routers_makes_a_gap_to_the_engine_and_none_to_the_trainer(
    ranks: RankPool, make_config: MakeConfig
) -> None:
    config = make_config(
        "parallel.tensor=1", "parallel.expert=1", "train.outer_steps=1", "sync.router_noise=0.05", "eval.every=0"
    )
    ranks.run(1, train, config)
    for line in metrics_of(config):
        assert line["kl/engine_k3"] > 1e-6  # 1e-14 without
        assert (line["clip/frac_tokens"] == 0.0 and line["ratio/p01"] == 1.0) or line["minibatch"] > 0
