"""A rank that does not come is named with what it was last doing, and the others do not wait for ever."""

from __future__ import annotations

import contextlib
import os
import re
import signal
import time
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from unittest import mock

import pytest
import torch.distributed as dist

from megatron_gspo.errors import RankMissingError
from megatron_gspo.parallel import watchdog
from megatron_gspo.parallel.exchange import gather_objects
from megatron_gspo.parallel.watchdog import Watchdog
from tests.pool import RankError, RankPool

TIMEOUT_S = 4.0


def guarded(directory: Path, phase: str) -> Watchdog:
    """What it says goes into files; what ends the process is written, too."""
    rank = dist.get_rank()
    os.fsync = lambda descriptor: None  # to a disk that is busy a beat would take seconds; a rank ends with its call

    def write(name: str) -> Callable[[str], object]:
        return lambda line: (directory / f"{name}-{rank}").write_text(line)

    return Watchdog(
        directory / "ranks",
        rank,
        dist.get_world_size(),
        TIMEOUT_S,
        give_up=write("given-up"),
        end=lambda line: ((directory / f"ended-{rank}").write_text(line), os._exit(7)),
        warn=write("warned"),
        phase=lambda: phase,
        grace_s=1.0,
    )


def lines(directory: Path, name: str) -> list[str]:
    return [path.read_text() for path in sorted(directory.glob(f"{name}-*"))]


def waits_for_a_stopped_rank(directory: Path, stopped: int, elsewhere: bool) -> str:
    world = dist.new_group(backend="gloo", timeout=timedelta(days=7))
    gather_objects(0, world)
    host = mock.patch.object(watchdog.socket, "gethostname", return_value=f"host-{dist.get_rank()}")
    with host if elsewhere else contextlib.nullcontext():
        begin = time.monotonic()
        try:
            with guarded(directory, f"phase of rank {dist.get_rank()}") as dog, dog.blamed():
                if dist.get_rank() == stopped:
                    time.sleep(0.5)
                    os.kill(os.getpid(), signal.SIGSTOP)
                gather_objects(0, world)
        except (RankMissingError, RuntimeError) as error:
            (directory / f"raised-{dist.get_rank()}").write_text(f"{type(error).__name__} {time.monotonic() - begin}")
    time.sleep(30)  # others would lose their connections to this one
    return ""


@pytest.mark.parametrize("stopped", [0, 2])
def test_a_stopped_rank_is_named_and_killed_within_the_timeout(ranks: RankPool, tmp_path: Path, stopped: int) -> None:
    with pytest.raises(RankError, match=f"rank {stopped}: the process died"):
        ranks.run(3, waits_for_a_stopped_rank, tmp_path, stopped, False)
    said = lines(tmp_path, "given-up")
    assert said
    for line in said:
        assert f"missing: rank {stopped} (host " in line and f"phase: phase of rank {stopped};" in line
        assert "in all_gather_object" in line and "waits_for_a_stopped_rank" not in line, "functions of the package"
        assert line.count("host ") == 1, "nobody else is missing"
    assert lines(tmp_path, "ended") == []


def test_a_rank_of_a_machine_that_is_gone_cannot_be_killed_and_the_others_end(ranks: RankPool, tmp_path: Path) -> None:
    with pytest.raises(RankError, match="rank 0: the process died"):
        ranks.run(2, waits_for_a_stopped_rank, tmp_path, 1, True)
    (line,) = lines(tmp_path, "ended")
    assert "missing: rank 1 (host host-1," in line


def wait_in_different_groups(directory: Path) -> None:
    one, other = (dist.new_group(backend="gloo", timeout=timedelta(days=7)) for _ in range(2))
    with guarded(directory, "training"):
        gather_objects(0, one if dist.get_rank() else other)


def test_ranks_that_wait_for_different_things_are_a_deadlock(ranks: RankPool, tmp_path: Path) -> None:
    with pytest.raises(RankError, match="the process died"):
        ranks.run(2, wait_in_different_groups, tmp_path)
    line = lines(tmp_path, "ended")[0]
    assert "no rank is missing, and they do not wait for the same thing" in line
    assert line.count("waiting in all_gather_object, in parallel/exchange.py:") == 2


def one_computes_for_long(directory: Path) -> int:
    with guarded(directory, "rewards" if dist.get_rank() else "waiting"):
        deadline = time.monotonic() + 60
        while dist.get_rank() == 1 and not lines(directory, "warned") and time.monotonic() < deadline:
            time.sleep(0.05)
        return sum(gather_objects(1, dist.group.WORLD))


def test_a_rank_that_lives_is_waited_for_with_a_warning(ranks: RankPool, tmp_path: Path) -> None:
    assert ranks.run(2, one_computes_for_long, tmp_path) == [2, 2]
    (line,) = lines(tmp_path, "warned")
    assert re.match(r"the others have waited for \d+ s for rank 1 \(host ", line) and "phase: rewards;" in line
    assert lines(tmp_path, "given-up") == []


def suspended(directory: Path) -> int:
    """All ranks are stopped for longer than the timeout, as a suspended machine has it, and go on."""
    world = dist.new_group(backend="gloo", timeout=timedelta(days=7))
    with guarded(directory, "training"):
        gather_objects(0, world)
        if dist.get_rank() == 0:
            pids = gather_objects(os.getpid(), world)
            script = f"import os, time\ntime.sleep({1.3 * TIMEOUT_S})\n[os.kill(pid, 18) for pid in {pids}]"
            os.spawnlp(os.P_NOWAIT, "python3", "python3", "-c", script)
            for pid in reversed(pids):
                os.kill(pid, signal.SIGSTOP)
        else:
            gather_objects(os.getpid(), world)
        return sum(gather_objects(1, world))


def test_a_machine_that_was_suspended_goes_on(ranks: RankPool, tmp_path: Path) -> None:
    assert ranks.run(2, suspended, tmp_path) == [2, 2]
    assert lines(tmp_path, "given-up") == []


def test_a_rank_whose_block_has_ended_while_it_looked_misses_nobody(tmp_path: Path) -> None:
    """Its looks follow each other at once then: those who live would be silent, and be killed."""
    one, other = (Watchdog(tmp_path, rank, 2, TIMEOUT_S, print, print, print) for rank in range(2))
    one._beat(0.1)
    other._beat(0.1)
    assert [beat.rank for beat in one._missing()] == [1]
    one._stop.set()
    assert one._missing() == []


def test_a_rank_that_goes_on_meanwhile_says_nothing_of_the_one_that_was_missing(tmp_path: Path) -> None:
    """Another one has found it, said so and killed it, which has ended what both waited in."""
    said: list[str] = []
    dog = Watchdog(tmp_path, 0, 2, TIMEOUT_S, said.append, said.append, said.append)
    dog._still_s = 0.0
    dog._give_up([watchdog.Beat(1)])
    assert said == []


def test_a_beat_is_overwritten_in_place_and_has_one_size(tmp_path: Path) -> None:
    dog = Watchdog(tmp_path / "ranks", 3, 4, TIMEOUT_S, print, print, print, phase=lambda: "x" * 5000)
    (tmp_path / "ranks").mkdir()
    for count in (1, 2):
        dog._beat(0.1)
        beat = dog._read(3)
        assert beat is not None and beat.count == count and beat.pid == os.getpid()
    (path,) = (tmp_path / "ranks").iterdir()
    assert path.name == "00003.json" and path.stat().st_size == watchdog.BEAT_BYTES
