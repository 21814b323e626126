"""Conversion both ways beside a plain copy of the same files, on a random Qwen3-MoE made on the spot."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from megatron_gspo.bench.measure import machine
from megatron_gspo.errors import ConfigError, MegatronGspoError
from megatron_gspo.hf.directory import write_index
from megatron_gspo.hf.stream import StreamWriter, TensorInfo

AIM = 0.7
"""Of cp's rate, each way."""
EXPERTS = 128
HIDDEN, EXPERT_ROWS, HEADS, GROUPS, HEAD_DIM, VOCAB = 1024, 384, 32, 4, 128, 32768
"""Qwen3-30B-A3B's number of experts, heads and head size; half its width, so that a few GB have several layers."""
SHARD_BYTES = 1_000_000_000
POOL = 1 << 24
"""Random numbers that weights are cut from."""


def run(*, gb: float, directory: Path, keep: bool) -> dict[str, Any]:
    """Makes a checkpoint of ``gb`` 1e9 bytes in ``directory``, converts it there and back, and copies it.

    Seconds of a conversion are without the start of its process (imports); it syncs what it writes to disk, and so
    does the copy. Peak memory is the process's largest resident set, mapped pages included.
    """
    layers = layers_of(gb)
    if (free := shutil.disk_usage(directory).free) < 3.3 * gb * 1e9:
        raise ConfigError(f"{directory}: {3.3 * gb:.1f} GB are needed at a time, and {free / 1e9:.1f} GB are free")
    place = Path(tempfile.mkdtemp(prefix="bench-convert-", dir=directory))
    try:
        size = make_checkpoint(place / "hf", layers)
        copies = [copy_seconds(place / "hf", place / "copy")]
        rows = [convert(place / "hf", place / "megatron"), convert(place / "megatron", place / "back")]
        copies.append(copy_seconds(place / "hf", place / "copy"))
        same = subprocess.run(
            [*COMMAND, "convert", "--verify", "--json", str(place / "hf"), str(place / "back")],
            capture_output=True,
            text=True,
            check=False,
        )
    finally:
        if not keep:
            shutil.rmtree(place)
    copy = min(copies)
    for row in rows:
        row |= {"bytes_per_s": round(size / row["seconds"]), "of_cp": round(copy / row["seconds"], 3), "aim": AIM}
    return {
        "machine": machine(torch.device("cpu")),
        "checkpoint": {"bytes": size, "layers": layers, "experts": EXPERTS, "layer_experts_bytes": expert_bytes()},
        "cp": {"seconds": [round(seconds, 3) for seconds in copies], "bytes_per_s": round(size / copy)},
        "rows": rows,
        "same_bytes": same.returncode == 0,
    }


COMMAND = (sys.executable, "-m", "megatron_gspo.cli")


def expert_bytes() -> int:
    """Of one layer."""
    return 3 * EXPERTS * EXPERT_ROWS * HIDDEN * 2


def layers_of(gb: float) -> int:
    """Layers of a checkpoint of about that size."""
    frame = 2 * VOCAB * HIDDEN * 2
    layer = expert_bytes() + sum(info.nbytes for info in _layer(0) if ".experts." not in info.name)
    return max(1, round((gb * 1e9 - frame) / layer))


