"""math-verify in its own processes: it judges, it can be stopped, and nothing of it is left behind."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import psutil
import pytest

from megatron_gspo.config import RewardConfig
from megatron_gspo.rewards import resolve_reward, score_groups, verifier
from megatron_gspo.rewards.verifier import StoppedError, Verifier, shared_verifier
from megatron_gspo.types import Prompt, Rollout

FOR_EVER = "9^{9^{9^{9}}}"
"""sympy multiplies until the memory is full."""


def workers(of: int | None = None) -> list[psutil.Process]:
    found = []
    for child in psutil.Process(of).children(recursive=True):
        with contextlib.suppress(psutil.Error):  # it has ended
            found += [child] * any("verify_worker" in part for part in child.cmdline())
    return found


@pytest.fixture
def own() -> Iterator[Verifier]:
    own = Verifier(limit_s=1.5, processes=2)
    yield own
    own.close()


def test_an_expression_that_takes_too_long_is_stopped_and_the_next_one_is_judged(own: Verifier) -> None:
    others = set(workers())
    assert own.equal("(42)", r"\sqrt{(1764)}")
    assert not own.equal("(43)", r"\sqrt{(1764)}")
    (first,) = set(workers()) - others  # one process for both
    with pytest.raises(StoppedError):
        own.equal("(42)", FOR_EVER)
    assert not first.is_running()
    with ThreadPoolExecutor(8) as threads:
        judged = list(threads.map(lambda n: own.equal(f"({n})", rf"\sqrt{{({n * n + n % 2})}}"), range(2, 26)))
    assert judged == [n % 2 == 0 for n in range(2, 26)]
    assert len(set(workers()) - others) <= 2
    own.close()
    assert not set(workers()) - others


TRAINER = r"""
import importlib.util, sys, threading, time
spec = importlib.util.spec_from_file_location("verifier", sys.argv[1])  # without torch
verifier = importlib.util.module_from_spec(spec)
spec.loader.exec_module(verifier)
own = verifier.Verifier(limit_s=2.0, processes=2)
started = [threading.Thread(target=own.equal, args=("(2)", f"\\sqrt{{({n})}}")) for n in (4, 5)]
for thread in started:
    thread.start()
for thread in started:
    thread.join()
threading.Thread(target=own.equal, args=("(2)", sys.argv[2]), daemon=True).start()
time.sleep(0.1)
print(*(process.pid for process in own._all), flush=True)
time.sleep(60)
"""
"""One process of math-verify is busy and one is idle when it is killed."""


def test_no_process_outlives_a_killed_trainer() -> None:
    command = [sys.executable, "-c", TRAINER, verifier.__file__, FOR_EVER]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as trainer:
        assert trainer.stdout is not None
        pids = [int(pid) for pid in trainer.stdout.readline().split()]
        assert len(pids) == 2
        trainer.send_signal(signal.SIGKILL)
    deadline = time.monotonic() + 120  # the busy one has processor time left, on a machine that may be busy too
    while any(psutil.pid_exists(pid) for pid in pids) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not [pid for pid in pids if psutil.pid_exists(pid)]


def test_a_stopped_grading_is_0_is_counted_and_does_not_end_the_scoring(monkeypatch: pytest.MonkeyPatch) -> None:
    own = Verifier(limit_s=0.02)
    monkeypatch.setattr(verifier, "_shared", {os.getpid(): own})
    prompt = Prompt("p", "?", (1,), "42")
    texts = [
        "#### 42",
        r"\boxed{\sqrt{7}\cdot\sqrt{252}}",
        "#### 43",
        r"\boxed{\sqrt{2}\cdot\sqrt{3}}",
    ]  # the last is far off
    group = [
        Rollout(prompt, i, np.ones(1, np.int32), np.zeros(1, np.float32), "stop", (0,), text)
        for i, text in enumerate(texts)
    ]
    reward = resolve_reward(RewardConfig(function="gsm8k", options={"format_reward": 0.1}))
    (scored,) = asyncio.run(score_groups(reward, [group]))
    own.close()
    assert scored.rewards_G.tolist() == [1, 0, 0.1, 0]
    assert scored.stopped == 1


def test_a_math_verify_that_cannot_be_imported_is_an_error_that_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, own: Verifier
) -> None:
    (tmp_path / "math_verify.py").write_text("raise ImportError('no parser')")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    with pytest.raises(RuntimeError, match="math-verify's process ended with status 1: ImportError: no parser"):
        own.equal("(2)", r"\sqrt{(4)}")


def test_a_process_shares_one_verifier() -> None:
    assert shared_verifier() is shared_verifier()
    pid = os.fork()
    if not pid:
        os._exit(int(shared_verifier() in verifier._shared.values() and len(verifier._shared) == 1) + 40)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 41
