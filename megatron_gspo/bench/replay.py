"""What Routing Replay costs: bytes and time of the engine's routes on their way, and its share of a step's time.

Routes are decoded in this process, and dealt out by the leader of a replica of gloo ranks. A step is that of
``train/step.py`` without rollouts and weight sync, on one rank and a small model; its ways take turns, so that what
else the machine does falls on all alike, and a ratio is of steps of the same turn.
"""

from __future__ import annotations

import base64
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

from megatron_gspo.batching.packing import pack
from megatron_gspo.bench.launch import on_ranks
from megatron_gspo.bench.measure import Spread, machine
from megatron_gspo.config import ParallelConfig, RunConfig, parse
from megatron_gspo.errors import ConfigError
from megatron_gspo.megatron.groups import make_groups, start_distributed
from megatron_gspo.megatron.policy import Policy
from megatron_gspo.parallel.exchange import exchange
from megatron_gspo.quiet import mute
from megatron_gspo.rollout.sglang.routes import decode_routes
from megatron_gspo.train.batch import Minibatch, place
from megatron_gspo.train.learner import Learner, build_learner
from megatron_gspo.train.routing import deal_routes, open_routing, routing_metrics
from megatron_gspo.train.step import pi_old_pass, train_minibatch
from megatron_gspo.types import RouteShape, Sample

PER = 100_000
"""Tokens that times are given for."""
LAYOUT = ParallelConfig(tensor=2, pipeline=2)
MODES: dict[str, dict[str, Any]] = {
    "off, no drift": {"mode": "off", "drift_every": 0},
    "off": {"mode": "off"},
    "r2": {"mode": "r2"},
    "r3": {"mode": "r3"},
}
"""``[replay]`` of the ways to take a step. The first measures no routing: what the others are held against."""
AIM = 0.03
"""Replay's share of a step's time, at most."""


@dataclass(frozen=True)
class Settings:
    """What is measured; the defaults are Qwen3-30B-A3B's routes."""

    tokens: int = 20_000
    layers: int = 48
    top_k: int = 8
    experts: int = 128
    response: int = 500
    """Tokens per response, its prompt among them."""
    microbatch: int = 10_000
    hidden: int = 64
    """Of the model that takes steps: 4 layers, 16 experts of which 4, as the quickstart's."""
    repetitions: int = 10


def run(settings: Settings) -> dict[str, Any]:
    """{"machine", "settings", "bytes", "decode", "move", "step"}.

    bytes: of a token, in the server's reply, as it is kept, and as a rank of tensor 2 x pipeline 2 gets it. decode,
    move: processor milliseconds per 1e5 tokens. step: seconds by mode, and by what share it exceeds "off, no drift".

    Raises ConfigError for sizes that are no routes of a response.
    """
    _check(settings)
    shape = RouteShape((True,) * settings.layers, settings.top_k, settings.experts)
    (steps,) = on_ranks(1, 1, time_steps, settings).values()
    moved = on_ranks(LAYOUT.world_size(), 1, time_moving, settings, shape)[0]
    return {
        "machine": machine(torch.device("cpu")),
        "settings": asdict(settings),
        "bytes": moved.pop("bytes"),
        "decode": asdict(time_decoding(settings, shape)),
        "move": {name: asdict(spread) for name, spread in moved.items()},
        "step": steps,
    }


def _check(settings: Settings) -> None:
    if settings.tokens < settings.response:
        raise ConfigError(f"--tokens {settings.tokens}: a response has {settings.response}, and there is to be one")
    if settings.top_k > settings.experts:
        raise ConfigError(f"--top-k {settings.top_k}: a token has so many experts, of --experts {settings.experts}")


