"""``tools/corrections.py --engine``: corrections against a real server of other weights, small enough to list all."""

from __future__ import annotations

import os
import re
import subprocess
import sys

import pytest

from tests.rollout.conftest import require_sglang
from tests.training.conftest import ROOT

pytestmark = [pytest.mark.slow_suite, pytest.mark.timeout(600)]


def test_what_a_real_engine_of_other_weights_draws_is_corrected_exactly_by_the_product_over_a_response() -> None:
    """Four tokens, responses of two: the rule without a bound has the gradient on the policy's own distribution, to
    what float32 leaves of a sum; bounds and single tokens do not, nor does a gradient that is not corrected."""
    require_sglang()
    small = ("--engine", "--vocabulary", "4", "--length", "2", "--noise", "0", "0.2")
    command = [sys.executable, str(ROOT / "tools" / "corrections.py"), *small]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-4000:]
    gaps = re.findall(r"^noise .*: k3 (\S+) nats .* adds up to (\S+); .* at most (\S+) from mu$", done.stdout, re.M)
    assert len(gaps) == 2, done.stdout
    for k3, total, drawn in gaps:
        assert float(total) == pytest.approx(1.0, abs=1e-5)
        assert float(drawn) < 0.05, "what is listed is not what the engine draws from"
        assert float(k3) > 0
    assert float(gaps[1][0]) > 10 * float(gaps[0][0]), "noise on routers makes no gap"
    rows = [line.strip("| ").split(" | ") for line in done.stdout.splitlines() if line.startswith("| ")]
    table = {name: [float(cell) for cell in cells] for name, *cells in rows[1:]}
    near, far = 0, 2  # the columns of bias; a spread is behind each
    assert table["none"][far] > 3 * table["none"][near]
    for column in (near, far):
        assert table["truncate, sequence, no bound"][column] <= 0.001 < table["none"][column]
    assert table["truncate, token, 2"][far] > 0.005
    assert table["truncate, sequence, no bound"][far + 1] != table["none"][far + 1]
