"""Writing a policy's adapters alone, as a directory that PEFT loads."""

from __future__ import annotations

import shutil
from collections.abc import Iterable
from pathlib import Path

import torch
import torch.distributed as dist
from safetensors import safe_open

from megatron_gspo.config import RunConfig
from megatron_gspo.errors import MegatronGspoError
from megatron_gspo.hf.checkpoint import write_shards
from megatron_gspo.hf.lora import PEFT_PREFIX
from megatron_gspo.hf.names import single_name
from megatron_gspo.hf.peft import ADAPTER, write_adapter_config
from megatron_gspo.hf.stream import StreamWriter, TensorInfo
from megatron_gspo.megatron.checkpoint_files import UNFINISHED, put_in_place
from megatron_gspo.megatron.groups import Groups
from megatron_gspo.megatron.network import Network
from megatron_gspo.parallel.exchange import agree, together
from megatron_gspo.storage import writing

DIRECTORY = "adapter"
"""In a run's directory."""
SHARD_BYTES = 2**30


def save_adapters(policy: Network, config: RunConfig, groups: Groups) -> None:
    """Writes ``adapter`` in the run's directory: ``adapter_config.json`` and one file of tensors. Collective.

    Owners write their own tensors, and the first rank puts the files together, a tensor at a time. Raises WriteError on
    every rank when one cannot.
    """
    directory = Path(config.train.run_dir).absolute() / DIRECTORY
    unfinished = directory.with_name(directory.name + UNFINISHED)
    first = dist.get_rank() == 0
    with writing(directory, "the adapters", "train.resume = true goes on from the newest checkpoint"):
        together(lambda: _make(unfinished) if first else None, groups.world)
        tensors = ((PEFT_PREFIX + name, tensor) for name, tensor in policy.trained_weights())
        agree(_write(unfinished, tensors), groups.world)
        together(lambda: _publish(policy, config, unfinished, directory) if first else None, groups.world)


def _make(unfinished: Path) -> None:
    shutil.rmtree(unfinished, ignore_errors=True)
    unfinished.mkdir(parents=True)


def _write(unfinished: Path, tensors: Iterable[tuple[str, torch.Tensor]]) -> Exception | None:
    """This rank's tensors, each owner's in files of its own. What failed, once all have gathered."""
    try:
        with writing(unfinished, "the adapters"):
            write_shards(unfinished, tensors, owner=dist.get_rank(), max_bytes=SHARD_BYTES)
    except MegatronGspoError as error:
        for _ in tensors:
            pass
        return error
    return None


def _publish(policy: Network, config: RunConfig, unfinished: Path, directory: Path) -> None:
    parts = sorted(unfinished.glob("*.safetensors"))
    files = {part: safe_open(part, framework="pt", device="cpu") for part in parts}
    places = {name: part for part, file in files.items() for name in file.keys()}  # noqa: SIM118 (safe_open's are no dictionary)
    infos = [_info(files[places[name]], name) for name in sorted(places)]
    writer = StreamWriter(unfinished / single_name(ADAPTER), infos)
    for info in infos:
        writer.write(info.name, files[places[info.name]].get_tensor(info.name))
    writer.close()
    files.clear()
    for part in parts:
        part.unlink()
    write_adapter_config(unfinished, policy.family, policy.shape, config.lora, config.model.path)
    put_in_place(unfinished, directory)


def _info(file: safe_open, name: str) -> TensorInfo:
    tensor = file.get_tensor(name)
    return TensorInfo(name, tensor.dtype, tuple(tensor.shape))