def draw_routes(rows: int, shape: RouteShape, seed: int) -> np.ndarray:
    """[rows, L, K] int32: experts in even steps from a random one, so that no two of a row are the same."""
    start = np.random.default_rng(seed).integers(0, shape.num_experts, (rows, len(shape.moe_layers), 1))
    places = np.arange(shape.top_k) * (shape.num_experts // shape.top_k)
    return ((start + places) % shape.num_experts).astype(np.int32)


def milliseconds(work: Callable[[], object], settings: Settings) -> Spread:
    """Processor time of ``work`` on ``settings.tokens`` tokens, scaled to ``PER``."""
    found = []
    for _ in range(settings.repetitions):
        started = time.process_time()
        work()
        found.append(1e3 * (time.process_time() - started) * PER / settings.tokens)
    return Spread.of(found)


def time_decoding(settings: Settings, shape: RouteShape) -> Spread:
    """From a reply's text to checked and narrowed routes."""
    responses = settings.tokens // settings.response
    texts = [
        base64.b64encode(draw_routes(settings.response - 1, shape, index).tobytes()).decode()
        for index in range(responses)
    ]
    return milliseconds(lambda: [decode_routes(text, settings.response, shape) for text in texts], settings)


def time_moving(settings: Settings, shape: RouteShape) -> dict[str, Any]:
    """One rank's part of ``LAYOUT``; times are those of its leader, which does the most."""
    mute()
    start_distributed()
    try:
        groups = make_groups(LAYOUT)

        def routes_of(index: int) -> np.ndarray:
            return draw_routes(settings.response - 1, shape, index).astype(shape.dtype)

        samples = [
            sample_of(index, settings.response, routes_of(index)).placed(1.0)
            for index in range(settings.tokens // settings.response)
        ]
        a_batch = max(1, settings.microbatch // settings.response)
        parts = tuple(tuple(samples[start : start + a_batch]) for start in range(0, len(samples), a_batch))
        batches = tuple(pack(part, loss_dtype=torch.float32, tensor=2) for part in parts)
        minibatches = [Minibatch(batches, parts, settings.tokens)]
        stage = groups.pipeline.rank()
        layers = range(stage * settings.layers // 2, (stage + 1) * settings.layers // 2)

        def deal() -> None:
            dealt = deal_routes(minibatches, shape, layers, groups)
            assert len(dealt[0]) == len(parts)

        def swap() -> None:  # as leaders do: each keeps as much as it sends to each other one
            share = -(-len(samples) // groups.world.size())
            exchange(
                [samples[rank * share : (rank + 1) * share] for rank in range(groups.world.size())],
                groups.world,
                torch.device("cpu"),
            )

        own = len(layers) * settings.top_k * shape.dtype.itemsize + 1
        sizes = {
            "reply": round(settings.layers * settings.top_k * 4 * 4 / 3),
            "kept": settings.layers * settings.top_k * shape.dtype.itemsize,
            "a_rank": own / 2,  # of every token; a tensor rank has half of the tokens
        }
        return {"swap": milliseconds(swap, settings), "deal": milliseconds(deal, settings), "bytes": sizes}
    finally:
        dist.destroy_process_group()


def sample_of(group: int, length: int, routes: np.ndarray | None, index: int = 0) -> Sample:
    """A response as long as its prompt."""
    prompt = length // 2
    draw = np.random.default_rng([group, index])
    advantage = 1.0 if index % 2 else -1.0
    return Sample.of_response(
        draw.integers(0, 13, prompt),
        draw.integers(0, 13, length - prompt),
        group=group,
        sample=index,
        rollout_logprobs=np.full(length - prompt, -2.5, np.float32),
        advantage=advantage,
        token_advantages=np.full(length - prompt, advantage),
        routes=routes,
    )


def time_steps(settings: Settings) -> dict[str, Any]:
    """Outer steps of every mode in turns: {"tokens", "seconds": {mode: spread}, "share": {mode: median}}."""
    mute()
    torch.set_num_threads(1)
    start_distributed()
    try:
        with tempfile.TemporaryDirectory() as directory:
            learner, minibatches = a_learner(Path(directory), settings)
        turns: dict[str, list[float]] = {mode: [] for mode in MODES}
        for turn in range(settings.repetitions + 1):
            for mode, own in MODES.items():
                started = time.process_time()
                take_step(with_replay(learner, own), minibatches)
                if turn:  # the first one is for warming up
                    turns[mode].append(time.process_time() - started)
        plain = next(iter(MODES))
        return {
            "tokens": sum(minibatch.tokens for minibatch in minibatches),
            "seconds": {mode: asdict(Spread.of(seconds)) for mode, seconds in turns.items()},
            "share": {
                mode: median(own / base for own, base in zip(seconds, turns[plain], strict=True)) - 1
                for mode, seconds in turns.items()
                if mode != plain
            },
        }
    finally:
        dist.destroy_process_group()


def take_step(learner: Learner, minibatches: list[Minibatch]) -> None:
    """``train.step.outer_step`` from placed samples to the last mini-batch's metrics."""
    samples = [sample for minibatch in minibatches for part in minibatch.samples for sample in part]
    routing = open_routing(learner, samples, minibatches, 0)
    minibatches = pi_old_pass(learner, minibatches, routing)
    routing.mismatch(learner, minibatches)
    for index, minibatch in enumerate(minibatches):
        trained, _, live = train_minibatch(learner, minibatch, index)
        routing_metrics(learner, trained, live, 1)


def with_replay(learner: Learner, settings: dict[str, Any]) -> Learner:
    """The same with another ``[replay]``."""
    tree = learner.config.model_dump(exclude_unset=True) | {"replay": settings}
    return replace(learner, config=RunConfig.model_validate(tree))


def a_learner(directory: Path, settings: Settings) -> tuple[Learner, list[Minibatch]]:
    """A small model's, without servers, and an outer step of 16 prompts x 8 responses of 26 tokens."""
    write_model(directory, settings.hidden)
    tree: dict[str, Any] = {
        "model": {"path": str(directory)},
        "data": {"path": "none"},
        "train": {"run_dir": "nowhere", "minibatches": 4, "prompts_per_step": 16},
        "optimizer": {"lr": 1e-6},
        "rollout": {"group_size": 8, "max_prompt_tokens": 13, "max_response_tokens": 16},
    }
    config = parse(tree)
    learner = build_learner(config, make_groups(config.parallel))
    samples = [sample_of(group, 26, None, index) for group in range(16) for index in range(8)]
    routed = [with_routes(sample, learner.policy) for sample in samples]
    return learner, place(routed, config, learner.groups)


def with_routes(sample: Sample, policy: Policy) -> Sample:
    """The sample with the policy's own routes, as an engine at equal weights would send them."""
    batch = pack([sample.placed(1.0)], loss_dtype=torch.float32)
    with policy.replay.record() as live:
        policy.logprobs([batch])
    routes = live[0].experts_LTK.permute(1, 0, 2)[:-1].contiguous().numpy()
    return replace(sample, routes=routes)


def write_model(directory: Path, hidden: int) -> None:
    """A random Qwen3-MoE of 4 layers, 16 experts, top-4."""
    from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM
    from transformers.utils import logging

    logging.disable_progress_bar()
    torch.manual_seed(0)
    config = Qwen3MoeConfig(
        vocab_size=13,
        hidden_size=hidden,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=hidden // 4,
        num_experts=16,
        num_experts_per_tok=4,
        moe_intermediate_size=hidden // 2,
        intermediate_size=2 * hidden,
        norm_topk_prob=True,
        max_position_embeddings=64,
        initializer_range=hidden**-0.5,
        tie_word_embeddings=False,
        pad_token_id=None,
        bos_token_id=None,
        eos_token_id=12,
    )
    Qwen3MoeForCausalLM(config).save_pretrained(str(directory))
