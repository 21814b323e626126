"""How the ranks of one start find each other in a store that the start before has used."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import pytest
import torch.distributed as dist

from megatron_gspo.parallel.rendezvous import name_this_start


def start(store: dist.Store, world: int) -> list[str]:
    """The names that the ranks of one start come to, each in a thread of its own."""
    with ThreadPoolExecutor(world) as threads:
        return list(threads.map(lambda rank: name_this_start(store, rank, world, 20.0), reversed(range(world))))


def test_the_ranks_of_a_start_agree_on_a_name_that_no_start_before_had() -> None:
    store = dist.HashStore()
    names = [start(store, 4) for _ in range(3)]
    assert [len(set(each)) for each in names] == [1, 1, 1]
    assert len({each[0] for each in names}) == 3


def test_a_rank_that_died_before_it_had_a_name_does_not_stand_in_for_its_successor() -> None:
    store = dist.HashStore()
    store.set("megatron_gspo/starts/hello/1", "of one that is dead")
    with pytest.raises(TimeoutError, match=r"ranks \[1\] of 2 did not come within 0\.2 s"):
        name_this_start(store, 0, 2, 0.2)
    assert len(set(start(store, 2))) == 1


def test_ranks_that_do_not_come_are_named() -> None:
    with pytest.raises(TimeoutError, match=r"ranks \[1, 2\] of 3 did not come"):
        name_this_start(dist.HashStore(), 0, 3, 0.1)
