"""A real SGLang server: rollouts that repeat, logprobs that are the model's, weights that arrive."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from dataclasses import replace
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
import sentencepiece
from safetensors.torch import save_file

from megatron_gspo.config import RolloutConfig, SyncConfig
from megatron_gspo.data.prompts import load_prompts
from megatron_gspo.data.tokenizer import load_tokenizer
from megatron_gspo.errors import EngineReplyError, EngineUnavailableError, NoServerError, RolloutError, SyncError
from megatron_gspo.rollout.engine import Sampling, make_engine
from megatron_gspo.rollout.sglang.control import Servers
from megatron_gspo.rollout.sglang.probe import get
from megatron_gspo.sync.base import make_weight_sync
from megatron_gspo.sync.peers import Peers
from megatron_gspo.types import Prompt, Rollout, RouteShape
from tests.rollout.cases import prompt
from tests.rollout.conftest import require_sglang, weight_version
from tests.rollout.models import VOCAB_SIZE, tensors_of, transformers_logprobs, transformers_next, transformers_routes
from tests.rollout.ranks import run_ranks

pytestmark = pytest.mark.rollout

STOPS = (0, 1)
SAMPLING = Sampling(group_size=4, temperature=1.0, max_tokens=24, stop_token_ids=STOPS, seed=5)
PROMPTS = [prompt(f"p{i}", tuple(2 + (7 * i + j) % 60 for j in range(3 + i))) for i in range(6)]
METHODS = ("disk", "tensor", "distributed", "ipc")


def draw(
    url: str, prompts: Sequence[Prompt] = PROMPTS, sampling: Sampling = SAMPLING, version: int = 0, **settings: Any
) -> list[list[Rollout]]:
    async def main() -> list[list[Rollout]]:
        async with make_engine([url], RolloutConfig(**settings), vocab_size=VOCAB_SIZE) as engine:
            return await engine.rollout_groups(prompts, sampling, weight_version=version)

    return asyncio.run(main())


def tokens(group: list[Rollout]) -> list[list[int]]:
    return [rollout.response_ids.tolist() for rollout in group]


def logprob_error(groups: list[list[Rollout]], model: Path, temperature: float = 1.0) -> float:
    """Largest difference between the engine's logprobs and transformers'."""
    return max(
        np.abs(
            rollout.rollout_logprobs
            - transformers_logprobs(model, rollout.prompt.token_ids, rollout.response_ids.tolist(), temperature)
        ).max()
        for group in groups
        for rollout in group
    )


def test_routes_are_those_of_transformers_and_so_are_those_of_tokens_from_the_prefix_cache(
    server: str, tiny_model: Path
) -> None:
    asking = replace(SAMPLING, routes=RouteShape((True, True), top_k=2, num_experts=8))
    once = draw(server, PROMPTS, asking)
    again = draw(server, PROMPTS, asking)  # prompts and responses lie in the cache by now
    for rollout, repeated in zip(chain(*once), chain(*again), strict=True):
        assert rollout.routes is not None and repeated.routes is not None
        tokens = [*rollout.prompt.token_ids, *rollout.response_ids.tolist()]
        assert rollout.routes.shape == (len(tokens) - 1, 2, 2)
        assert (rollout.routes == transformers_routes(tiny_model, tokens[:-1])).all()
        assert (rollout.routes == repeated.routes).all()
    assert draw(server, PROMPTS[:1])[0][0].routes is None  # not asked for


def push(method: str, url: str, model: Path, version: int, directory: Path, **settings: Any) -> None:
    config = SyncConfig(method=method, directory=str(directory), **settings)
    sync = make_weight_sync(config, [url], Peers(), model_path=model)
    sync.push(tensors_of(model), version)
    sync.close()


def test_seeded_rollouts_repeat_token_for_token_shuffled_or_alone(server: str) -> None:
    groups = draw(server)
    distinct = {tuple(response) for group in groups for response in tokens(group)}
    assert len(distinct) >= 20  # 24 responses: different prompts and samples are different draws
    assert [tokens(group) for group in draw(server)] == [tokens(group) for group in groups]
    backwards = draw(server, PROMPTS[::-1], concurrency=2)[::-1]
    assert [tokens(group) for group in backwards] == [tokens(group) for group in groups]
    [alone] = draw(server, [PROMPTS[3]])
    assert tokens(alone) == tokens(groups[3])
    later = Sampling(**{**vars(SAMPLING), "outer_step": 1})
    assert all(tokens(a) != tokens(b) for a, b in zip(draw(server, sampling=later), groups, strict=True))


def test_responses_end_in_a_stop_token_or_at_the_limit(server: str) -> None:
    rollouts = [rollout for group in draw(server) for rollout in group]
    stopped = [rollout for rollout in rollouts if rollout.finish_reason == "stop"]
    assert 0 < len(stopped) < len(rollouts)
    assert all(rollout.response_ids[-1] in STOPS for rollout in stopped)
    assert all(len(rollout.response_ids) == 24 for rollout in rollouts if rollout.truncated)


@pytest.mark.parametrize("temperature", [1.0, 0.6])
def test_logprobs_are_those_of_transformers_after_temperature(
    server: str, tiny_model: Path, temperature: float
) -> None:
    groups = draw(server, sampling=Sampling(2, temperature, 24, STOPS, seed=1))
    assert logprob_error(groups, tiny_model, temperature) < 1e-5


def test_sampling_follows_the_models_distribution(server: str, tiny_model: Path) -> None:
    """First tokens of 1,024 seeded draws against the model's probabilities: chi-squared over 64 tokens."""
    [group] = draw(server, [PROMPTS[0]], Sampling(1024, 1.0, 1, STOPS, seed=3))
    counts = np.bincount([int(rollout.response_ids[0]) for rollout in group], minlength=VOCAB_SIZE)
    expected = 1024 * np.exp(transformers_next(tiny_model, PROMPTS[0].token_ids))
    chi2 = ((counts - expected) ** 2 / expected).sum()
    assert 30 < chi2 < 115  # 63 degrees of freedom: the 0.01% and 99.99% quantiles


