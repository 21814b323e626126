"""What a user's reward function does to its process is undone, or refused with one line."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from decimal import Decimal
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from megatron_gspo import supervise
from megatron_gspo.config import RewardConfig
from megatron_gspo.errors import ConfigError, RewardError
from megatron_gspo.rewards import Reward, TokenRewards, guard, resolve_reward, score_groups
from megatron_gspo.rewards.guard import Guard
from megatron_gspo.rewards.scoring import _within
from megatron_gspo.types import Prompt, Rollout


def group(*lengths: int) -> list[Rollout]:
    prompt = Prompt("a", "?", (1,), "42")
    return [
        Rollout(prompt, i, np.arange(n, dtype=np.int32), np.zeros(n, np.float32), "stop", (0,), f"text {i}")
        for i, n in enumerate(lengths)
    ]


def score(function: Callable[..., Any], *lengths: int) -> list[float]:
    (found,) = asyncio.run(score_groups(Reward("judge", function), [group(*(lengths or (3,)))]))
    return found.rewards_G.tolist()


class Number:
    def __init__(self, value: Any) -> None:
        self.value = value

    def __float__(self) -> float:
        if isinstance(self.value, Exception):
            raise self.value
        return float(self.value)


class Unprintable:
    def __repr__(self) -> str:
        raise OSError("no")


@pytest.mark.parametrize(
    ("value", "reward"),
    [
        (np.float32(0.5), 0.5),
        (np.bool_(True), 1.0),
        (np.int8(1), 1.0),
        (np.array(0.25), 0.25),
        (True, 1.0),
        (False, 0.0),
        (1, 1.0),
        (Decimal("0.5"), 0.5),
        (Fraction(1, 4), 0.25),
        (torch.tensor(0.5), 0.5),
        (torch.tensor(0.5, dtype=torch.bfloat16), 0.5),
        (torch.tensor(0.5, requires_grad=True) * 1, 0.5),
        (Number(0.75), 0.75),
    ],
)
def test_whatever_is_a_number_is_a_reward(value: Any, reward: float) -> None:
    assert score(lambda prompt, response: value) == [reward]


@pytest.mark.parametrize(
    ("value", "said"),
    [
        (None, "returned None, not a number"),
        ("0.5", "returned '0.5', not a number"),
        (b"0.5", "returned b'0.5', not a number"),
        (np.str_("0.5"), "not a number"),
        (np.bytes_(b"1"), "not a number"),
        (np.datetime64("1970-01-01"), "not a number"),
        (np.timedelta64(1, "s"), "not a number"),
        (0.5 + 0j, "not a number"),
        (np.complex128(0.5), "not a number"),
        (np.ma.masked, "not a number"),
        (torch.tensor([0.5]), "not a number"),
        ({"score": 0.5}, "not a number"),
        ((0.5,), "not a number"),
        ([], "not a number"),
        (lambda: 0.5, "not a number"),
        (10**400, "not a number"),
        (Number(ValueError("no")), "not a number"),
        (Unprintable(), "returned a Unprintable whose repr.. raises OSError, not a number"),
        (Decimal("NaN"), r"returned nan, outside \[0, 1\]"),
        (Decimal("sNaN"), "not a number"),
        (np.float64("nan"), "returned nan, outside"),
        (torch.tensor(float("inf")), "returned inf, outside"),
        (Decimal("1.0000000001"), "outside"),
        (TokenRewards(["1", "0", "1"]), "not a number"),  # type: ignore[arg-type]
        (TokenRewards([None, 1, 1]), "not a number"),  # type: ignore[arg-type, list-item]
        (TokenRewards(np.array([0.5j, 0, 0])), "not a number"),
        (TokenRewards(np.array([0.5, float("nan"), 0])), "returned nan, outside"),
    ],
)
def test_whatever_is_not_a_number_in_range_is_refused_by_its_value(value: Any, said: str) -> None:
    with pytest.raises(RewardError, match=rf"reward 'judge' .*{said}.*prompt 'a', sample 0"):
        score(lambda prompt, response: value)


@pytest.mark.parametrize(
    "raised",
    [
        KeyboardInterrupt(),
        GeneratorExit(),
        StopIteration(1),
        asyncio.CancelledError(),
        SystemExit(0),
        BaseException("x"),
        BaseExceptionGroup("several", [SystemExit(0), KeyboardInterrupt()]),
    ],
    ids=lambda raised: type(raised).__name__,
)
@pytest.mark.parametrize("is_async", [False, True])
def test_what_would_end_a_loop_or_a_process_is_an_error_of_the_reward(raised: BaseException, is_async: bool) -> None:
    def judge(prompt: Prompt, response: Rollout) -> float:
        raise raised

    async def judge_async(prompt: Prompt, response: Rollout) -> float:
        raise raised

    begin = time.monotonic()
    with pytest.raises(RewardError, match=r"reward 'judge' raised RuntimeError: .*prompt 'a', sample 0"):
        score(judge_async if is_async else judge)
    assert time.monotonic() - begin < 30


class Unending(Exception):
    def __str__(self) -> str:
        raise KeyboardInterrupt


def test_an_error_whose_text_would_end_the_process_is_an_error_of_the_reward() -> None:
    def judge(prompt: Prompt, response: Rollout) -> float:
        raise Unending

    with pytest.raises(RewardError, match=r"raised Unending: \(its str\(\) raises KeyboardInterrupt\)"):
        score(judge)


@pytest.mark.timeout(240)
def test_a_loop_that_tries_again_after_whatever_is_raised_is_given_up_in_time() -> None:
    async def judge(prompt: Prompt, response: Rollout) -> float:
        while True:
            with contextlib.suppress(asyncio.CancelledError):
                await asyncio.sleep(600)

    begin = time.monotonic()
    with pytest.raises(RewardError, match=r"'judge' gave no answer within 0\.2 s"):
        asyncio.run(score_groups(Reward("judge", judge, timeout_s=0.2), [group(3, 3)]))
    assert time.monotonic() - begin < 120


def test_what_is_raised_as_a_late_call_is_cancelled_is_not_printed(caplog: pytest.LogCaptureFixture) -> None:
    async def judge() -> float:
        try:
            await asyncio.sleep(600)
        finally:
            raise ValueError("the connection was closed")

    async def late() -> bool:
        try:
            await _within(judge(), 0.05)
        except TimeoutError:
            return True
        return False

    assert asyncio.run(late())
    gc.collect()
    assert "never retrieved" not in caplog.text


def _handle(*_: object) -> None: ...


@pytest.mark.parametrize(
    ("what", "change", "look"),
    [
        ("the umask", lambda: os.umask(0o777), guard._umask),
        ("the timeout of new sockets", lambda: socket.setdefaulttimeout(1e-3), socket.getdefaulttimeout),
        ("the recursion limit", lambda: sys.setrecursionlimit(9_999), sys.getrecursionlimit),
        ("torch's default dtype", lambda: torch.set_default_dtype(torch.float64), torch.get_default_dtype),
        ("torch's number of threads", lambda: torch.set_num_threads(3), torch.get_num_threads),
        (
            "handlers of signals",
            lambda: signal.signal(signal.SIGUSR1, _handle),
            lambda: signal.getsignal(signal.SIGUSR1),
        ),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_what_the_whole_process_has_one_of_is_given_back_and_that_is_said(
    what: str, change: Callable[[], object], look: Callable[[], object], capsys: pytest.CaptureFixture[str]
) -> None:
    async def judge(prompt: Prompt, response: Rollout) -> float:  # on the main thread, where signals can be set
        change()
        return 1.0

    before = look()
    with Guard().around("judge"):
        assert asyncio.run(judge(None, None)) == 1.0  # type: ignore[arg-type]
        assert look() != before
    assert look() == before
    assert capsys.readouterr().err == f"warning: reward 'judge' changed {what}: it is as it was\n"


def test_ctrl_c_in_a_reward_is_not_taken_for_its_doing(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Its handler has itself be ignored from then on, while the run ends."""
    before = signal.getsignal(signal.SIGINT)
    monkeypatch.setattr(supervise, "_interrupted", False)
    monkeypatch.setattr(sys, "unraisablehook", sys.unraisablehook)
    try:
        supervise.interrupt_quietly()
        with pytest.raises(KeyboardInterrupt), Guard().around("judge"):
            signal.raise_signal(signal.SIGINT)
        assert signal.getsignal(signal.SIGINT) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGINT, before)
    assert capsys.readouterr().err == ""


