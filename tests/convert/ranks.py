"""What the ranks of a test do, and checkpoints read without the converter."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open

from tests.pool import RankPool

Tensors = dict[str, tuple[str, tuple[int, ...], bytes]]
"""Name -> (dtype, shape, bytes)."""


def tensors_of(directory: Path) -> Tensors:
    """Every tensor of a directory's safetensors files; no index is believed."""
    found: Tensors = {}
    for path in sorted(directory.glob("*.safetensors")):
        with safe_open(path, framework="pt") as file:
            for name in file.keys():  # noqa: SIM118  # no mapping: it has no iterator
                assert name not in found, f"{name} is stored twice"
                found[name] = plain(file.get_tensor(name))
    return found


def plain(tensor: torch.Tensor) -> tuple[str, tuple[int, ...], bytes]:
    flat = tensor.contiguous().flatten().view(torch.uint8)
    return str(tensor.dtype), tuple(tensor.shape), flat.numpy().tobytes()


def names_of_index(directory: Path) -> set[str]:
    return set(json.loads((directory / "model.safetensors.index.json").read_text())["weight_map"])


def convert(pool: RankPool, source: Path, destination: Path, world: int = 1, **options: Any) -> Any:
    """The first rank's report."""
    return pool.run(world, convert_rank, source, destination, options)[0]


def convert_rank(source: Path, destination: Path, options: dict[str, Any]) -> Any:
    from megatron_gspo.config import ParallelConfig
    from megatron_gspo.convert.run import Options, Show
    from megatron_gspo.convert.run import convert as run
    from megatron_gspo.megatron.groups import make_groups

    return run(source, destination, Options(**options), make_groups(ParallelConfig()), Show())


def make_policy(path: Path, parallel: dict[str, int], dtype: str) -> Any:
    from megatron_gspo import config
    from megatron_gspo.megatron.groups import make_groups
    from megatron_gspo.megatron.policy import Policy

    tree = {
        "model": {"path": str(path), "dtype": dtype},
        "data": {"path": "unused"},
        "train": {"run_dir": "nowhere"},
        "parallel": parallel,
    }
    settings = config.parse(tree)
    return Policy(settings, make_groups(settings.parallel), trainable=False)


def weights_rank(path: Path, parallel: dict[str, int], dtype: str) -> Tensors:
    """What a policy at a layout holds after loading a checkpoint, as this rank streams it."""
    return {name: plain(tensor) for name, tensor in make_policy(path, parallel, dtype).weights()}


def save_rank(path: Path, parallel: dict[str, int], dtype: str, directory: Path) -> None:
    """Loads at a layout and writes what training writes."""
    from megatron_gspo.megatron.checkpoint import save_checkpoint

    models = {"policy": make_policy(path, parallel, dtype)}
    save_checkpoint(models, directory, {"config": {"model": {"path": str(path)}}})


def verify_rank(first: Path, second: Path, model: str = "policy") -> Any:
    from megatron_gspo.config import ParallelConfig
    from megatron_gspo.convert.run import Show
    from megatron_gspo.convert.verify import verify_tensors
    from megatron_gspo.megatron.groups import make_groups

    return verify_tensors(first, second, None, make_groups(ParallelConfig()), Show(), model=model)


def store(directory: Path, change: dict[str, torch.Tensor | None]) -> None:
    """Replaces, adds or (None) removes tensors of a single safetensors file."""
    from safetensors.torch import load_file, save_file

    tensors = load_file(directory / "model.safetensors") | change
    save_file({n: t for n, t in tensors.items() if t is not None}, directory / "model.safetensors", {"format": "pt"})


def logits_rank(first: Path, second: Path, tokens: list[int], parallel: dict[str, int]) -> Any:
    from megatron_gspo.config import ParallelConfig
    from megatron_gspo.convert.logits import compare_logits

    return compare_logits(first, second, tokens, ParallelConfig(**parallel))
