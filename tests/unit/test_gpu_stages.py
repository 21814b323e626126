"""The program of stages for a lent GPU is whole, and rehearses on a CPU."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.gpu.stages import FULL, STAGES, operations

ROOT = Path(__file__).parents[2]
LEASE = ROOT / "tests/gpu/lease.sh"


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
    done = lease("--rehearse", "imports", OUT=str(tmp_path), LIMIT="10")
    assert done.returncode == 1
    assert re.fullmatch(r"imports: not begun at \d s: it may take 90, and the limit is 10\n", done.stdout)


def test_operations_of_a_forward_pass_are_counted():
    """Qwen3-30B-A3B has 3.3 G active parameters in 48 layers; four layers and the head are 0.54 G, two operations
    each, and attention's scores come on top."""
    assert 2 * 0.5e9 < operations(FULL) / FULL.tokens < 2 * 0.6e9


@pytest.mark.slow_suite
@pytest.mark.parametrize("stage", ["imports", "noise", "resume", "layers"])
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