def test_a_system_that_does_not_tell_the_umask_is_no_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "status").write_text("Name:\tpython\nState:\tR (running)\n")
    monkeypatch.setattr(guard, "STATUS", str(tmp_path / "status"))
    assert score(lambda prompt, response: 1.0, 1, 1) == [1, 1]


def test_an_error_that_cannot_be_printed_or_is_endless_is_one_short_line() -> None:
    class Dumb(Exception):
        def __str__(self) -> str:
            raise ValueError

    def judge(prompt: Prompt, response: Rollout) -> float:
        raise Dumb if response.sample == 0 else ValueError("x" * 10**7)

    with pytest.raises(RewardError, match=r"raised Dumb: \(its str\(\) raises ValueError\)"):
        score(judge)
    with pytest.raises(RewardError) as caught:
        score(lambda prompt, response: judge(prompt, group(1, 1)[1]))
    assert len(str(caught.value)) < 2000


def test_the_working_directory_is_given_back_and_that_is_said_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    home, away = tmp_path / "home", tmp_path / "away"
    home.mkdir()
    away.mkdir()
    monkeypatch.chdir(home)

    def judge(prompt: Prompt, response: Rollout) -> float:
        os.chdir(away)
        return 1.0

    for _ in range(2):
        assert score(judge, 1, 1) == [1, 1]
        assert Path.cwd() == home
    said = f"warning: reward 'judge' changed the working directory to {away}: it is {home} again\n"
    assert capsys.readouterr().err == said


