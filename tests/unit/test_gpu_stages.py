"""The program of stages for a lent GPU is whole, and rehearses on a CPU."""

from __future__ import annotations

import inspect
import json
import os
import re
import shutil
import subprocess
import sys
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from tests.gpu import stages
from tests.gpu.stages import FULL, STAGES, operations

ROOT = Path(__file__).parents[2]
LEASE = ROOT / "tests/gpu/lease.sh"
IN_EVERY_RUN = ("imports", "noise", "resume", "layers")
"""Stages that rehearse in seconds, and have no tests of their own in this run."""


def lease(*words: str, **environment: str) -> subprocess.CompletedProcess[str]:
    settings = os.environ | {"PYTHON": sys.executable} | environment
    return subprocess.run(["bash", str(LEASE), *words], capture_output=True, text=True, env=settings, timeout=300)


def test_the_script_knows_every_stage_and_how_long_it_may_take():
    limits = dict(re.findall(r"\[(\w+)\]=(\d+)", LEASE.read_text()))
    assert limits.keys() == STAGES.keys()
    assert max(map(int, limits.values())) < 9 * 60


def test_the_documentation_has_a_row_for_each_stage():
    text = (ROOT / "docs/gpu.md").read_text()
    assert all(f"| `{stage}` |" in text for stage in STAGES)


def test_wheels_are_those_of_the_trainer():
    def pins(path: str) -> set[str]:
        lines = (ROOT / path).read_text().splitlines()
        return {line.split(";")[0].strip() for line in lines if "==" in line and '< "3.12"' not in line}

    assert pins("tests/gpu/wheels.txt") <= pins("requirements/trainer.txt")


def test_a_stage_that_does_not_exist_is_named():
    done = lease("imports", "layerz")
    assert done.returncode == 2
    assert done.stderr.startswith("no stage layerz: ")


def test_a_stage_that_might_not_end_in_time_is_not_begun(tmp_path):
    done = lease("--rehearse", "imports", OUT=str(tmp_path), LIMIT="60")
    assert done.returncode == 1
    assert re.fullmatch(r"imports: not begun at \d+ s: it may take 90, and the limit is 60\n", done.stdout)


def failing_python(directory: Path, words: str) -> str:
    """A Python that says its words and fails, for the environment; what has torch it says of itself."""
    python = directory / "python"
    python.write_text(f'#!/bin/sh\ncase "$*" in *pip*) echo "{words}"; exit 1;; esac\nexec {sys.executable} "$@"\n')
    python.chmod(0o755)
    return str(python)


def packed(directory: Path) -> Path:
    """The script in a checkout of its own, with wheels to install."""
    (directory / "tests" / "gpu").mkdir(parents=True)
    (directory / ".lease" / "wheels").mkdir(parents=True)
    shutil.copy(LEASE, directory / "tests" / "gpu")
    return directory / "tests" / "gpu" / LEASE.name


def test_packages_lie_beside_the_machines_own_and_an_environment_that_fails_says_why(tmp_path):
    """Not in a virtual environment: made by the Python of one, it has the packages of neither."""
    script, out = packed(tmp_path / "checkout"), tmp_path / "out"
    environment = os.environ | {"PYTHON": failing_python(tmp_path, "no such wheel"), "OUT": str(out)}
    done = subprocess.run(["bash", str(script), "imports"], capture_output=True, text=True, env=environment)
    assert done.returncode == 1
    assert re.fullmatch(r"the environment: FAILED at \d+ s, the end of its log:\nno such wheel\n", done.stdout), (
        done.stdout
    )
    assert (out / "stages.log").read_text() == "no such wheel\n"
    assert "-m venv" not in script.read_text() and '--target "$SITE"' in script.read_text()


def test_results_are_few_enough_to_be_brought_back(tmp_path):
    """A machine that is lent brings back eight files."""
    script = LEASE.read_text()
    assert set(re.findall(r'"\$OUT/([^"]+)"', script)) == {"$LOG", "$1.json"}
    assert len(STAGES) + 1 <= 8


def test_a_stage_that_hangs_says_in_which_line(tmp_path):
    script = packed(tmp_path)
    (tmp_path / "tests" / "gpu" / "stages.py").write_text("import time\ndef stuck():\n    time.sleep(60)\nstuck()\n")
    script.write_text(re.sub(r"\[imports\]=\d+", "[imports]=5", script.read_text()))
    environment = os.environ | {"PYTHON": sys.executable, "OUT": str(tmp_path / "out"), "PYTHONPATH": ""}
    done = subprocess.run(
        ["bash", str(script), "--rehearse", "imports"], capture_output=True, text=True, env=environment
    )
    assert done.returncode == 1 and "imports: FAILED" in done.stdout
    assert "line 3 in stuck" in (tmp_path / "out" / "stages.log").read_text()


