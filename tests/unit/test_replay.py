"""Which routes each pass of an outer step replays."""

from __future__ import annotations

import pytest
import torch

from megatron_gspo.errors import ReplayError
from megatron_gspo.train.routing import Routing
from megatron_gspo.types import RouteShard


def shard(number: int) -> RouteShard:
    """Told apart by its one expert."""
    return RouteShard((0,), torch.tensor([[[number]]], dtype=torch.uint8), torch.ones(1, dtype=torch.bool))


OLD = [shard(number) for number in range(5)]
ENGINE = [[shard(10), shard(11)], [shard(12)], [shard(13), shard(14)]]
SIZES = [2, 1, 2]


def test_with_replay_off_no_pass_replays_and_each_minibatch_keeps_its_own_live_choices() -> None:
    assert Routing("off", ENGINE).of_old_pass() is None
    routes = Routing("off", ENGINE).of_training(SIZES, OLD)
    assert [part.replayed for part in routes] == [None, None, None]
    assert [part.old for part in routes] == [OLD[:2], OLD[2:3], OLD[3:]]


def test_r2_replays_in_each_minibatch_its_own_choices_of_the_old_pass_which_routes_live() -> None:
    assert Routing("r2").of_old_pass() is None
    assert [part.replayed for part in Routing("r2").of_training(SIZES, OLD)] == [OLD[:2], OLD[2:3], OLD[3:]]


def test_r3_replays_the_engines_routes_in_both_passes_and_keeps_the_live_choices_of_the_old_one() -> None:
    assert Routing("r3", ENGINE).of_old_pass() == [part for parts in ENGINE for part in parts]
    routes = Routing("r3", ENGINE).of_training(SIZES, OLD)
    assert [part.replayed for part in routes] == ENGINE
    assert [part.old for part in routes] == [OLD[:2], OLD[2:3], OLD[3:]]


def test_r3_without_routes_of_the_engine_fails() -> None:
    with pytest.raises(ReplayError, match="this outer step came without routes"):
        Routing("r3").of_old_pass()
