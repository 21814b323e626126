"""Measures how far servers in each dtype are from the trainer at equal weights, on a CPU.

    python tools/engine_gap.py MODEL [--responses 256] [--tokens 64]

MODEL is a Hugging Face directory whose sizes are whole blocks of 128. The trainer is transformers' model in float32;
weights reach real SGLang servers as a run sends them. One line an engine: nats per token, and what corrections would
meet.
"""

from __future__ import annotations

import argparse
import asyncio
import tempfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch

from megatron_gspo.config import RolloutConfig, SyncConfig
from megatron_gspo.config.servers import ServerSizes
from megatron_gspo.hf.catalog import read_config, read_model
from megatron_gspo.hf.checkpoint import HfReader
from megatron_gspo.hf.fp8 import dequantise, quantise
from megatron_gspo.hf.fp8_model import in_eight_bits
from megatron_gspo.rollout.engine import Sampling, make_engine
from megatron_gspo.rollout.sglang.launcher import LocalServers
from megatron_gspo.sync.base import NamedTensor, make_weight_sync
from megatron_gspo.sync.peers import Peers
from megatron_gspo.train.engine_dtype import sent, sent_names, served_directory
from megatron_gspo.types import Prompt, Rollout

ENGINES = {"float32": ("float32", ""), "bfloat16": ("bfloat16", "bfloat16"), "fp8": ("fp8", "fp8")}
"""Name -> (dtype of the server, ``rollout.engine_dtype``)."""
GROUP = 8
PROMPT_TOKENS = 12


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("--responses", type=int, default=256)
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--engines", nargs="*", default=list(ENGINES), choices=ENGINES)
    options = parser.parse_args()
    from transformers import AutoModelForCausalLM  # seconds, which --help does not have

    torch.set_num_threads(1)
    policy = AutoModelForCausalLM.from_pretrained(options.model, dtype=torch.float32)
    print("| engine | k1 | k3 | largest | twofold | std of log s | geometric outside 0.999..1.001 |")
    print("|---|---|---|---|---|---|---|", flush=True)
    for name, engine in ENGINES.items():
        if name in options.engines:
            for label, ratios in measure(policy, options, engine, streams(options.model, name)):
                print(line(label, ratios), flush=True)


def streams(model: Path, name: str) -> dict[str, list[NamedTensor]]:
    """What is sent to an engine, by what it is called in the table."""
    reader = HfReader(model)
    own = [(key, reader.read(key)) for key in reader.names()]
    if name != "bfloat16":
        return {name: own}
    chosen = in_eight_bits(*read_model(model))
    return {name: own, "bfloat16, weights in eight bits": list(widened(own, chosen))}


def widened(tensors: list[NamedTensor], chosen) -> Iterator[NamedTensor]:  # type: ignore[no-untyped-def]
    """The weights that eight bits stand for, so that activations alone differ from an engine that has them."""
    for name, tensor in tensors:
        yield name, dequantise(name, *quantise(name, tensor)) if chosen(name) else tensor


def measure(  # type: ignore[no-untyped-def]
    policy, options, engine: tuple[str, str], sets: dict[str, list[NamedTensor]]
) -> Iterator[tuple[str, list[np.ndarray]]]:
    """Of each set of weights: its label, and log pi_old - log mu of each response's tokens, drawn by one server."""
    dtype, engine_dtype = engine
    family, shape = read_model(options.model)
    rollout = RolloutConfig(engine_dtype=engine_dtype, server_args=("--load-format", "dummy"), server_start_s=900)
    with tempfile.TemporaryDirectory() as directory:
        logs = Path(directory)
        served = served_directory(rollout, options.model, logs, ServerSizes())
        with LocalServers(rollout, served, logs, device="cpu", dtype=dtype, key="") as servers:
            for version, (label, tensors) in enumerate(sets.items(), start=1):
                names = sent_names(engine_dtype, {name for name, _ in tensors}, family, shape)
                settings = SyncConfig(method="disk", verify="off")
                sync = make_weight_sync(settings, servers.urls, Peers(), model_path=options.model, expected_names=names)
                sync.push(sent(engine_dtype, iter(tensors), family, shape), version)
                sync.close()
                rollouts = asyncio.run(draw(servers.urls, rollout, shape.vocab_size, version, options))
                yield label, [gap(policy, rollout) for rollout in rollouts]


async def draw(  # type: ignore[no-untyped-def]
    urls: tuple[str, ...], rollout: RolloutConfig, vocab_size: int, version: int, options
) -> list[Rollout]:
    generator = torch.Generator().manual_seed(0)
    drawn = torch.randint(2, vocab_size, (options.responses // GROUP, PROMPT_TOKENS), generator=generator).tolist()
    prompts = [Prompt(id=str(index), text="", token_ids=tuple(ids), answer="") for index, ids in enumerate(drawn)]
    ends = tuple(np.atleast_1d(read_config(options.model).get("eos_token_id") or ()).astype(int).tolist())
    sampling = Sampling(group_size=GROUP, temperature=1.0, max_tokens=options.tokens, stop_token_ids=ends, seed=5)
    async with make_engine(urls, rollout, vocab_size=vocab_size) as engine:
        groups = await engine.rollout_groups(prompts, sampling, weight_version=version)
    return [each for group in groups for each in group]


@torch.no_grad()
def gap(policy, rollout: Rollout) -> np.ndarray:  # type: ignore[no-untyped-def]
    ids = torch.tensor([[*rollout.prompt.token_ids, *rollout.response_ids.tolist()]])
    start = len(rollout.prompt.token_ids)
    logprobs = policy(ids).logits[0, start - 1 : -1].double().log_softmax(-1)
    chosen = logprobs.gather(-1, ids[0, start:, None])[:, 0].numpy()
    return np.asarray(chosen - rollout.rollout_logprobs)


def line(label: str, ratios: list[np.ndarray]) -> str:
    tokens = np.concatenate(ratios)
    means = np.array([ratio.mean() for ratio in ratios])
    k3 = np.expm1(tokens) - tokens
    cells = (
        f"{-tokens.mean():.1e}",
        f"{k3.mean():.1e}",
        f"{np.abs(tokens).max():.2g}",
        f"{(np.abs(tokens) > np.log(2)).mean():.2%}",
        f"{means.std():.1e}",
        f"{((means < np.log(0.999)) | (means > np.log(1.001))).mean():.0%}",
    )
    return f"| {label} | {' | '.join(cells)} |"


if __name__ == "__main__":
    main()
