"""The logits of a checkpoint of either kind, in transformers and in Megatron."""

from __future__ import annotations

import math
import multiprocessing
import tempfile
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.distributed as dist

from megatron_gspo.config import ParallelConfig, parse
from megatron_gspo.convert.kinds import kind_of
from megatron_gspo.convert.reference import transformers_logits
from megatron_gspo.convert.sources import MegatronSource, Model
from megatron_gspo.errors import ConfigError
from megatron_gspo.hf.catalog import read_model
from megatron_gspo.hf.checkpoint import write_shards
from megatron_gspo.hf.directory import copy_companions, name_shards, write_index
from megatron_gspo.megatron.groups import Groups, make_groups
from megatron_gspo.megatron.logits import logits_of
from megatron_gspo.megatron.policy import Policy
from megatron_gspo.parallel.exchange import broadcast_object, together

SHARD_BYTES = 1024**3


@dataclass(frozen=True)
class LogitsRow:
    """One checkpoint in one implementation, beside the first checkpoint in transformers."""

    checkpoint: str
    implementation: str
    """ "transformers", or "megatron" and its layout."""
    largest: float
    """Largest absolute difference of a logit."""
    error: float
    """As a part of the largest absolute logit."""


def compare_logits(first: Path, second: Path, token_ids: Sequence[int], parallel: ParallelConfig) -> list[LogitsRow]:
    """float32 logits of both checkpoints on one sequence, in transformers (rank 0) and in Megatron at ``parallel``,
    which the world's ranks must fill. Collective. Both need their own ``config.json``.
    """
    single = make_groups(ParallelConfig())
    together(lambda: _check(first, second, token_ids), single.world)
    sources = together(lambda: [_source(path, single) for path in (first, second)], single.world)
    groups = make_groups(parallel)
    settings = parallel.model_dump(exclude_defaults=True)
    layout = ", ".join(f"{name} {size}" for name, size in settings.items())
    rows: list[LogitsRow] = []
    expected: torch.Tensor | None = None
    for directory, source in zip((first, second), sources, strict=True):
        for name, logits in (
            ("transformers", _in_transformers(directory, source, token_ids, groups)),
            (f"megatron, {layout or 'one rank'}", _in_megatron(directory, token_ids, parallel, groups)),
        ):
            expected = logits if expected is None else expected
            largest = float((logits - expected).abs().max())
            largest = math.inf if math.isnan(largest) else largest
            scale = float(expected.abs().max()) or 1.0  # where all are 0 there is nothing to be relative to
            rows.append(LogitsRow(str(directory), name, largest, largest / scale))
    return rows


def _check(first: Path, second: Path, token_ids: Sequence[int]) -> None:
    for directory in (first, second):
        if not (directory / "config.json").is_file():
            raise ConfigError(f"{directory}: logits need a config.json beside the weights: convert it first")
        _, shape = read_model(directory)
        wrong = [token for token in token_ids if not 0 <= token < shape.vocab_size]
        if wrong or not 2 <= len(token_ids) <= shape.max_positions:
            raise ConfigError(
                f"{directory}: {len(token_ids)} tokens, of 2 to {shape.max_positions}; outside the vocabulary of "
                f"{shape.vocab_size}: {wrong[:3]}"
            )


def _in_transformers(
    directory: Path, source: MegatronSource | None, token_ids: Sequence[int], groups: Groups
) -> torch.Tensor:
    """[T, V], of rank 0; transformers reads a distributed checkpoint from a copy in the temporary directory."""
    logits = together(
        lambda: _run_transformers(directory, source, token_ids) if dist.get_rank() == 0 else None, groups.world
    )
    return broadcast_object(logits, 0, groups.world)


def _source(directory: Path, groups: Groups) -> MegatronSource | None:
    return None if kind_of(directory) == "hugging-face" else MegatronSource(directory, Model(directory, groups))


def _run_transformers(directory: Path, source: MegatronSource | None, token_ids: Sequence[int]) -> torch.Tensor:
    """In a process of its own: what lets Megatron run on a CPU makes transformers leave buffers unfilled."""
    with tempfile.TemporaryDirectory(prefix="logits-") as temporary:
        if source is not None:
            copy = Path(temporary)
            tensors = ((name, source.read(name)) for name in source.model.shapes)
            write_index(copy, name_shards(copy, write_shards(copy, tensors, owner=0, max_bytes=SHARD_BYTES)))
            copy_companions(directory, copy)
            directory = copy
        with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
            return torch.from_numpy(pool.submit(transformers_logits, str(directory), list(token_ids)).result())


def _in_megatron(directory: Path, token_ids: Sequence[int], parallel: ParallelConfig, groups: Groups) -> torch.Tensor:
    tree = {
        "model": {"path": str(directory), "dtype": "float32"},
        "parallel": parallel.model_dump(exclude_defaults=True),
        "data": {"path": "unused"},
        "train": {"run_dir": "nowhere"},
    }
    return logits_of(Policy(parse(tree), groups, trainable=False), token_ids)
