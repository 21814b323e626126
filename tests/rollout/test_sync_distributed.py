"""Weight sync over a process group: several servers with tensor ranks of their own, and servers that fail."""

from __future__ import annotations

import contextlib
import os
import threading
import time
from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
import torch.distributed as dist

from megatron_gspo.config import SyncConfig
from megatron_gspo.errors import SyncError
from megatron_gspo.sync import group
from megatron_gspo.sync.backend import choose, is_here
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
PUSH_S = 8
"""What every call of a push may take where one will take for ever: others join a group in it, on a busy machine too."""


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
        ("hangs", f" did not answer within {PUSH_S} s"),
        ("refuses", '/update_weights_from_distributed refused (HTTP 400): {"message": "not now"}'),
    ],
)
def test_a_server_that_fails_in_the_middle_is_named_on_every_rank_and_no_version_moves(
    fault: str, words: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(group, "GRACE_S", 1.0)
    with stand_ins((1, None), (2, fault)) as urls:
        started = time.monotonic()
        failures = collect_failures(3, lambda peers: push(urls, many(), peers, owners=2, timeout_s=PUSH_S))
        assert time.monotonic() - started < 100, "it would hang for 600 s"
        assert state_of(urls[0])["weight_version"] == "1-incomplete"
    expected = f"weight sync failed on rank 0: {urls[1]}{words}"
    for failure in failures:
        assert isinstance(failure, SyncError)
        assert str(failure).startswith(expected) and urls[0] not in str(failure)


class SpinningGroup:
    """What nccl is to ``ServerGroup``, over gloo: a broadcast's wait ends at once, and what it has begun ends when all
    have it, or when the group is aborted; that a server has died it does not see."""

    made: ClassVar[list[SpinningGroup]] = []

    class Options:
        _timeout = timedelta()

    def __init__(self, store: Any, rank: int, size: int, options: Options) -> None:
        self.watchdog, self.timeout = os.environ.get(group.WATCHDOG), options._timeout
        under = dist.PrefixStore("cpu/", store.underlying_store)
        self._gloo = dist.ProcessGroupGloo(under, rank, size, timedelta(seconds=20))
        self.over, self.aborts = threading.Event(), 0
        self.made.append(self)

    def broadcast(self, tensors: list[torch.Tensor], options: Any) -> SpinningGroup:
        self.over.clear()

        def spin() -> None:
            with contextlib.suppress(RuntimeError):
                self._gloo.broadcast(tensors, options).wait()
                self.over.set()

        threading.Thread(target=spin, daemon=True).start()
        return self

    def wait(self) -> None:
        pass

    def abort(self) -> None:
        self.aborts += 1
        self.over.set()


@pytest.fixture
def spinning(monkeypatch: pytest.MonkeyPatch) -> list[SpinningGroup]:
    """The groups that are made in the place of nccl's."""
    monkeypatch.setattr(dist, "ProcessGroupNCCL", SpinningGroup, raising=False)
    monkeypatch.setattr(SpinningGroup, "made", [])
    monkeypatch.setattr(group, "device_of", lambda backend: torch.device("cpu"))
    monkeypatch.setattr(group, "drain", lambda device: SpinningGroup.made[-1].over.wait(timeout=60))
    monkeypatch.setattr(group, "GRACE_S", 1.0)
    monkeypatch.delenv(group.WATCHDOG, raising=False)
    return SpinningGroup.made


@pytest.mark.parametrize("fault", ["dies", "hangs"])
def test_a_broadcast_that_would_spin_for_a_server_that_is_gone_is_aborted_and_every_rank_is_told(
    fault: str, spinning: list[SpinningGroup]
) -> None:
    with stand_ins((1, None), (2, fault)) as urls:
        started = time.monotonic()
        settings = {"owners": 2, "timeout_s": PUSH_S, "backend": "nccl"}
        failures = collect_failures(3, lambda peers: push(urls, many(), peers, **settings))
        assert time.monotonic() - started < 100, "it would hang for 600 s"
    for failure in failures:
        assert isinstance(failure, SyncError)
        assert str(failure).startswith(f"weight sync failed on rank 0: {urls[1]}") and "did not answer" in str(failure)
    [made] = spinning
    assert made.aborts == 1 and made.over.is_set()
    assert made.watchdog == "2" and made.timeout > timedelta(seconds=PUSH_S)  # it neither ends us nor comes before us
    assert group.WATCHDOG not in os.environ


def test_torchs_own_group_has_what_is_asked_of_it() -> None:
    nccl = getattr(dist, "ProcessGroupNCCL", None)
    if nccl is None:
        pytest.skip("this torch is built without nccl")
    assert callable(nccl.abort) and nccl.Options()._timeout


def test_a_sound_push_over_such_a_group_arrives_and_frees_it(spinning: list[SpinningGroup]) -> None:
    named = many()
    with stand_ins((2, None)) as urls:
        push(urls, named, Peers(), backend="nccl")
        assert state_of(urls[0])["received"] == [{name: digest(tensor) for name, tensor in named}] * 2
    assert [made.aborts for made in spinning] == [1]


def test_nccl_is_chosen_only_where_each_has_a_gpu_of_its_own() -> None:
    here, there = "http://127.0.0.1:1", "http://192.0.2.7:1"  # of the documentation's network: nobody's
    assert is_here(here) and is_here("http://localhost:1") and not is_here(there)
    gpu = {"device": "cuda", "tp_size": 2, "base_gpu_id": 2}
    assert choose([here], [gpu], ours=True, cards=range(0)) == ("gloo", "")
    assert choose([here], [gpu], ours=True, cards=range(2))[0] == "nccl"
    assert choose([there, there], [gpu, gpu | {"base_gpu_id": 0}], ours=False, cards=range(8))[0] == "nccl"
    for urls, infos, ours, why in (
        ([here], [gpu | {"base_gpu_id": 1}], True, "127.0.0.1:1 shares GPU 1 with the trainer"),
        ([here], [gpu], False, "was not started by this run: it may share a GPU"),
        ([there, there], [gpu, gpu | {"base_gpu_id": 3}], False, "two servers may share GPU 3 of 192.0.2.7"),
        ([here, there], [gpu, {"device": "cpu"}], True, "http://192.0.2.7:1 computes on 'cpu'"),
    ):
        backend, reason = choose(urls, infos, ours=ours, cards=range(2))
        assert backend == "gloo" and why in reason


def test_a_push_says_over_what_its_weights_went_and_why(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("megatron_gspo.sync.distributed.trainer_cards", lambda: range(1))
    named = many(2)
    config = SyncConfig(method="distributed", verify="off")
    with stand_ins((1, None)) as urls:
        sync = make_weight_sync(config, urls, Peers(), model_path=Path(), expected_names=[name for name, _ in named])
        assert sync.push(iter(named), 1) == (
            f"weights go to the servers over gloo (sync.backend): {urls[0]} computes on 'cpu'"
        )
        assert sync.push(iter(named), 2) == ""
        sync.close()


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
            assert done.wait(timeout=50)
            halfway.set()
            yield from named[4:8]
        elif rank == 2:
            yield from named[8:]
            done.set()
            assert halfway.wait(timeout=50)

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