def test_greedy_responses_are_the_argmax_of_the_model(server: str, tiny_model: Path) -> None:
    [group] = draw(server, [PROMPTS[0]], Sampling(1, 1.0, 8, STOPS, greedy=True))
    response = group[0].response_ids.tolist()
    for position, token in enumerate(response):
        next_V = transformers_next(tiny_model, [*PROMPTS[0].token_ids, *response[:position]])
        assert token == int(np.argmax(next_V))


@pytest.mark.parametrize("method", METHODS)
def test_pushed_weights_become_the_servers(
    method: str, server: str, tiny_model: Path, other_model: Path, tmp_path: Path
) -> None:
    assert logprob_error(draw(server), other_model) > 0.1
    push(method, server, other_model, 1, tmp_path, bucket_mb=1)
    assert weight_version(server) == "1"
    groups = draw(server, version=1)
    assert logprob_error(groups, other_model) < 1e-5
    assert {rollout.weight_versions for group in groups for rollout in group} == {(1,)}
    push(method, server, tiny_model, 2, tmp_path)
    assert logprob_error(draw(server, version=2), tiny_model) < 1e-5
    assert list(tmp_path.iterdir()) == []


def test_the_methods_leave_the_same_bytes_and_a_checksum_confirms_each(
    server: str, tiny_model: Path, other_model: Path, tmp_path: Path
) -> None:
    servers = Servers([server])
    before, found = servers.checksums(), []
    for version, method in enumerate(METHODS, start=1):
        push(method, server, other_model, version, tmp_path, bucket_mb=1, verify="every")
        found.append(servers.checksums())
    assert found[0] == found[1] == found[2] != before
    push("distributed", server, tiny_model, 9, tmp_path)
    assert servers.checksums() == before


def test_a_tensor_that_no_push_brings_is_found_by_checksum(server: str, other_model: Path) -> None:
    name = "model.layers.1.mlp.gate.weight"
    named = [(key, tensor) for key, tensor in tensors_of(other_model) if key != name]
    config = SyncConfig(method="distributed", verify="first")
    expected = [key for key, _ in named]  # what a wrong table of names would say
    sync = make_weight_sync(config, [server], Peers(), model_path=other_model, expected_names=expected)
    with pytest.raises(SyncError, match=f"{server}: the sync did not reach 1 of its parameters, first {name}"):
        sync.push(iter(named), 1)
    assert weight_version(server) == "1-incomplete"


