"""Writing the policy as a Hugging Face directory."""

from __future__ import annotations

import json
import shutil
from itertools import chain
from pathlib import Path

import torch.distributed as dist
from safetensors import SafetensorError

from megatron_gspo.config import RunConfig
from megatron_gspo.errors import WeightError
from megatron_gspo.hf.checkpoint import HfReader, carried_tensors, copy_companions, write_index, write_shards
from megatron_gspo.parallel.exchange import agree, gather_objects
from megatron_gspo.policy.groups import Groups
from megatron_gspo.policy.policy import Policy

SHARD_BYTES = 4 * 1024**3


def save_hugging_face(policy: Policy, config: RunConfig, groups: Groups, directory: Path) -> None:
    """Writes a directory that transformers and SGLang load. Collective; each owner writes its own tensors.

    Layers that the family carries without computing them (multi-token prediction) come from ``model.path`` unchanged.

    It is written under another name and moved when it is whole. The configuration and the tokenizer are those of
    ``model.path``; ``dtype`` becomes the model's.
    """
    unfinished = directory.with_name(directory.name + ".unfinished")
    error: Exception | None = None
    if dist.get_rank() == 0:
        try:
            shutil.rmtree(unfinished, ignore_errors=True)
            unfinished.mkdir(parents=True)
        except OSError as caught:
            error = caught
    agree(error, groups.world)
    weight_map: dict[str, str] = {}
    tensors = policy.weights()
    if dist.get_rank() == 0 and policy.shape.carried_layers:
        source = HfReader(config.model.path)
        tensors = chain(tensors, carried_tensors(source, policy.shape.num_layers, policy.shape.carried_layers))
    try:
        weight_map = write_shards(unfinished, tensors, owner=dist.get_rank(), max_bytes=SHARD_BYTES)
    except (OSError, SafetensorError, WeightError) as caught:
        error = caught
        for _ in tensors:  # the others are gathering with this rank
            pass
    agree(error, groups.world)
    parts = gather_objects(weight_map, groups.world)
    if dist.get_rank() == 0:
        try:
            write_index(unfinished, {name: file for part in parts for name, file in part.items()})
            copy_companions(Path(config.model.path), unfinished)
            _set_dtype(unfinished / "config.json", config.model.dtype)
            shutil.rmtree(directory, ignore_errors=True)
            unfinished.rename(directory)
        except OSError as caught:
            error = caught
    agree(error, groups.world)


def _set_dtype(path: Path, dtype: str) -> None:
    config = json.loads(path.read_text(encoding="utf-8"))
    config.pop("torch_dtype", None)  # the name before transformers 5
    path.write_text(json.dumps(config | {"dtype": dtype}, indent=2) + "\n", encoding="utf-8")
