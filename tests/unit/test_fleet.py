"""What becomes of a server that a push has lost, without ranks: the first one's eyes are a stand-in."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Any

import pytest

from megatron_gspo.train import fleet
from megatron_gspo.train.fleet import Fleet, Sight


class Eyes:
    """Sees ``lost`` as gone after a push, and notes who has to show that it generates."""

    def __init__(self, *lost: str) -> None:
        self.lost, self.suspects = lost, list[set[str]]()

    def look(self, version: str, suspects: Collection[str]) -> Sight:
        self.suspects.append(set(suspects))
        return Sight(holding=("http://a", "http://b"))

    def gone(self, urls: Sequence[str]) -> dict[str, str]:
        return {url: "no answer in time" for url in urls if url in self.lost}


@pytest.fixture(autouse=True)
def alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fleet, "together", lambda action, group: action())
    monkeypatch.setattr(fleet, "broadcast_object", lambda value, source, group: value)


def test_a_server_that_was_lost_in_a_push_must_generate_before_it_is_asked_for_anything_again() -> None:
    """Else one that hangs, whose process runs, would be neither started again nor sent anything."""
    world: Any = None
    eyes = Eyes("http://b")
    servers = Fleet(["http://a", "http://b"], world, eyes)
    assert servers.outlives(servers.up) == {"http://b"} and servers.up == ("http://a",)
    servers.survey("v")
    assert eyes.suspects == [{"http://b"}] and servers.up == ("http://a", "http://b")
    servers.survey("v")
    assert eyes.suspects[-1] == set(), "it has shown it"
    assert servers.metrics() == {
        **{f"servers/{name}": 0.0 for name in ("restarted", "moved", "resubmitted")},
        "servers/up": 2.0,
        "servers/lost": 1.0,
        "servers/returned": 1.0,
    }


def test_where_the_loss_of_a_server_ends_the_run_nobody_is_left_out() -> None:
    world: Any = None
    servers = Fleet(["http://a", "http://b"], world, Eyes("http://b"), survives=False)
    assert servers.outlives(servers.up) == frozenset() and servers.up == ("http://a", "http://b")
