"""Signals that ask a run to stop are remembered, named, and do no harm when they come again."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from typing import Any

import pytest

from megatron_gspo.runs import stopping
from megatron_gspo.runs.stopping import StopRequest
from megatron_gspo.supervise import STOPS, listen_early

WORLD: Any = None


@pytest.fixture(autouse=True)
def _two_ranks(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The other one is asked nothing; and this process's handlers stay as they are."""
    monkeypatch.setattr(stopping, "gather_objects", lambda value, world: ["", value])
    before = {number: signal.getsignal(number) for number in STOPS}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.mark.parametrize("number", STOPS, ids=lambda number: number.name)
def test_what_one_rank_is_asked_all_ranks_hear_by_name(number: signal.Signals) -> None:
    with StopRequest() as stop:
        assert stop.asked(WORLD) == ""
        os.kill(os.getpid(), number)
        os.kill(os.getpid(), signal.SIGUSR1)  # the first one counts
        assert stop.asked(WORLD) == number.name
    os.kill(os.getpid(), number)  # it has saved: nothing is left to ask


def test_a_sigusr1_while_a_rank_starts_is_not_lost() -> None:
    listen_early()
    os.kill(os.getpid(), signal.SIGUSR1)
    with StopRequest() as stop:
        assert stop.asked(WORLD) == "SIGUSR1"
    listen_early()
    assert StopRequest().asked(WORLD) == ""


def test_a_run_that_was_not_asked_leaves_the_handlers_that_it_found() -> None:
    own = lambda number, frame: None  # noqa: E731
    signal.signal(signal.SIGUSR1, own)
    with StopRequest():
        assert signal.getsignal(signal.SIGUSR1) is not own
    assert signal.getsignal(signal.SIGUSR1) is own
