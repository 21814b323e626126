"""``bench sync`` sends a model by every method, in turns with a broadcast, and says a line of each."""

from __future__ import annotations

import json
from contextlib import ExitStack
from typing import Self

import pytest

from megatron_gspo.bench import sync
from megatron_gspo.cli import main
from tests.rollout.standin import stand_ins, state_of

pytestmark = pytest.mark.distributed

SMALL = "--layers 1 --hidden 64 --experts 2 --expert-width 32 --vocab 128 --bucket-mb 1 --repetitions 2"
METHODS = ["disk", "distributed", "ipc"]
"""Those that a stand-in takes: not the one that hands over pickles."""


class StandIns(ExitStack):
    """In the place of SGLang, which takes a minute to start: one that takes weights and computes nothing."""

    key = ""

    def __init__(self, *_: object, **__: object) -> None:
        super().__init__()
        self.received: dict[str, str] = {}

    def __enter__(self) -> Self:
        self.urls = tuple(self.enter_context(stand_ins((1, None))))
        return super().__enter__()

    def __exit__(self, *error: object) -> bool | None:
        (self.received,) = state_of(self.urls[0])["received"]
        return super().__exit__(*error)  # type: ignore[arg-type]


def test_every_method_that_is_named_sends_every_tensor_and_has_a_row(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    started: list[StandIns] = []
    monkeypatch.setattr(sync, "LocalServers", lambda *_, **__: started.append(StandIns()) or started[-1])
    assert main(["bench", "sync", *SMALL.split(), "--json", "--methods", *METHODS]) == 0
    result = json.loads(capsys.readouterr().out)
    assert [row["method"] for row in result["rows"]] == ["broadcast", *METHODS]
    assert all(0 < row["seconds"]["smallest"] <= row["seconds"]["largest"] for row in result["rows"])
    assert all(row["ratio"]["median"] > 0 and row["path"] for row in result["rows"])
    assert result["bytes"] > 1e5
    assert len(started[0].received) == 18 and "lm_head.weight" in started[0].received