def make_checkpoint(directory: Path, layers: int) -> int:
    """Writes a Qwen3-MoE of random bfloat16 weights; returns the bytes of its tensors."""
    directory.mkdir()
    generator = torch.Generator().manual_seed(0)
    pool = (torch.randn(POOL, generator=generator) * 0.02).bfloat16()
    groups = [list(_frame()), *(list(_layer(layer)) for layer in range(layers))]
    weight_map, start = {}, 0
    for number, infos in enumerate(groups):
        path = directory / f"model-{number + 1:05d}-of-{len(groups):05d}.safetensors"
        writer = StreamWriter(path, infos)
        for info in infos:
            count = info.nbytes // 2
            start = (start + 4099) % POOL
            repeats = -(-(start + count) // POOL)
            writer.write(info.name, pool.repeat(repeats)[start : start + count].view(info.shape))
            weight_map[info.name] = path.name
        writer.close()
    write_index(directory, weight_map)
    (directory / "config.json").write_text(json.dumps(_config(layers)), encoding="utf-8")
    return sum(info.nbytes for infos in groups for info in infos)


def _frame() -> Iterator[TensorInfo]:
    yield TensorInfo("model.embed_tokens.weight", torch.bfloat16, (VOCAB, HIDDEN))
    yield TensorInfo("model.norm.weight", torch.bfloat16, (HIDDEN,))
    yield TensorInfo("lm_head.weight", torch.bfloat16, (VOCAB, HIDDEN))


def _layer(layer: int) -> Iterator[TensorInfo]:
    rows, groups = HEADS * HEAD_DIM, GROUPS * HEAD_DIM
    shapes: dict[str, tuple[int, ...]] = {
        "input_layernorm": (HIDDEN,),
        "post_attention_layernorm": (HIDDEN,),
        "self_attn.q_norm": (HEAD_DIM,),
        "self_attn.k_norm": (HEAD_DIM,),
        "self_attn.q_proj": (rows, HIDDEN),
        "self_attn.k_proj": (groups, HIDDEN),
        "self_attn.v_proj": (groups, HIDDEN),
        "self_attn.o_proj": (HIDDEN, rows),
        "mlp.gate": (EXPERTS, HIDDEN),
    }
    for expert in range(EXPERTS):
        for name in ("gate_proj", "up_proj"):
            shapes[f"mlp.experts.{expert}.{name}"] = (EXPERT_ROWS, HIDDEN)
        shapes[f"mlp.experts.{expert}.down_proj"] = (HIDDEN, EXPERT_ROWS)
    for name, shape in shapes.items():
        yield TensorInfo(f"model.layers.{layer}.{name}.weight", torch.bfloat16, shape)


def _config(layers: int) -> dict[str, Any]:
    return {
        "architectures": ["Qwen3MoeForCausalLM"],
        "model_type": "qwen3_moe",
        "num_hidden_layers": layers,
        "hidden_size": HIDDEN,
        "intermediate_size": 4 * HIDDEN,
        "vocab_size": VOCAB,
        "num_attention_heads": HEADS,
        "num_key_value_heads": GROUPS,
        "head_dim": HEAD_DIM,
        "num_experts": EXPERTS,
        "num_experts_per_tok": 8,
        "moe_intermediate_size": EXPERT_ROWS,
        "norm_topk_prob": True,
        "decoder_sparse_step": 1,
        "mlp_only_layers": [],
        "tie_word_embeddings": False,
        "max_position_embeddings": 4096,
        "dtype": "bfloat16",
    }


def convert(source: Path, destination: Path) -> dict[str, Any]:
    """One conversion by a process of its own. Raises MegatronGspoError with what it said when it fails."""
    start = time.monotonic()
    command = [*COMMAND, "convert", str(source), str(destination), "--json", "--max-shard-gb", str(SHARD_BYTES / 1e9)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise MegatronGspoError(f"{' '.join(command)}: {done.stderr.strip().splitlines()[-1]}")
    report = json.loads(done.stdout.splitlines()[-1])
    return {
        "to": report["kind"],
        "seconds": report["seconds"],
        "seconds_with_start": round(time.monotonic() - start, 3),
        "files": report["files"],
        "peak_rss_bytes": report["peak_rss_bytes"],
        "start_rss_bytes": report["start_rss_bytes"],
    }


def copy_seconds(source: Path, destination: Path) -> float:
    """Of ``cp``, and of bringing what it wrote to disk; the copy is removed."""
    start = time.monotonic()
    subprocess.run(["cp", "-r", str(source), str(destination)], check=True)
    for path in destination.iterdir():
        descriptor = os.open(path, os.O_RDONLY)
        os.fsync(descriptor)
        os.close(descriptor)
    seconds = time.monotonic() - start
    shutil.rmtree(destination)
    return seconds
