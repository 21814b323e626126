"""Weight sync without servers: buckets, names, and failures that reach every rank."""

from __future__ import annotations

import pickle
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from megatron_gspo.config import SyncConfig
from megatron_gspo.errors import SyncError
from megatron_gspo.hf.checkpoint import HfReader, buckets
from megatron_gspo.rollout.sglang.control import Servers
from megatron_gspo.sync.base import METHODS, NamedTensor, check_names, make_weight_sync, send_all
from megatron_gspo.sync.peers import Peers
from megatron_gspo.sync.tensor import pickled
from tests.rollout.ranks import collect_failures


def test_buckets_hold_every_tensor_once_in_order_and_no_more_than_their_limit() -> None:
    sizes = [100, 100, 100, 300, 20, 250, 50]  # float32: times 4 bytes
    named = [(str(i), torch.full((size,), float(i))) for i, size in enumerate(sizes)]
    packed = list(buckets(iter(named), max_bytes=1000))
    assert [[name for name, _ in bucket] for bucket in packed] == [["0", "1"], ["2"], ["3"], ["4"], ["5"], ["6"]]
    assert all(torch.equal(got, want) for bucket in packed for (name, got) in bucket for want in [named[int(name)][1]])


def test_a_tensor_above_the_limit_is_a_bucket_of_its_own() -> None:
    named = [("a", torch.zeros(10)), ("b", torch.zeros(1000)), ("c", torch.zeros(10))]
    assert [[name for name, _ in bucket] for bucket in buckets(named, max_bytes=400)] == [["a"], ["b"], ["c"]]


def test_a_slice_is_sent_without_the_tensor_it_was_cut_from() -> None:
    fused = torch.arange(80_000.0).view(8, 10_000)
    transposed = torch.arange(100.0).view(10, 10).t()
    buckets_sent = []
    send_all([("expert", fused[3]), ("transposed", transposed)], 10**6, buckets_sent.append)
    [bucket] = buckets_sent
    content = pickled(bucket)
    restored = dict(pickle.loads(content))
    assert torch.equal(restored["expert"], fused[3])
    assert torch.equal(restored["transposed"], transposed)
    assert len(content) < 45_000  # 40,000 bytes of expert, 400 of the other


def test_a_failure_to_send_is_raised_only_after_the_collective_iterator_is_exhausted() -> None:
    produced = []

    def tensors() -> Iterator[NamedTensor]:
        for i in range(10):
            produced.append(i)
            yield str(i), torch.zeros(100)

    sent = []

    def send(bucket: list[NamedTensor]) -> None:
        sent.append([name for name, _ in bucket])
        if len(sent) == 2:
            raise SyncError("refused")

    with pytest.raises(SyncError, match="refused"):
        send_all(tensors(), 400, send)
    assert produced == list(range(10))
    assert sent == [["0"], ["1"]]


def test_names_must_be_sent_once_and_cover_the_model_exactly() -> None:
    check_names(["b", "a"], frozenset("ab"))
    with pytest.raises(SyncError, match="1 tensors were sent by more than one owner, first a"):
        check_names(["a", "b", "a"], frozenset("ab"))
    with pytest.raises(SyncError, match=r"sent 2 tensors, the servers' model has 3: missing \['b', 'c'\], unknown"):
        check_names(["a", "x"], frozenset("abc"))


def test_expected_names_are_those_of_the_checkpoint(tiny_model: Path) -> None:
    names = set(HfReader(tiny_model).names())
    assert len(names) == 3 + 2 * (9 + 3 * 8)  # embedding, norm, head; 2 layers of 9 tensors and 8 experts of 3
    assert "model.layers.1.mlp.experts.7.down_proj.weight" in names


def test_a_failure_on_one_rank_is_raised_on_all_with_its_words() -> None:
    def rank_main(peers: Peers) -> None:
        def action() -> int:
            if peers.rank == 1:
                raise ValueError("disk full")
            return peers.rank

        peers.together(action)

    failures = collect_failures(3, rank_main)
    assert [str(failure) for failure in failures] == ["weight sync failed on rank 1: ValueError: disk full"] * 3
    assert all(isinstance(failure, SyncError) for failure in failures)


def test_results_of_all_ranks_reach_all_ranks() -> None:
    results = {}
    collect_failures(3, lambda peers: results.update({peers.rank: peers.together(lambda: peers.rank * 10)}))
    assert results == {rank: [0, 10, 20] for rank in range(3)}


@pytest.mark.parametrize("method", METHODS)
def test_a_server_that_is_gone_fails_the_push_on_every_rank(method: str, tiny_model: Path, tmp_path: Path) -> None:
    config = SyncConfig(method=method, directory=str(tmp_path))

    def rank_main(peers: Peers) -> None:
        make_weight_sync(config, ["http://127.0.0.1:9"], peers, model_path=tiny_model).push(iter(()), 1)

    failures = collect_failures(2, rank_main)
    assert [type(failure) for failure in failures] == [SyncError, SyncError]
    assert all("rank 0: http://127.0.0.1:9/flush_cache" in str(failure) for failure in failures)


def test_a_sync_without_servers_is_refused() -> None:
    with pytest.raises(SyncError, match="no server"):
        Servers(())