@pytest.mark.parametrize("method", METHODS)
def test_three_ranks_push_their_own_tensors_and_one_that_has_none_takes_part(
    method: str, server: str, other_model: Path, tmp_path: Path
) -> None:
    named = list(tensors_of(other_model))
    config = SyncConfig(method=method, directory=str(tmp_path), bucket_mb=1)
    exhausted = []

    def rank_main(peers: Peers) -> None:
        sync = make_weight_sync(config, [server], peers, model_path=other_model)

        def own() -> Any:
            for index, (name, tensor) in enumerate(named):
                if peers.rank < 2 and index % 2 == peers.rank:
                    yield name, tensor
            exhausted.append(peers.rank)

        sync.push(own(), 3)
        sync.close()

    run_ranks(3, rank_main)
    assert sorted(exhausted) == [0, 1, 2]
    assert logprob_error(draw(server, version=3), other_model) < 1e-5


def test_a_skipped_sync_is_noticed_by_version_and_by_k3(server: str, tiny_model: Path, other_model: Path) -> None:
    with pytest.raises(EngineReplyError, match="version 0, expected 1: the server missed a weight sync"):
        draw(server, version=1)
    stale = [rollout for group in draw(server) for rollout in group]

    def k3(model: Path) -> float:
        gaps = np.concatenate(
            [
                transformers_logprobs(model, r.prompt.token_ids, r.response_ids.tolist()) - r.rollout_logprobs
                for r in stale
            ]
        )
        return float(np.mean(np.expm1(gaps) - gaps))

    assert k3(tiny_model) < 1e-9
    assert k3(other_model) > 0.1


@pytest.mark.parametrize("method", METHODS)
def test_a_push_that_fails_halfway_leaves_no_weights_that_a_rollout_accepts(
    method: str, server: str, tiny_model: Path, other_model: Path, tmp_path: Path
) -> None:
    def broken() -> Any:
        for index, named in enumerate(tensors_of(other_model)):
            if index == 20:
                raise ValueError("a gather failed")
            yield named

    config = SyncConfig(method=method, directory=str(tmp_path), bucket_mb=1)
    sync = make_weight_sync(config, [server], Peers(), model_path=other_model)
    with pytest.raises(SyncError, match="rank 0: ValueError: a gather failed"):
        sync.push(broken(), 1)
    with pytest.raises(NoServerError, match=r"1-incomplete.* is none of this run's"):
        draw(server, version=1)
    push(method, server, tiny_model, 2, tmp_path)  # the failure can be recovered from
    assert logprob_error(draw(server, version=2), tiny_model) < 1e-5


@pytest.mark.parametrize("method", METHODS)
def test_a_misnamed_tensor_which_the_server_would_ignore_fails_the_push(
    method: str, server: str, other_model: Path, tmp_path: Path
) -> None:
    name = "model.layers.1.mlp.gate.weight"
    renamed = ((f"{key}s" if key == name else key, tensor) for key, tensor in tensors_of(other_model))
    config = SyncConfig(method=method, directory=str(tmp_path))
    sync = make_weight_sync(config, [server], Peers(), model_path=other_model)
    with pytest.raises(SyncError, match=rf"missing \['{name}'\], unknown \['{name}s'\]"):
        sync.push(renamed, 1)
    assert weight_version(server) != "1"


def loads(url: str) -> int:
    """Requests that a server is at."""
    found = json.loads(get(f"{url}/v1/loads?include=core", timeout_s=30))["loads"]
    return sum(load["num_running_reqs"] for load in found)


def test_a_sync_waits_until_generation_is_over(server: str, other_model: Path, tmp_path: Path) -> None:
    groups: list[list[Rollout]] = []
    long = Sampling(64, 1.0, 150, (), seed=1)
    rollouts = threading.Thread(target=lambda: groups.extend(draw(server, PROMPTS[:2], long)))
    rollouts.start()
    deadline = time.monotonic() + 60
    while not loads(server):  # what comes before them is no sync that waits
        assert rollouts.is_alive() and time.monotonic() < deadline
        time.sleep(0.01)
    push("tensor", server, other_model, 1, tmp_path)
    rollouts.join()
    assert {rollout.weight_versions for group in groups for rollout in group} == {(0,)}


