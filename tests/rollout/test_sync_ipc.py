"""Weight sync by handles: memory that another process opens, whose it is meanwhile, and ranks that share it by card."""

from __future__ import annotations

import glob
import hashlib
import inspect
import multiprocessing as mp
import os
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.multiprocessing import reductions

from megatron_gspo.config import SyncConfig
from megatron_gspo.errors import DependencyError, SyncError
from megatron_gspo.rollout.sglang.launcher import find_server_python
from megatron_gspo.sync import flat, handles, ipc
from megatron_gspo.sync.base import NamedTensor, make_weight_sync
from megatron_gspo.sync.flat import Buffers, flatten
from megatron_gspo.sync.ipc import IpcSync
from megatron_gspo.sync.peers import Peers
from megatron_gspo.sync.places import ServerPlace, assign, check_reach, check_readers, out_of_reach, within_reach
from tests.rollout.ranks import collect_failures, run_ranks
from tests.rollout.standin import digest, stand_ins, state_of
from tests.rollout.test_sync_distributed import MIXED, PUSH_S, many

QUANTISED = [
    ("expert.weight", torch.arange(32.0).reshape(4, 8).to(torch.float8_e4m3fn)),
    ("expert.weight_scale_inv", torch.tensor([[0.25, 3.0]])),
    ("packed", torch.arange(5, dtype=torch.uint8)),
]


def make(urls: list[str], named: list[NamedTensor], peers: Peers, **settings: Any) -> Any:
    config = SyncConfig.model_validate({"method": "ipc", "verify": "off", "bucket_mb": 1, "timeout_s": 60, **settings})
    return make_weight_sync(config, urls, peers, model_path=Path(), expected_names=[name for name, _ in named])


def push(urls: list[str], named: list[NamedTensor], peers: Peers, version: int = 1, owners: int = 1) -> None:
    sync = make(urls, named, peers)
    try:
        sync.push(iter(named[peers.rank :: owners] if peers.rank < owners else []), version)
    finally:
        sync.close()


def shared_files() -> set[str]:
    """Of this process's buffers."""
    return set(glob.glob(f"/dev/shm/torch_{os.getpid()}_*"))


def test_every_tensor_rank_of_every_server_opens_every_tensor_of_every_owner_and_nothing_is_left() -> None:
    named = [*MIXED, *QUANTISED, *many()]
    before = shared_files()
    with stand_ins((2, None), (1, None)) as urls:
        run_ranks(3, lambda peers: push(urls, named, peers, version=7, owners=3))
        states = [state_of(url) for url in urls]
    expected = {name: digest(tensor) for name, tensor in named}
    assert [state["received"] for state in states] == [[expected, expected], [expected]]
    assert [(state["weight_version"], state["open"]) for state in states] == [("7", False)] * 2
    assert shared_files() == before


def hold(connection: Any) -> None:
    lent = handles.SharedBuffers().take(1000)
    connection.send(lent.untyped_storage()._share_filename_cpu_()[1].decode())
    time.sleep(60)


def test_a_trainer_that_is_killed_leaves_nothing_in_shared_memory() -> None:
    context = mp.get_context("forkserver")
    ours, theirs = context.Pipe()
    process = context.Process(target=hold, args=(theirs,), daemon=True)
    process.start()
    file = Path("/dev/shm") / ours.recv().removeprefix("/")
    assert file.stat().st_mode & 0o077 == 0  # nobody else's to read
    process.kill()
    process.join()
    deadline = time.monotonic() + 60
    while file.exists() and time.monotonic() < deadline:
        time.sleep(0.02)
    assert not file.exists()


def test_a_flat_bucket_names_the_dtypes_of_quantised_weights_and_their_scales() -> None:
    flat = flatten(QUANTISED, Buffers())
    assert list(zip(flat.names, flat.dtypes, strict=True)) == [
        ("expert.weight_scale_inv", "float32"),
        ("expert.weight", "float8_e4m3fn"),
        ("packed", "uint8"),
    ]
    assert [(entry.start_idx, entry.end_idx, entry.dtype) for entry in handles.described(flat)] == [
        (0, 8, torch.float32),
        (8, 40, torch.float8_e4m3fn),
        (40, 45, torch.uint8),
    ]


@pytest.mark.parametrize(
    ("fault", "words"),
    [
        ("dies", "/update_weights_from_tensor did not answer: "),
        ("hangs", "/update_weights_from_tensor did not answer: TimeoutError"),
        ("refuses", '/update_weights_from_tensor refused (HTTP 400): {"message": "not now"}'),
    ],
)
def test_a_server_that_fails_in_the_middle_is_named_on_every_rank_and_no_version_moves(fault: str, words: str) -> None:
    def rank_main(peers: Peers) -> None:
        sync = make(urls, many(), peers, timeout_s=PUSH_S)
        sync.push(iter(many()[peers.rank :: 2]), 1)

    with stand_ins((1, None), (2, fault)) as urls:
        started = time.monotonic()
        failures = collect_failures(2, rank_main)
        assert time.monotonic() - started < 100, "it would hang for 600 s"
        assert state_of(urls[0])["weight_version"] == "1-incomplete"
    for failure in failures:
        assert isinstance(failure, SyncError)
        assert str(failure).startswith(f"weight sync failed on rank 0: {urls[1]}{words}")


