"""Weight sync by every method to a real SGLang server, beside a bare broadcast of the same bytes."""

from __future__ import annotations

import contextlib
import functools
import json
import multiprocessing as mp
import os
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import psutil
import torch
import torch.distributed as dist
from safetensors.torch import save_file

from megatron_gspo.bench.measure import PeakMemory, Spread, machine
from megatron_gspo.config import RolloutConfig, SyncConfig
from megatron_gspo.errors import ConfigError
from megatron_gspo.hf.checkpoint import SINGLE, buckets
from megatron_gspo.rollout.sglang.launcher import LocalServers
from megatron_gspo.runs.waiting import starting_servers
from megatron_gspo.sync.base import HOST_BUCKET_MB, METHODS, WeightSync, make_weight_sync
from megatron_gspo.sync.peers import Peers
from megatron_gspo.types import ServerAccess

AIM = 0.7
"""Of the bare broadcast's rate, for "distributed"."""
BROADCAST = "broadcast"
TIMEOUT = timedelta(seconds=120)


@dataclass(frozen=True)
class Settings:
    """The model (Qwen3-MoE, random float32 weights, 435 MB by default) and how it is sent."""

    layers: int = 2
    hidden: int = 1024
    experts: int = 32
    expert_width: int = 384
    vocab: int = 16384
    bucket_mb: int = HOST_BUCKET_MB
    repetitions: int = 5
    methods: tuple[str, ...] = tuple(METHODS)


def run(settings: Settings, say: Callable[[str], None] = lambda text: None) -> dict[str, Any]:
    """Pushes the model in turns: the bare broadcast, then each method, one turn more than ``repetitions`` to warm up.

    Returns {"machine", "settings", "bytes", "rows": [{"method", "path", "seconds", "bytes_per_s", "ratio",
    "cpu_seconds", "cpu_ratio", "trainer_bytes", "server_bytes"}], "aim"}. ``path``: over what it sends. ``ratio``: the
    broadcast's seconds by the method's in the same turn; ``cpu_*``: processor time of all processes at both ends.
    ``*_bytes``: peak of resident memory above what was held before, of this process and of its children (the server's;
    for the broadcast, its receiver) together.
    ``say`` hears that the server is started. Raises ConfigError for a method that there is not.
    """
    if unknown := [method for method in settings.methods if method not in METHODS]:
        raise ConfigError(f"--methods {unknown[0]}: there are {', '.join(METHODS)}")
    with tempfile.TemporaryDirectory(prefix="bench-sync-") as directory:
        model = Path(directory) / "model"
        weights = make_model(model, settings)
        servers = LocalServers(RolloutConfig(), model, Path(directory) / "logs", device="cpu", dtype="float32")
        with contextlib.ExitStack() as stack:
            with starting_servers(RolloutConfig(), "cpu", say):
                stack.enter_context(servers)
            bare = stack.enter_context(BareBroadcast(weights, settings.bucket_mb))
            syncs = {
                method: make_weight_sync(
                    SyncConfig.model_validate({"method": method, "bucket_mb": settings.bucket_mb, "verify": "off"}),
                    servers.urls,
                    Peers(),
                    model_path=model,
                    access=ServerAccess(servers.key),
                )
                for method in settings.methods
            }
            turns = [_turn(bare, syncs, weights) for _ in range(settings.repetitions + 1)]
            paths = {name: sync.describe()["path"] for name, sync in syncs.items()} | {BROADCAST: "gloo"}
            for sync in syncs.values():
                sync.close()
    size = sum(tensor.nbytes for tensor in weights.values())
    return {
        "machine": machine(torch.device("cpu")),
        "settings": asdict(settings),
        "bytes": size,
        "rows": [{"path": paths[name], **row(name, turns[1:], size)} for name in (BROADCAST, *settings.methods)],
        "aim": AIM,
    }


@dataclass(frozen=True)
class Sample:
    """One send: seconds by the wall and of all processes' threads, and peak bytes here and in the children."""

    seconds: float
    cpu_seconds: float
    trainer_bytes: int
    server_bytes: int


Turn = dict[str, Sample]
"""Of the broadcast and each method."""


def _turn(bare: BareBroadcast, syncs: dict[str, WeightSync], weights: dict[str, torch.Tensor]) -> Turn:
    """Every push is of one version: a server that holds another than a method has left is joined anew."""
    measured = {BROADCAST: _measured(bare.send)}
    for method, sync in syncs.items():
        measured[method] = _measured(functools.partial(sync.push, iter(weights.items()), 1))
    return measured


def _measured(work: Callable[[], object]) -> Sample:
    here = psutil.Process()
    children = here.children(recursive=True)
    memory = PeakMemory(torch.device("cpu")), [PeakMemory(torch.device("cpu"), child.pid) for child in children]
    cpu, started = _cpu_seconds([here, *children]), time.perf_counter()
    work()
    seconds, cpu = time.perf_counter() - started, _cpu_seconds([here, *children]) - cpu
    return Sample(seconds, cpu, memory[0].read(), sum(child.read() for child in memory[1]))


def _cpu_seconds(processes: list[psutil.Process]) -> float:
    times = [process.cpu_times() for process in processes]
    return sum(spent.user + spent.system for spent in times)


def _cpu_ratio(bare: Sample, mine: Sample) -> float:
    """The kernel counts in ticks of 10 ms: less than one is nothing to divide by."""
    tick = 1 / os.sysconf("SC_CLK_TCK")
    return max(bare.cpu_seconds, tick) / max(mine.cpu_seconds, tick)