def test_bfloat16_weights_arrive_bit_for_bit(server: str, other_model: Path, tmp_path: Path) -> None:
    rounded = [(name, tensor.bfloat16()) for name, tensor in tensors_of(other_model)]
    reference = tmp_path / "rounded"
    reference.mkdir()
    for file in ("config.json", "generation_config.json"):
        (reference / file).write_bytes((other_model / file).read_bytes())
    save_file({name: tensor.float() for name, tensor in rounded}, reference / "model.safetensors", {"format": "pt"})
    for version, method in enumerate(METHODS, start=1):
        config = SyncConfig(method=method, directory=str(tmp_path))
        sync = make_weight_sync(config, [server], Peers(), model_path=other_model)
        sync.push(iter(rounded), version)
        sync.close()
        groups = draw(server, version=version)
        assert logprob_error(groups, reference) < 1e-5
        assert logprob_error(groups, other_model) > 1e-4


def test_prompts_of_a_lone_sentencepiece_model_are_served_and_their_responses_are_text(
    server: str, tiny_model: Path, tmp_path: Path
) -> None:
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(["4 + 8 = 12", "7 + 5 = 12", "9 + 30 = 39", "half as many in May"] * 3),
        model_prefix=str(tmp_path / "tokenizer"),
        model_type="bpe",
        vocab_size=VOCAB_SIZE,
        hard_vocab_limit=False,
        minloglevel=2,
    )
    (tmp_path / "config.json").write_bytes((tiny_model / "config.json").read_bytes())
    (tmp_path / "generation_config.json").write_text("{}")
    (tmp_path / "prompts.jsonl").write_text('{"prompt": "4 + 8 =", "answer": "12"}\n')
    tokenizer = load_tokenizer(tmp_path)
    [asked] = load_prompts(tmp_path / "prompts.jsonl", tokenizer=tokenizer).prompts
    assert tokenizer.decode(asked.token_ids) == "4 + 8 ="
    [group] = draw(server, [asked], Sampling(8, 1.0, 24, tokenizer.stop_ids, seed=2), version=0)
    texts = [tokenizer.decode(rollout.response_ids.tolist()) for rollout in group]
    assert len(set(texts)) == 8  # one of them may be empty: a stop token alone
    stopped = [rollout for rollout in group if rollout.finish_reason == "stop"]
    assert stopped and all(rollout.response_ids[-1] in tokenizer.stop_ids for rollout in stopped)


def test_the_server_freezes_what_its_start_has_made(server: str) -> None:
    assert get(f"{server}/freeze_gc", timeout_s=30) == b"Garbage collection frozen.\n"


def test_an_over_long_prompt_is_refused_in_the_servers_words(server: str) -> None:
    with pytest.raises(RolloutError, match=r"HTTP 400\): The input \(300 tokens\) is longer than the model's context"):
        draw(server, [prompt("long", (5,) * 300)])


PARENT = """
import sys, time
from megatron_gspo.config import RolloutConfig
from megatron_gspo.rollout.sglang.launcher import LocalServers
with LocalServers(RolloutConfig(), sys.argv[1], sys.argv[2], device="cpu", dtype="float32", key="") as servers:
    print(servers.urls[0], servers._servers[0]._process.pid, flush=True)
    time.sleep(600)
"""


def test_a_server_dies_with_its_killed_parent_and_rollouts_in_flight_name_it(tiny_model: Path, tmp_path: Path) -> None:
    require_sglang()
    command = [sys.executable, "-c", PARENT, str(tiny_model), str(tmp_path)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as parent:
        assert parent.stdout is not None
        try:
            url, pid = parent.stdout.readline().split()
            processes = [psutil.Process(int(pid)), *psutil.Process(int(pid)).children(recursive=True)]
            assert len(processes) >= 3
            threading.Timer(0.5, lambda: os.kill(parent.pid, signal.SIGKILL)).start()
            with pytest.raises(EngineUnavailableError, match=f"{url}/generate failed 2 times"):
                draw(url, sampling=Sampling(64, 1.0, 240, (), seed=1), retries=1)
        finally:
            parent.kill()
    deadline = time.monotonic() + 60
    while any(process.is_running() and process.status() != psutil.STATUS_ZOMBIE for process in processes):
        assert time.monotonic() < deadline, f"still running: {processes}"
        time.sleep(0.2)
