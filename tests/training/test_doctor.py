"""``doctor`` against what is real: a rank's memory, counted, and a running SGLang server."""

from __future__ import annotations

import asyncio
import json
import subprocess
import sys
from collections.abc import Awaitable, Callable, Collection
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from aiohttp import web
from aiohttp.test_utils import TestServer
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from megatron_gspo.config import RunConfig, load
from megatron_gspo.doctor import servers
from megatron_gspo.doctor.catalog import CHECKS
from megatron_gspo.doctor.check import Check, examine
from megatron_gspo.doctor.estimate import estimate
from megatron_gspo.doctor.facts import Facts
from megatron_gspo.doctor.passing import Passing, peak
from megatron_gspo.doctor.tensors import tensors_of
from megatron_gspo.hf.catalog import read_model
from megatron_gspo.megatron.groups import make_groups
from megatron_gspo.megatron.policy import Policy
from megatron_gspo.train.batch import pack_on_device
from megatron_gspo.types import PlacedSample
from tests.oracle import make_tiny_qwen3, make_tiny_qwen3_moe
from tests.pool import RankPool
from tests.training.conftest import QUICKSTART

# ------------------------------------------------------------------------------------------------ memory, counted


def bytes_of_a_rank(config: RunConfig) -> dict[str, int]:
    """What a rank holds after an optimizer step, and what autograd keeps of one full micro-batch."""
    groups = make_groups(config.parallel)
    policy = Policy(config, groups)
    parameters = [parameter for chunk in policy.chunks for parameter in chunk.parameters()]
    saved: dict[int, int] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        saved[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    batch = pack_on_device(full_pack(config, policy.shape.vocab_size), config, groups)
    # With virtual stages, enough for the interleaved schedule to reach its steady state.
    microbatches = 2 * config.parallel.pipeline if config.parallel.virtual_pipeline > 1 else 1
    own = {parameter.untyped_storage().data_ptr() for parameter in parameters}
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        policy.gradients([batch] * microbatches, lambda index, logprobs, entropy: logprobs.sum())
    policy.step(0, 10)
    assert policy.optimizer is not None
    optimizers = getattr(policy.optimizer.megatron, "chained_optimizers", [policy.optimizer.megatron])
    states = [
        value
        for optimizer in optimizers
        for state in optimizer.optimizer.state.values()
        for value in state.values()
        if value.dim() and value.untyped_storage().data_ptr() not in own  # a float32 weight is its own master
    ]
    return {
        "weights": sum(parameter.nbytes for parameter in parameters),
        "gradients": sum(parameter.main_grad.nbytes for parameter in parameters),  # type: ignore[attr-defined]
        "optimizer": sum(tensor.nbytes for tensor in states),
        "activations": sum(size for place, size in saved.items() if place not in own),
    }


LENGTH = 64


def full_pack(config: RunConfig, vocab: int) -> list[PlacedSample]:
    """As many sequences of ``LENGTH`` as the token budget holds."""
    rng = np.random.default_rng(0)
    response = np.zeros(LENGTH - 4, np.float32)
    return [
        PlacedSample.of_response(
            group=index,
            sample=0,
            prompt_ids=rng.integers(0, vocab, 4).astype(np.int32),
            response_ids=rng.integers(0, vocab, LENGTH - 4).astype(np.int32),
            rollout_logprobs=response,
            advantage=1.0,
            token_advantages=response.astype(np.float64),
            weight=1.0,
        )
        for index in range(config.train.microbatch_tokens // LENGTH)
    ]


@pytest.fixture(scope="session")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Of every kind of parameter: experts, dense layers, a tied head, a vocabulary that no layout divides."""
    root = tmp_path_factory.mktemp("doctor-models")
    sizes: dict[str, Any] = {"hidden": 128, "vocab": 331, "dtype": torch.float32, "head_dim": 32}
    return {
        "moe": make_tiny_qwen3_moe(root / "moe", moe_intermediate_size=96, **sizes),
        "mixed": make_tiny_qwen3_moe(root / "mixed", tie=True, decoder_sparse_step=2, intermediate_size=192, **sizes),
        "dense": make_tiny_qwen3(root / "dense", intermediate_size=192, **sizes),
    }


@pytest.mark.parametrize(
    ("model", "settings"),
    [
        ("moe", []),
        ("moe", ["parallel.tensor=2"]),
        ("moe", ["parallel.context=2"]),
        ("moe", ["parallel.tensor=2", "parallel.expert_tensor=2"]),
        ("moe", ["parallel.pipeline=2", "parallel.virtual_pipeline=2"]),
        ("dense", ["parallel.pipeline=2", "parallel.stage_layers=[3, 1]"]),
        ("moe", ["parallel.data=2", "parallel.expert=2"]),
        ("moe", ["parallel.tensor=2", "parallel.expert=2", 'model.dtype="bfloat16"']),
        ("mixed", ["parallel.pipeline=2"]),
        ("dense", ["parallel.data=2"]),
        ("dense", ["parallel.tensor=2", 'model.dtype="float64"']),
    ],
)
def test_the_bytes_of_every_rank_are_those_that_doctor_counts(
    ranks: RankPool, models: dict[str, Path], tmp_path: Path, model: str, settings: list[str]
) -> None:
    """Weights, gradients and optimizer state to the byte; activations within a tenth of what autograd keeps."""
    path = tmp_path / "run.toml"
    path.write_text(f'model.path = "{models[model]}"\ndata.path = "none"\ntrain.run_dir = "run"\n')
    budget = ["train.microbatch_tokens=512", "rollout.max_prompt_tokens=4", f"rollout.max_response_tokens={LENGTH - 4}"]
    config = load(path, [*settings, *budget, "train.prompts_per_step=4", "train.minibatches=2"])
    family, shape = read_model(models[model])
    tensors, parallel = tuple(tensors_of(family, shape)), config.parallel
    data = parallel.data_size()
    expected = [
        estimate(config, shape, tensors, data_size=data, stage=rank // (parallel.world_size() // parallel.pipeline))
        for rank in range(parallel.world_size())
    ]
    counted = ranks.run(parallel.world_size(), bytes_of_a_rank, config)
    for ours, real in zip(expected, counted, strict=True):
        assert (ours.weights, ours.gradients) == (real["weights"], real["gradients"])
        if data == 1:
            assert ours.optimizer == real["optimizer"]
    # Data-parallel ranks share the states by position in a buffer, not evenly: their sum is what is known.
    total = sum(real["optimizer"] for real in counted)
    assert total <= sum(ours.optimizer for ours in expected) <= total + 64 * len(expected)
    if config.model.recompute == "off" and parallel.pipeline == 1:
        kept = sum(ours.activations for ours in expected)
        assert kept == pytest.approx(sum(real["activations"] for real in counted), rel=0.1)


class Alive(TorchDispatchMode):
    """The most bytes that tensors made inside were alive with."""

    def __init__(self) -> None:
        super().__init__()
        self.most = 0
        self._storages: dict[int, tuple[StorageWeakRef, int]] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for tensor in filter(torch.is_tensor, tree_leaves(result)):
            storage = tensor.untyped_storage()
            self._storages[storage.data_ptr()] = StorageWeakRef(storage), storage.nbytes()
        self._storages = {place: kept for place, kept in self._storages.items() if not kept[0].expired()}
        self.most = max(self.most, self.alive())
        return result

    def alive(self, places: Collection[int] | None = None) -> int:
        """Bytes now, of the storages at some addresses or of all."""
        return sum(size for place, (_, size) in self._storages.items() if places is None or place in places)


def fullest_moment(config: RunConfig) -> int:
    """The most bytes that one full micro-batch adds to weights and gradients."""
    groups = make_groups(config.parallel)
    policy = Policy(config, groups)
    batch = pack_on_device(full_pack(config, policy.shape.vocab_size), config, groups)
    parameters = [parameter for chunk in policy.chunks for parameter in chunk.parameters()]
    states = {t.untyped_storage().data_ptr() for p in parameters for t in (p, p.main_grad)}  # type: ignore[attr-defined]
    policy.gradients([batch], lambda index, logprobs, entropy: logprobs.sum())  # what the first one alone makes
    with Alive() as alive:
        policy.gradients([batch], lambda index, logprobs, entropy: logprobs.sum())
    return alive.most - alive.alive(states)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("recompute", ["off", "full"])
def test_a_rank_at_its_fullest_holds_what_doctor_counts_for_a_gpu(
    ranks: RankPool, models: dict[str, Path], tmp_path: Path, recompute: str, dtype: str
) -> None:
    """Never less, and no fifth more: under full recompute, what comes and goes is a third of it."""
    path = tmp_path / "run.toml"
    path.write_text(f'model.path = "{models["moe"]}"\ndata.path = "none"\ntrain.run_dir = "run"\n')
    budget = [
        "train.microbatch_tokens=2048",
        "rollout.max_prompt_tokens=4",
        f"rollout.max_response_tokens={LENGTH - 4}",
    ]
    kind = [f'model.recompute="{recompute}"', f'model.dtype="{dtype}"', "train.prompts_per_step=32"]
    config = load(path, [*budget, *kind, "train.minibatches=2"])
    family, shape = read_model(models["moe"])
    needed = estimate(config, shape, tuple(tensors_of(family, shape)), data_size=1, stage=0)
    passing = Passing.of(config, shape, 0, 1)
    states = needed.weights + needed.gradients + needed.optimizer
    counted = peak(needed, passing) - states
    (real,) = ranks.run(1, fullest_moment, config)
    assert real <= counted <= 1.2 * real


# ------------------------------------------------------------------------------------------------------- servers


def look(config: Path, *overrides: str, only: str = "servers") -> list[Check]:
    return examine(Facts(config, overrides), [entry for entry in CHECKS if entry.name == only])


def test_a_real_server_is_said_to_be_what_it_is(server: str, overrides: list[str]) -> None:
    (check,) = look(QUICKSTART / "gspo.toml", *overrides, f'rollout.servers=["{server}"]')
    assert check.status == "ok", check
    assert f"{server}: sglang 0.5.23, " in check.detail and "tp 1 dp 1" in check.detail
    assert "weight version '" in check.detail and "routed experts returned" in check.detail and " ms" in check.detail


def test_the_whole_command_on_a_real_server_ends_well(server: str, overrides: list[str]) -> None:
    settings = [*overrides, f'rollout.servers=["{server}"]']
    command = [sys.executable, "-m", "megatron_gspo.cli", "doctor", str(QUICKSTART / "gspo.toml"), *settings, "--json"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, cwd=QUICKSTART.parents[1], check=False)
    told = json.loads(done.stdout)
    assert (done.returncode, told["ok"]) == (0, True), done.stderr
    found = [check for check in told["checks"] if check["name"] == "servers"]
    assert found and all(check["status"] == "ok" or "busy, or far away" in check["detail"] for check in found)


SOUND_MODEL = {"model_path": "/elsewhere", "weight_version": "3", "architectures": ["Qwen3MoeForCausalLM"]}
SOUND_INFO = {
    "version": "0.5.23",
    "enable_deterministic_inference": True,
    "context_length": 64,
    "tp_size": 1,
    "dp_size": 1,
}


def stand_in(model: Any = SOUND_MODEL, info: Any = SOUND_INFO, wait: float = 0.0) -> TestServer:
    """A server whose pages are these; text stays as it is."""

    def page(content: Any) -> Callable[[web.Request], Awaitable[web.Response]]:
        async def answer(request: web.Request) -> web.Response:
            await asyncio.sleep(wait)
            return web.Response(text=content if isinstance(content, str) else json.dumps(content))

        return answer

    app = web.Application()
    for path, content in {"/health": "", "/model_info": model, "/server_info": info}.items():
        app.router.add_get(path, page(content))
    return TestServer(app)


def look_at(overrides: list[str], *stand_ins: TestServer, more: list[str] | None = None) -> list[Check]:
    async def main() -> list[Check]:
        for stand_in in stand_ins:
            await stand_in.start_server()
        urls = json.dumps([str(stand_in.make_url("")).rstrip("/") for stand_in in stand_ins])
        try:
            return await asyncio.to_thread(
                look, QUICKSTART / "gspo.toml", *overrides, f"rollout.servers={urls}", *(more or [])
            )
        finally:
            for stand_in in stand_ins:
                await stand_in.close()

    return asyncio.run(main())


@pytest.mark.parametrize(
    ("pages", "status", "said"),
    [
        ({}, "ok", "sglang 0.5.23, /elsewhere, weight version '3'"),
        ({"info": SOUND_INFO | {"version": "0.4.9"}}, "error", "sglang 0.4.9 was not tested"),
        ({"info": SOUND_INFO | {"version": 5}}, "error", "sglang is missing"),
        ({"model": SOUND_MODEL | {"architectures": ["LlamaForCausalLM"]}}, "error", "holds another model (/elsewhere)"),
        ({"info": SOUND_INFO | {"enable_deterministic_inference": False}}, "error", "without --enable-determ"),
        (
            {"info": SOUND_INFO | {"context_length": 20}},
            "error",
            "a context of 20 tokens, prompt + response may have 29",
        ),
        ({"model": "<html>"}, "error", "not with JSON: no SGLang server"),
        ({"model": "[1]"}, "error", "/model_info is a list, not an object"),
        ({"info": "{"}, "error", "not with JSON"),
        ({"wait": 1.1}, "warning", "s for a status page: busy, or far away"),
    ],
)
def test_what_is_wrong_with_a_server_is_said(overrides: list[str], pages: dict, status: str, said: str) -> None:
    (check,) = look_at(overrides, stand_in(**pages))
    assert check.status == status and said in check.detail, check


def test_a_server_of_another_model_is_an_error_with_both_values(
    quickstart: Path, overrides: list[str], models: dict[str, Path]
) -> None:
    first = str(quickstart / "model")
    synced = {"model_path": "/dev/shm/gone", "tokenizer_path": first}  # through files, which are gone
    for pages in (SOUND_MODEL | {"model_path": first}, SOUND_MODEL | synced):
        (check,) = look_at(overrides, stand_in(pages), more=[f'model.path="{models["moe"]}"'])
        assert check.status == "error" and f"holds another model ({first})" in check.detail
        assert "vocab_size = 13, model.path has 331" in check.detail and "model.path" in check.fix


@pytest.mark.parametrize(
    ("setting", "said"), [('mode="r3"', "mode = 'r3'"), ("engine_routes_every=5", "engine_routes_every = 5")]
)
def test_a_server_that_returns_no_routes_is_an_error_where_they_are_asked_for(
    overrides: list[str], setting: str, said: str
) -> None:
    (check,) = look_at(overrides, stand_in(), more=[f"replay.{setting}"])
    assert check.status == "error" and f"without --enable-return-routed-experts, and replay.{said}" in check.detail
    able = stand_in(info=SOUND_INFO | {"enable_return_routed_experts": True})
    assert [check.status for check in look_at(overrides, able, more=[f"replay.{setting}"])] == ["ok"]


def test_a_dead_server_and_a_hanging_one_are_named_and_the_others_are_looked_at(
    overrides: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(servers, "TIMEOUT_S", 2.0)
    dead = 'rollout.servers=["http://127.0.0.1:1"]'
    (check,) = look(QUICKSTART / "gspo.toml", *overrides, dead)
    assert check.status == "error" and "http://127.0.0.1:1 did not answer: ConnectionRefusedError" in check.detail
    assert check.fix == "rollout.servers: start the server, or name another"
    hanging, sound = look_at(overrides, stand_in(wait=60.0), stand_in())
    assert "did not answer: TimeoutError" in hanging.detail and sound.status == "ok"


def test_servers_at_different_weight_versions_are_warned_of(overrides: list[str]) -> None:
    *_, last = look_at(overrides, stand_in(), stand_in(model=SOUND_MODEL | {"weight_version": "2"}))
    assert last.status == "warning" and "holds '3'" in last.detail and "holds '2'" in last.detail