@pytest.mark.parametrize(("stage", "told"), [("resume", ":4096:8"), ("layers", None)])
def test_cublas_is_told_of_determinism_before_a_stage_that_asks_for_it(tmp_path, monkeypatch, stage, told):
    """It is asked for once, at the first product of a process."""
    asking = {name for name, run in STAGES.items() if "use_deterministic_algorithms" in inspect.getsource(run)}
    assert asking == set(stages.DETERMINISTIC)
    seen = []
    monkeypatch.setitem(
        STAGES, stage, lambda sizes: seen.append(os.environ.get("CUBLAS_WORKSPACE_CONFIG")) or {"seen": True}
    )
    monkeypatch.setattr(stages, "a_world_of_one", nullcontext)
    monkeypatch.setattr("megatron_gspo.quiet.mute", lambda: None)
    monkeypatch.setattr(sys, "argv", ["stages", stage, "--out", str(tmp_path / "out.json")])
    monkeypatch.setitem(os.environ, "CUBLAS_WORKSPACE_CONFIG", "")
    del os.environ["CUBLAS_WORKSPACE_CONFIG"]
    assert stages.main() == 0
    assert seen == [told]


def test_errors_of_products_are_measured_and_seen():
    """On a CPU, of the same code: forward, both gradients, and experts without rows."""
    found = stages.grouped_errors(stages.SMALL)
    bounds = {"grouped_mm torch.float32": 1e-5, "grouped_mm torch.bfloat16": 2e-2}
    assert found.keys() == bounds.keys()
    for name, errors in found.items():
        assert errors.keys() == {"y", "dx", "dW"}
        assert 0 < max(errors.values()) < bounds[name], name
    assert stages.sum_errors(stages.SMALL) == {"repeats bit by bit": True, "within a rounding": True}


@pytest.mark.parametrize("part", [{"last line": "", "failures": ["FAILED one"]}, {"failed": "no such command"}])
def test_a_stage_fails_with_its_tests_and_commands(tmp_path, monkeypatch, part):
    monkeypatch.setitem(STAGES, "step", lambda sizes: {"tests": part})
    monkeypatch.setattr(stages, "a_world_of_one", nullcontext)
    monkeypatch.setattr("megatron_gspo.quiet.mute", lambda: None)
    monkeypatch.setattr(sys, "argv", ["stages", "step", "--out", str(tmp_path / "out.json")])
    assert stages.main() == 1


def test_operations_of_a_forward_pass_are_counted():
    """Qwen3-30B-A3B has 3.3 G active parameters in 48 layers; four layers and the head are 0.54 G, two operations
    each, and attention's scores come on top."""
    assert 2 * 0.5e9 < operations(FULL) / FULL.tokens < 2 * 0.6e9


def test_a_policy_is_let_go_when_its_weights_have_arrived():
    """What a step gathers may still be written into memory that is given back: a process that ends, sometimes."""
    weights, seen = torch.ones(8), []
    gathering = SimpleNamespace(
        param_gather_handle=object(),
        start_param_sync=lambda force_sync: seen.append(weights.untyped_storage().nbytes()),
    )
    buffer = SimpleNamespace(param_data=weights, grad_data=None)
    module = SimpleNamespace(bucket_groups=[gathering], buffers=[buffer], expert_parallel_buffers=[])
    stages.let_go(SimpleNamespace(modules=[module]))
    assert seen == [32] and weights.untyped_storage().nbytes() == 0


def test_commands_go_to_the_command_line():
    said = stages.command("bench", "experts", "--widths", "64", "--dtype", "none", "--json")["failed"]
    assert "--dtype" in said and "No module" not in said


@pytest.mark.parametrize(
    "stage",
    [
        pytest.param(stage, marks=[] if stage in IN_EVERY_RUN else pytest.mark.slow_suite)
        for stage in STAGES
        if stage != "bench"  # which takes minutes of a CPU
    ],
)
def test_a_stage_rehearses_on_a_cpu(tmp_path, stage):
    done = lease("--rehearse", stage, OUT=str(tmp_path), LIMIT="400")
    assert done.returncode == 0, done.stdout
    result = json.loads((tmp_path / f"{stage}.json").read_text())
    assert "raised" not in result
    if stage == "resume":
        assert result["largest difference"] == 0.0
    if stage == "noise":
        assert {
            row["largest difference of a logprob, pass to training"]
            for row in (result["default"], result["deterministic"])
        } == {0.0}
