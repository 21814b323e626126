"""Weight sync over a process group: several servers with tensor ranks of their own, and servers that fail."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from megatron_gspo.config import SyncConfig
from megatron_gspo.errors import SyncError
from megatron_gspo.sync import group
from megatron_gspo.sync.background import Pump
from megatron_gspo.sync.base import NamedTensor, make_weight_sync
from megatron_gspo.sync.flat import Buffers, flatten, receive_bucket, receive_header, send_bucket
from megatron_gspo.sync.group import reachable_address
from megatron_gspo.sync.peers import Peers
from megatron_gspo.sync.verify import check_reached, check_same
from tests.rollout.ranks import collect_failures, run_ranks
from tests.rollout.standin import digest, stand_ins, state_of

MIXED = [
    ("bias", torch.tensor([0.5, -1.5, 2.0], dtype=torch.bfloat16)),
    ("scores", torch.arange(5.0)),
    ("scalar", torch.tensor(3.0, dtype=torch.float64)),
    ("matrix", torch.arange(6.0).reshape(2, 3).to(torch.bfloat16)),
]


def many(count: int = 12, size: int = 100_000) -> list[NamedTensor]:
    """Float32 tensors, two of which fill a bucket of 1 MB."""
    generator = torch.Generator().manual_seed(0)
    return [(f"t{index}", torch.randn(size, generator=generator)) for index in range(count)]


def push(
    urls: list[str], named: list[NamedTensor], peers: Peers, version: int = 1, owners: int = 1, **settings: object
) -> None:
    """Rank r owns every ``owners``-th tensor from r on."""
    config = SyncConfig(method="distributed", verify="off", bucket_mb=1, **settings)
    sync = make_weight_sync(config, urls, peers, model_path=Path(), expected_names=[name for name, _ in named])
    mine = named[peers.rank :: owners] if peers.rank < owners else []
    try:
        sync.push(iter(mine), version)
    finally:
        sync.close()


def test_a_flat_bucket_is_aligned_and_survives_the_way() -> None:
    flat = flatten(MIXED, Buffers())
    assert flat.names == ["scalar", "scores", "bias", "matrix"]  # 8, 4, 2, 2 bytes an element
    assert len(flat.data) == 8 + 20 + 6 + 12
    sent: list[torch.Tensor] = []
    send_bucket(sent.append, flat)
    send_bucket(sent.append, None)
    way = iter(sent)
    header = receive_header(lambda tensor: tensor.copy_(next(way)))
    assert header is not None
    arrived = receive_bucket(lambda tensor: tensor.copy_(next(way)), header, Buffers())
    assert arrived.layout == flat.layout and torch.equal(arrived.data, flat.data)
    assert receive_header(lambda tensor: tensor.copy_(next(way))) is None


def test_a_buffer_that_is_given_back_is_used_again_unless_it_is_too_small() -> None:
    buffers = Buffers()
    first = buffers.take(100)
    assert buffers.take(100).data_ptr() != first.data_ptr()
    buffers.give(first)
    again = buffers.take(60)
    assert (again.data_ptr(), len(again)) == (first.data_ptr(), 60)
    buffers.give(again)
    assert len(buffers.take(101)) == 101


def test_every_tensor_rank_of_every_server_gets_every_tensor_of_every_owner() -> None:
    named = [*MIXED, *many()]
    with stand_ins((2, None), (1, None)) as urls:
        run_ranks(4, lambda peers: push(urls, named, peers, version=7, owners=3))
        states = [state_of(url) for url in urls]
    expected = {name: digest(tensor) for name, tensor in named}
    assert [state["received"] for state in states] == [[expected, expected], [expected]]
    assert [(state["weight_version"], state["open"]) for state in states] == [("7", False)] * 2


@pytest.mark.parametrize(
    ("fault", "words"),
    [
        ("dies", "/update_weights_from_distributed did not answer: "),
        ("hangs", " did not answer within 3 s"),
        ("refuses", '/update_weights_from_distributed refused (HTTP 400): {"message": "not now"}'),
    ],
)
def test_a_server_that_fails_in_the_middle_is_named_on_every_rank_and_no_version_moves(
    fault: str, words: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(group, "GRACE_S", 1.0)
    started = time.monotonic()
    with stand_ins((1, None), (2, fault)) as urls:
        failures = collect_failures(3, lambda peers: push(urls, many(), peers, owners=2, timeout_s=3))
        assert time.monotonic() - started < 25
        assert state_of(urls[0])["weight_version"] == "1-incomplete"
    expected = f"weight sync failed on rank 0: {urls[1]}{words}"
    for failure in failures:
        assert isinstance(failure, SyncError)
        assert str(failure).startswith(expected) and urls[0] not in str(failure)


def test_after_a_failure_a_sound_push_joins_a_group_of_its_own() -> None:
    with stand_ins((1, None)) as urls:
        named = many()
        config = SyncConfig(method="distributed", verify="off", bucket_mb=1)
        sync = make_weight_sync(config, urls, Peers(), model_path=Path(), expected_names=[name for name, _ in named])
        with pytest.raises(SyncError, match=r"missing \['t11'\]"):
            sync.push(iter(named[:-1]), 1)
        assert state_of(urls[0])["weight_version"] == "1-incomplete"
        sync.push(iter(named), 2)
        sync.close()
        state = state_of(urls[0])
    assert (state["weight_version"], state["received"]) == ("2", [{name: digest(tensor) for name, tensor in named}])


def test_owners_whose_gathers_wait_for_each_other_do_not_deadlock() -> None:
    """Rank 1 cannot produce its second half before rank 2 has produced all of its own, and rank 2 the other way."""
    named = many(24)
    halfway, done = threading.Event(), threading.Event()

    def mine(rank: int) -> Iterator[NamedTensor]:
        if rank == 1:
            yield from named[:4]
            assert done.wait(timeout=20)
            halfway.set()
            yield from named[4:8]
        elif rank == 2:
            yield from named[8:]
            done.set()
            assert halfway.wait(timeout=20)

    def rank_main(peers: Peers) -> None:
        config = SyncConfig(method="distributed", verify="off", bucket_mb=1)
        sync = make_weight_sync(config, urls, peers, model_path=Path(), expected_names=[name for name, _ in named])
        sync.push(mine(peers.rank), 1)
        sync.close()

    with stand_ins((1, None)) as urls:
        run_ranks(3, rank_main)
        assert len(state_of(urls[0])["received"][0]) == 24


def test_the_next_bucket_is_made_while_the_last_is_on_its_way_and_no_more() -> None:
    arrived = threading.Semaphore(0)
    taken: list[int] = []

    def action(item: int) -> None:
        arrived.acquire(timeout=10)
        taken.append(item)

    pump = Pump(action)
    pump.put(0)  # under way
    pump.put(1)  # next
    blocked = threading.Thread(target=pump.put, args=(2,))
    blocked.start()
    blocked.join(0.1)
    assert blocked.is_alive() and taken == []
    for _ in range(3):
        arrived.release()
    blocked.join()
    pump.close()
    assert taken == [0, 1, 2]


def test_a_pump_that_failed_takes_the_rest_and_raises_at_the_end() -> None:
    def action(item: int) -> None:
        if item == 1:
            raise SyncError("gone")

    pump = Pump(action)
    for item in range(10):
        pump.put(item)
    with pytest.raises(SyncError, match="gone"):
        pump.close()


def test_a_parameter_that_kept_its_hash_was_not_reached() -> None:
    check_reached("http://a", [{"w": "1", "v": "2"}], [{"w": "3", "v": "4"}])
    with pytest.raises(SyncError, match="http://a: the sync did not reach 1 of its parameters, first v"):
        check_reached("http://a", [{"w": "1"}, {"w": "1", "v": "2"}], [{"w": "3"}, {"w": "4", "v": "2"}])
    with pytest.raises(SyncError, match="gave no checksums"):
        check_reached("http://a", [], [])


def test_servers_of_one_size_must_agree_and_of_different_sizes_cannot() -> None:
    whole, halves = [{"w": "1"}], [{"w": "2"}, {"w": "3"}]
    check_same(["http://a", "http://b", "http://c"], [whole, halves, whole])
    with pytest.raises(SyncError, match="http://c and http://b hold different values of 1 parameters, first w"):
        check_same(["http://a", "http://b", "http://c"], [whole, halves, [{"w": "2"}, {"w": "4"}]])


def test_local_servers_reach_this_machine_at_loopback() -> None:
    assert reachable_address(["http://127.0.0.1:30000", "http://localhost:30001"]) == "127.0.0.1"
