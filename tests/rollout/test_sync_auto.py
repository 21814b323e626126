"""The default method, by where servers are; and servers that come in the middle of a run."""

from __future__ import annotations

import json
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from megatron_gspo.config import SyncConfig
from megatron_gspo.errors import SyncError
from megatron_gspo.sync.auto import decide
from megatron_gspo.sync.base import NamedTensor, make_weight_sync
from megatron_gspo.sync.peers import Peers
from megatron_gspo.sync.places import assign, places, within_reach
from tests.rollout.ranks import run_ranks
from tests.rollout.standin import digest, stand_ins, state_of
from tests.rollout.test_sync_distributed import many

HERE, THERE = "http://127.0.0.1:1", "http://192.0.2.7:1"  # of the documentation's network: nobody's
CPU, GPU = {"device": "cpu", "tp_size": 1}, {"device": "cuda", "tp_size": 2, "base_gpu_id": 0}


@pytest.mark.parametrize(
    ("urls", "infos", "ours", "cards", "chosen"),
    [
        ([HERE, HERE], [CPU, CPU], True, 0, "ipc: the servers are this run's and share this machine's memory"),
        ([HERE], [CPU], False, 0, "distributed over gloo: not all servers are this run's own"),
        ([HERE, THERE], [CPU, CPU], True, 0, "distributed over gloo: not all servers are on this machine"),
        ([HERE], [GPU], True, 2, "ipc: the servers are this run's and share the trainer's GPUs"),
        ([HERE], [GPU | {"base_gpu_id": 1}], True, 2, f"distributed over gloo: {HERE} shares GPU 1 with the trainer"),
        ([HERE], [GPU | {"base_gpu_id": 2}], True, 2, "distributed over nccl: trainer and servers compute on GPUs of"),
        ([THERE], [GPU], False, 8, "distributed over nccl: trainer and servers compute on GPUs of their own"),
        ([HERE], [GPU], False, 2, f"distributed over gloo: {HERE} is on this machine and was not started by this run"),
        ([HERE], [GPU | {"pp_size": 2}], True, 4, f"distributed over gloo: {HERE} shares GPU 0"),
        ([HERE], [CPU], True, 2, f"distributed over gloo: {HERE} computes on 'cpu'"),
    ],
)
def test_the_method_follows_from_where_servers_are(
    urls: list[str], infos: list[dict[str, Any]], ours: bool, cards: int, chosen: str
) -> None:
    found = places(urls, infos)
    assigned = assign([within_reach(found, card) for card in range(cards)] or [within_reach(found, None)])
    assert str(decide(urls, infos, assigned, ours=ours, cards=range(cards), room=10**9)).startswith(chosen)


def test_where_shared_memory_is_small_weights_do_not_go_through_it() -> None:
    found = places([HERE], [CPU])
    choice = decide([HERE], [CPU], assign([within_reach(found, None)]), ours=True, cards=(), room=64 * 2**20)
    assert str(choice) == "distributed over gloo: /dev/shm has less than 512 MB free"  # as in a container, by default


def make(urls: list[str], named: list[NamedTensor], peers: Peers, *, shared: bool = False, **settings: Any) -> Any:
    config = SyncConfig.model_validate({"verify": "off", "bucket_mb": 1, **settings})
    names = [name for name, _ in named]
    return make_weight_sync(config, urls, peers, model_path=Path(), expected_names=names, shared=shared)


@pytest.mark.parametrize(
    ("shared", "method", "path"), [(False, "ipc", "shared memory"), (True, "distributed", "gloo, through host memory")]
)
def test_the_default_is_decided_once_and_said_once(shared: bool, method: str, path: str) -> None:
    named = many(4)
    said: dict[int, list[Any]] = {}

    def rank_main(peers: Peers) -> None:
        sync = make(urls, named, peers, shared=shared)
        described = sync.describe()
        notes = [sync.push(iter(named[peers.rank :: 2]), version) for version in (1, 2)]
        said[peers.rank] = [described, *notes]
        sync.close()

    with stand_ins((2, None)) as urls:
        run_ranks(2, rank_main)
        assert state_of(urls[0])["received"] == [{name: digest(tensor) for name, tensor in named}] * 2
    assert [(notes[0]["method"], notes[0]["path"]) for notes in said.values()] == [(method, path)] * 2
    assert said[0][1].startswith(f"weights go to the servers by {method}") and said[0][1].endswith("(sync.method)")
    assert said[0][2] == "" and said[1][1:] == ["", ""]


def restart(url: str) -> None:
    """Leaves a stand-in as a new process would be: with a version that is nobody's."""
    body = json.dumps({"new_version": "0"}).encode()
    urllib.request.urlopen(urllib.request.Request(f"{url}/update_weight_version", body), timeout=60).close()


def buckets_of(urls: list[str]) -> list[int]:
    return [state_of(url)["buckets"] for url in urls]


@pytest.mark.parametrize("method", ["ipc", "distributed", "auto"])
def test_a_server_that_joins_is_filled_alone_before_it_is_used(method: str) -> None:
    named = many(4)

    def rank_main(peers: Peers) -> None:
        def mine() -> Iterator[NamedTensor]:
            return iter(named[peers.rank :: 2])

        def untouched() -> Iterator[NamedTensor]:
            raise AssertionError("every server holds it")
            yield

        sync = make(urls[:2], named, peers, method=method)
        sync.push(mine(), 5)
        assert sync.fill(untouched(), 5) == ""
        if peers.lead:
            restart(urls[1])
        peers.together(lambda: None)
        before = buckets_of(urls) if peers.lead else []
        said = sync.fill(mine(), 5)
        if peers.lead:
            assert f"weights of version 5 went to {urls[1]}" in said
            after = buckets_of(urls)
            assert after[0] == before[0] and after[1] == 2 * before[1]
        sync.fill(mine(), 5, urls)  # a third one has come
        assert sync.fill(untouched(), 5) == ""
        sync.push(mine(), 6)
        sync.close()

    with stand_ins((1, None), (2, None), (1, None)) as urls:
        run_ranks(2, rank_main)
        states = [state_of(url) for url in urls]
    expected = {name: digest(tensor) for name, tensor in named}
    assert [state["weight_version"] for state in states] == ["6"] * 3
    assert all(received == expected for state in states for received in state["received"])


def test_a_push_joins_anew_with_a_server_that_was_started_again() -> None:
    named = many(4)
    with stand_ins((1, None), (1, None)) as urls:
        sync = make(urls, named, Peers(), method="distributed")
        sync.push(iter(named), 1)
        first = sync._group
        sync.push(iter(named), 2)
        assert sync._group is first
        restart(urls[1])
        sync.push(iter(named), 3)
        assert sync._group is not first
        sync.close()
        assert [state_of(url)["weight_version"] for url in urls] == ["3", "3"]


def test_a_server_that_is_gone_fails_a_fill_on_every_rank() -> None:
    named = many(2)
    said: list[str] = []

    def rank_main(peers: Peers) -> None:
        with pytest.raises(SyncError) as caught:
            make(["http://127.0.0.1:9"], named, peers, method="ipc").fill(iter(named), 1)
        said.append(str(caught.value))

    run_ranks(2, rank_main)
    assert len(said) == 2 and all("rank 0: http://127.0.0.1:9/model_info did not answer" in text for text in said)
