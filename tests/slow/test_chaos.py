"""Three faults on one run, which then is the undisturbed run bit for bit. ``make chaos`` has a hundred."""

from __future__ import annotations

from collections import deque
from pathlib import Path

import pytest

from tests.chaos.engine import draw as tokens_of
from tests.chaos.faults import KINDS, MOMENTS, Fault, draw
from tests.chaos.harness import Disturbed, leftovers, results, settings
from tests.chaos.servers import StandIns

pytestmark = pytest.mark.timeout(400)
FAULTS = (
    Fault(1, "kill a rank", "checkpoint", 0.0, 1),
    Fault(2, "kill a server", "sync", 0.05, 0),
    Fault(3, "kill the launcher", "rollout", 0.1, 0),
)


def test_a_run_that_three_faults_have_struck_is_the_undisturbed_one_bit_for_bit(
    quickstart: Path, tmp_path: Path
) -> None:
    servers = StandIns(quickstart / "model", 2)
    found = {}
    with servers.running():
        for name, faults in (("undisturbed", deque[Fault]()), ("struck", deque(FAULTS))):
            place = tmp_path / name / "disk"
            place.mkdir(parents=True)
            run = Disturbed(place, settings(place, quickstart, servers.urls, "disk"), servers, print)
            outcome = run.finish(faults)
            found[name] = results(place / "run", real=False)
            assert outcome.statuses[-1] == 0 and not faults
            assert leftovers(place) == []
    assert outcome.struck == list(FAULTS)
    assert found["struck"] == found["undisturbed"]
    assert any(name.endswith(".safetensors") for name in found["struck"])
    assert len(found["struck"]["metrics.jsonl"]) == 8, "2 optimizer steps of each of 4 outer steps"


def test_other_weights_give_other_responses() -> None:
    """Else a rollout with wrong weights would not be noticed."""
    parameters = {"max_new_tokens": 16, "stop_token_ids": [], "sampling_seed": 5}
    assert tokens_of("a", [1, 2], parameters) == tokens_of("a", [1, 2], parameters)
    others = (("b", [1, 2], parameters), ("a", [2, 1], parameters), ("a", [1, 2], {**parameters, "sampling_seed": 6}))
    assert all(tokens_of(*other) != tokens_of("a", [1, 2], parameters) for other in others)


def test_a_seed_draws_one_list_with_every_fault_at_every_moment() -> None:
    faults = draw(17, 100)
    assert faults == draw(17, 100) != draw(18, 100)
    assert faults[:30] == draw(17, 30), "a list can be done in pieces"
    assert {fault.kind for fault in faults} == set(KINDS) and {fault.moment for fault in faults} == set(MOMENTS)
    assert all(fault.kind != "fill the disk" for fault in draw(17, 100, without=frozenset({"fill the disk"})))