def row(name: str, turns: list[Turn], size: int) -> dict[str, Any]:
    """What one way to send came to. A ratio is of one turn: the broadcast's time by this one's."""
    mine, bare = [turn[name] for turn in turns], [turn[BROADCAST] for turn in turns]
    seconds = Spread.of([sample.seconds for sample in mine])
    return {
        "method": name,
        "seconds": asdict(seconds),
        "bytes_per_s": size / seconds.median,
        "ratio": asdict(Spread.of([b.seconds / m.seconds for b, m in zip(bare, mine, strict=True)])),
        "cpu_seconds": asdict(Spread.of([sample.cpu_seconds for sample in mine])),
        "cpu_ratio": asdict(Spread.of([_cpu_ratio(b, m) for b, m in zip(bare, mine, strict=True)])),
        "trainer_bytes": max(sample.trainer_bytes for sample in mine),
        "server_bytes": max(sample.server_bytes for sample in mine),
    }


def make_model(directory: Path, settings: Settings) -> dict[str, torch.Tensor]:
    """Writes a Hugging Face directory of a random Qwen3-MoE; returns its tensors."""
    heads, head_dim = 8, 128
    config = {
        "architectures": ["Qwen3MoeForCausalLM"],
        "model_type": "qwen3_moe",
        "vocab_size": settings.vocab,
        "hidden_size": settings.hidden,
        "intermediate_size": settings.hidden,
        "moe_intermediate_size": settings.expert_width,
        "num_hidden_layers": settings.layers,
        "num_attention_heads": heads,
        "num_key_value_heads": heads,
        "head_dim": head_dim,
        "num_experts": settings.experts,
        "num_experts_per_tok": min(8, settings.experts),
        "norm_topk_prob": True,
        "decoder_sparse_step": 1,
        "mlp_only_layers": [],
        "hidden_act": "silu",
        "rms_norm_eps": 1e-6,
        "rope_theta": 1e6,
        "max_position_embeddings": 2048,
        "tie_word_embeddings": False,
        "eos_token_id": 0,
        "torch_dtype": "float32",
    }
    hidden, width = settings.hidden, settings.expert_width
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (settings.vocab, hidden)}
    for number in range(settings.layers):
        layer = f"model.layers.{number}"
        shapes |= {f"{layer}.self_attn.{name}_proj.weight": (heads * head_dim, hidden) for name in "qkv"}
        shapes |= {f"{layer}.self_attn.o_proj.weight": (hidden, heads * head_dim)}
        shapes |= {f"{layer}.self_attn.{name}_norm.weight": (head_dim,) for name in "qk"}
        shapes |= {f"{layer}.{name}_layernorm.weight": (hidden,) for name in ("input", "post_attention")}
        shapes |= {f"{layer}.mlp.gate.weight": (settings.experts, hidden)}
        for expert in range(settings.experts):
            shapes |= {f"{layer}.mlp.experts.{expert}.{name}_proj.weight": (width, hidden) for name in ("gate", "up")}
            shapes |= {f"{layer}.mlp.experts.{expert}.down_proj.weight": (hidden, width)}
    shapes |= {"model.norm.weight": (hidden,), "lm_head.weight": (settings.vocab, hidden)}
    generator = torch.Generator().manual_seed(0)
    weights = {name: 0.02 * torch.randn(shape, generator=generator) for name, shape in shapes.items()}
    directory.mkdir()
    (directory / "config.json").write_text(json.dumps(config), encoding="utf-8")
    save_file(weights, directory / SINGLE, {"format": "pt"})
    return weights


class BareBroadcast:
    """The same bytes in the same buckets, flattened beforehand, to a process that receives and forgets them."""

    def __init__(self, weights: dict[str, torch.Tensor], bucket_mb: int) -> None:
        grouped = buckets(weights.items(), bucket_mb * 1_000_000)
        self._flat = [torch.cat([tensor.flatten().view(torch.uint8) for _, tensor in bucket]) for bucket in grouped]

    def __enter__(self) -> BareBroadcast:
        store = dist.TCPStore("127.0.0.1", 0, 2, True, TIMEOUT, wait_for_workers=False)  # type: ignore[attr-defined]
        sizes = [len(flat) for flat in self._flat]
        context = mp.get_context("spawn")
        self._process = context.Process(target=receive_for_ever, args=(store.port, sizes), daemon=True)
        self._process.start()
        self._group: Any = dist.ProcessGroupGloo(store, 0, 2, TIMEOUT)
        return self

    def __exit__(self, *_: object) -> None:
        self._process.kill()
        self._process.join()

    def send(self) -> None:
        """Sends all, and waits until the receiver has it."""
        for flat in self._flat:
            _broadcast(self._group, flat)
        self._group.barrier().wait()


def receive_for_ever(port: int, sizes: list[int]) -> None:
    """The other end of ``BareBroadcast``, in a process of its own."""
    torch.set_num_threads(1)
    store = dist.TCPStore("127.0.0.1", port, 2, False, TIMEOUT)  # type: ignore[attr-defined]
    group: Any = dist.ProcessGroupGloo(store, 1, 2, timedelta(hours=1))
    while True:
        for size in sizes:
            _broadcast(group, torch.empty(size, dtype=torch.uint8))
        group.barrier().wait()


def _broadcast(group: Any, flat: torch.Tensor) -> None:
    options = dist.BroadcastOptions()
    options.rootRank = options.rootTensor = 0
    group.broadcast([flat], options).wait()