def test_what_a_server_reads_stays_as_it_is_until_the_server_has_confirmed(monkeypatch: pytest.MonkeyPatch) -> None:
    lent: list[torch.Tensor] = []
    real = handles.SharedBuffers.handle

    def handle(self: handles.SharedBuffers, data: torch.Tensor) -> handles.Call:
        lent.append(data)
        return real(self, data)

    def slow(payloads: Any) -> None:
        assert len(payloads) == 1 and len(payloads[0]) == 1
        before = hashlib.sha256(lent[-1].numpy()).digest()
        time.sleep(0.05)  # meanwhile the next buckets are made
        assert hashlib.sha256(lent[-1].numpy()).digest() == before

    monkeypatch.setattr(handles.SharedBuffers, "handle", handle)
    named = many(12)
    with stand_ins((1, None)) as urls:
        sync = make(urls, named, Peers())
        sync.servers.post_handles = slow
        sync.push(iter(named), 1)
        sync.close()
    assert len(lent) == 6 and len({data.data_ptr() for data in lent}) < 6  # confirmed memory is used again


@pytest.fixture
def cards(monkeypatch: pytest.MonkeyPatch) -> None:
    """Trainer ranks with a GPU each, as far as who opens whose memory: it lies in shared files all the same."""

    def this_card() -> torch.device:
        return torch.device("cuda", int(threading.current_thread().name.removeprefix("rank ")))

    monkeypatch.setattr(ipc, "this_card", this_card)
    monkeypatch.setattr(ipc, "CardBuffers", lambda device: handles.SharedBuffers())