def test_a_file_that_changes_the_directory_when_it_is_imported_is_undone_too(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "judge.py").write_text("import os\nos.chdir('/')\ndef judge(prompt, response): return 1.0\n")
    resolve_reward(RewardConfig(function="judge.py:judge"))
    assert Path.cwd() == tmp_path


@pytest.mark.parametrize("left", ["KeyboardInterrupt", "SystemExit(0)", "GeneratorExit", "ValueError"])
def test_a_file_that_raises_anything_when_it_is_imported_is_an_error_of_the_setting(tmp_path: Path, left: str) -> None:
    (tmp_path / "judge.py").write_text(f"raise {left}")
    with pytest.raises(ConfigError, match=rf"reward.function = .*judge.py:judge': {left.partition('(')[0]}"):
        resolve_reward(RewardConfig(function=f"{tmp_path}/judge.py:judge"))


def test_what_a_reward_is_shown_cannot_be_written_into_and_is_trained_on_as_it_was() -> None:
    shown = group(3)

    def judge(prompt: Prompt, response: Rollout) -> float:
        response.response_ids.sort()
        return 1.0

    with pytest.raises(RewardError, match=r"raised ValueError: .*read-only"):
        asyncio.run(score_groups(Reward("judge", judge), [shown]))
    assert shown[0].response_ids.flags.writeable


def test_a_rewards_own_connections_are_its_own() -> None:
    """It opens one in a call, keeps it, and closes it in a later one."""
    kept: list[int] = []

    def judge(prompt: Prompt, response: Rollout) -> float:
        if kept:
            os.close(kept.pop())
            os.close(kept.pop())
        else:
            kept.extend(os.pipe())
        return 1.0

    for _ in range(4):
        assert score(judge) == [1.0]


def test_a_connection_of_the_process_that_a_reward_closes_is_refused_by_its_kind() -> None:
    reading, writing = os.pipe()
    said = rf"'judge' closed descriptors that are not its own \({writing}, pipe\)"
    with pytest.raises(RewardError, match=said), Guard().around("judge"):
        os.close(writing)
    os.close(reading)


# --------------------------------------------------------------------------------------- in a process, as a rank is one