@pytest.mark.usefixtures("cards")
def test_on_gpus_each_server_rank_opens_memory_of_the_trainer_rank_on_its_card(monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[tuple[int, tuple[Any, ...]]] = []
    real = IpcSync._handles

    def counted(self: IpcSync, bucket: Any) -> Any:
        made.append((self.peers.rank, self._mine))
        return real(self, bucket)

    monkeypatch.setattr(IpcSync, "_handles", counted)
    named = [*MIXED, *many()]
    with stand_ins((2, None), info={"device": "cuda", "base_gpu_id": 1}) as urls:
        run_ranks(3, lambda peers: push(urls, named, peers, owners=3))  # rank 0 owns tensors, and serves no card
        state = state_of(urls[0])
    expected = {name: digest(tensor) for name, tensor in named}
    assert state["received"] == [expected, expected] and state["weight_version"] == "1"
    assert set(made) == {(0, ()), (1, ((0, 0),)), (2, ((0, 1),))}


@pytest.mark.usefixtures("cards")
@pytest.mark.parametrize("what", ["_room", "_handles"])
def test_a_rank_without_room_or_handle_fails_every_rank_and_the_next_push_arrives(
    what: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = getattr(IpcSync, what)
    failing = [True]

    def fail(self: IpcSync, *arguments: Any) -> Any:
        if self.peers.rank == 1 and failing[0]:
            raise MemoryError("no room")
        return real(self, *arguments)

    monkeypatch.setattr(IpcSync, what, fail)
    named = many(4)
    said: list[str] = []

    def rank_main(peers: Peers) -> None:
        sync = make(urls, named, peers)
        with pytest.raises(SyncError) as caught:
            sync.push(iter(named[peers.rank :: 2]), 1)
        said.append(str(caught.value))
        failing[0] = False
        sync.push(iter(named[peers.rank :: 2]), 2)
        sync.close()

    with stand_ins((2, None), info={"device": "cuda"}) as urls:
        run_ranks(2, rank_main)
        state = state_of(urls[0])
    assert len(said) == 2 and all("rank 1: MemoryError: no room" in text for text in said)
    assert state["weight_version"] == "2" and len(state["received"][1]) == 4


def test_between_syncs_a_gpu_gets_its_memory_back_and_the_hosts_is_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    buffers = Buffers()
    lent = buffers.take(10)
    buffers.give(lent)
    buffers.rest()
    assert buffers.take(10).data_ptr() == lent.data_ptr()
    buffers.give(lent)
    buffers.device = torch.device("cuda", 0)
    buffers.rest()
    assert buffers._free.empty()
    rested: list[str] = []
    monkeypatch.setattr(handles.SharedBuffers, "rest", lambda self: rested.append("at rest"))
    collect_failures(2, lambda peers: push(["http://127.0.0.1:9"], many(2), peers))  # which fails
    assert len(rested) == 2


def test_servers_that_share_no_memory_are_refused_by_name() -> None:
    here, there = "http://127.0.0.1:1", "http://192.0.2.7:1"  # of the documentation's network: nobody's
    host = [ServerPlace(here, "cpu", (0, 1)), ServerPlace(there, "cpu", (0,))]
    assert within_reach(host, None) == [(0, 0), (0, 1)]
    assert out_of_reach(host, assign([within_reach(host, None)] * 2)) == [f"{there} (tensor rank 0)"]
    gpus = [ServerPlace(here, "cuda", (2, 3))]
    assert assign([within_reach(gpus, card) for card in (0, 1, 2)]) == {(0, 0): 2}
    with pytest.raises(SyncError, match=r":1 \(tensor rank 1, GPU 3\) and 0 more share no memory with a trainer rank"):
        check_reach(gpus, {(0, 0): 2})
    with pytest.raises(SyncError, match="2 pipeline stages"):
        check_readers([ServerPlace(here, "cuda", (0,), stages=2)])
    with pytest.raises(SyncError, match=rf"{here} computes on 'cuda' and {there} on 'cpu'"):
        check_readers([gpus[0], host[1]])


def test_a_gpu_server_cannot_open_memory_of_a_trainer_on_a_cpu() -> None:
    with stand_ins((1, None), info={"device": "cuda"}) as urls:
        failures = collect_failures(2, lambda peers: push(urls, many(2), peers))
    assert ["the trainer computes on a CPU" in str(failure) for failure in failures] == [True, True]


def test_a_gpus_handle_names_its_card_by_uuid_in_the_place_where_sglang_looks(monkeypatch: pytest.MonkeyPatch) -> None:
    parameters = list(inspect.signature(reductions.rebuild_cuda_tensor).parameters)
    assert parameters[handles.DEVICE] == "storage_device"
    arguments = tuple(parameters)
    monkeypatch.setattr(reductions, "reduce_tensor", lambda tensor: (reductions.rebuild_cuda_tensor, arguments))
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: type("Card", (), {"uuid": "GPU-7"}))
    handle = handles.CardBuffers(torch.device("cpu")).handle(torch.zeros(1))
    assert handle.function is reductions.rebuild_cuda_tensor
    assert handle.arguments == (*arguments[:6], "GPU-7", *arguments[7:])


def test_the_pinned_sglang_allows_what_handles_are_made_of() -> None:
    try:
        python = find_server_python()
    except DependencyError as error:
        pytest.skip(str(error))
    [source] = Path(python).parent.parent.glob("lib/python*/site-packages/sglang/srt/utils/common.py")
    text = source.read_text(encoding="utf-8")
    allowed = text[text.index("ALLOWED_GLOBALS = {") :]
    for module, name in (
        ("types", "SimpleNamespace"),
        ("torch.multiprocessing.reductions", "rebuild_cuda_tensor"),
        ("torch.multiprocessing.reductions", "rebuild_storage_filename"),
        ("torch.multiprocessing.reductions", "rebuild_typed_storage"),
        ("torch.storage", "TypedStorage"),
        ("torch", "float8_e4m3fn"),
    ):
        assert f'("{module}", "{name}")' in allowed
    patch = source.with_name("patch_torch.py").read_text(encoding="utf-8")
    assert f"_REDUCE_TENSOR_ARG_DEVICE_INDEX = {handles.DEVICE}\n" in patch


def test_a_bucket_for_which_shared_memory_has_no_room_is_refused_before_it_is_written() -> None:
    with pytest.raises(SyncError, match=r"^/dev/shm has no room for \d+ MB more .*--shm-size"):
        handles.SharedBuffers().take(handles.shared_room() + 10**10)


def test_a_rank_whose_bucket_finds_no_room_on_rank_0_is_told_and_does_not_wait(monkeypatch: pytest.MonkeyPatch) -> None:
    def full(self: handles.SharedBuffers, size: int) -> torch.UntypedStorage:
        raise SyncError("no room")

    monkeypatch.setattr(handles.SharedBuffers, "_storage", full)
    monkeypatch.setattr(flat, "PIECE", 300_000)  # a bucket is three pieces
    with stand_ins((1, None)) as urls:
        failures = collect_failures(3, lambda peers: make(urls, many(), peers).push(iter(many()[peers.rank :: 3]), 1))
    assert ["rank 0: no room" in str(failure) for failure in failures] == [True] * 3


def test_a_stream_that_breaks_on_one_rank_ends_the_push_on_all() -> None:
    named = many(4)

    def broken() -> Iterator[NamedTensor]:
        yield from named[:2]
        raise ValueError("half of it")

    def rank_main(peers: Peers) -> None:
        make(urls, named, peers).push(broken() if peers.rank == 1 else iter(named[2:]), 1)

    with stand_ins((1, None)) as urls:
        failures = collect_failures(2, rank_main)
    assert ["rank 1: ValueError: half of it" in str(failure) for failure in failures] == [True, True]