JUDGES = {
    "forks": "def judge(prompt, response):\n    if response.sample == 1: os.fork()\n    return even(response)",
    "forks in a loop": (
        "async def judge(prompt, response):\n    if response.sample == 1: os.fork()\n    return even(response)"
    ),
    "closes all but the standard ones": "def judge(prompt, response):\n    os.closerange(3, 4096)\n    return 1.0",
    "closes standard output": "def judge(prompt, response):\n    os.close(1)\n    return 1.0",
    "closes standard error": "def judge(prompt, response):\n    os.close(2)\n    return 1.0",
    "makes standard output another": "def judge(prompt, response):\n    os.dup2(0, 1)\n    return 1.0",
    "leaves threads": (
        "def judge(prompt, response):\n"
        "    threading.Thread(target=time.sleep, args=(600,), name='watcher', daemon=False).start()\n    return 1.0"
    ),
    "leaves threads in torch": (
        "def work():\n    while True: torch.ones(1000).sum().item()\n"
        "def judge(prompt, response):\n"
        "    for _ in range(4): threading.Thread(target=work, daemon=True).start()\n    return 1.0"
    ),
}
RANKS = """
import asyncio, json, os, sys, threading, time
import numpy as np, torch
from megatron_gspo.rewards import Reward
from megatron_gspo.rewards.scoring import score_now
from megatron_gspo.supervise import supervised
from megatron_gspo.types import Prompt, Rollout

def even(response): return float((response.response_ids % 2 == 0).mean())

def rank(code):
    names = globals()
    def action():
        exec(code, names)
        ids = np.arange(4, dtype=np.int32)
        prompt = Prompt("a", "?", (1,), "42")
        group = [Rollout(prompt, i, ids, ids.astype(np.float32), "stop", (0,), "t") for i in range(3)]
        (found,) = score_now(Reward("judge", names["judge"], timeout_s=60), [group])
        print("scored", found.rewards_G.tolist(), flush=True)
        return 0
    return supervised(action, "rank 0")

def as_process(code, place):
    if (child := os.fork()) == 0:
        for number in (1, 2):
            os.dup2(os.open(f"{place}.{number}", os.O_CREAT | os.O_WRONLY), number)
        os._exit(rank(code))
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])

place, judges = sys.argv[1], json.loads(sys.argv[2])
print(json.dumps({name: as_process(code, f"{place}/{name}") for name, code in judges.items()}))
"""


@pytest.fixture(scope="module")
def endings(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[int, str, str]]:
    """Of each of ``JUDGES``: (exit status, standard output, standard error) of a process that scores three."""
    place = tmp_path_factory.mktemp("ranks")
    command = [sys.executable, "-W", "ignore", "-c", RANKS, str(place), json.dumps(JUDGES)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    texts = {name: [(place / f"{name}.{number}").read_text() for number in (1, 2)] for name in JUDGES}
    return {name: (status, *texts[name]) for name, status in json.loads(done.stdout).items()}  # type: ignore[misc]


@pytest.mark.parametrize("judge", ["forks", "forks in a loop"])
def test_a_forked_child_that_comes_back_is_ended_and_the_run_goes_on(endings: Any, judge: str) -> None:
    """Else two trainers would go on, on the same sockets."""
    said = "warning: reward 'judge' forked a process that returned from it: it was ended there\n"
    assert endings[judge] == (0, "scored [0.5, 0.5, 0.5]\n", said)


@pytest.mark.parametrize("judge", [name for name in JUDGES if "close" in name or "another" in name])
def test_a_reward_that_closes_descriptors_ends_the_rank_with_a_line_that_says_so(endings: Any, judge: str) -> None:
    status, printed, said = endings[judge]
    assert (status, printed) == (1, "")
    (line,) = said.splitlines()
    assert line.startswith("error: reward 'judge' closed descriptors that are not its own (")
    which = {"closes standard error": "(standard error)", "closes all but the standard ones": ", directory"}
    assert which.get(judge, "(standard output)") in line


def test_what_a_reward_leaves_running_does_not_keep_the_process(endings: Any) -> None:
    said = "warning: 3 threads of a reward or a library still run (watcher, watcher, watcher): they end with the run\n"
    assert endings["leaves threads"] == (0, "scored [1.0, 1.0, 1.0]\n", said)


def test_threads_that_still_compute_in_torch_at_the_end_do_not_abort_the_process(endings: Any) -> None:
    """They ask for the interpreter's lock from C++, where a process that takes its interpreter down would abort."""
    assert endings["leaves threads in torch"] == (0, "scored [1.0, 1.0, 1.0]\n", "")


def test_what_a_reward_prints_stays_apart_from_the_result(capfd: pytest.CaptureFixture[str]) -> None:
    from megatron_gspo.quiet import apart_from_stdout

    with apart_from_stdout() as printed:
        print("judge: hello")
        os.write(1, b"from C\n")
        subprocess.run(["echo", "from a program"], check=True)
        noisy = threading.Thread(target=print, args=("from a thread",))
        noisy.start()
        noisy.join()
        print("{}", file=printed, flush=True)
    print("after")
    out, said = capfd.readouterr()
    assert out == "{}\nafter\n"
    assert {"judge: hello", "from C", "from a program", "from a thread"} == set(said.split("\n")) - {""}
