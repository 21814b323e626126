"""The engine's dtype: in which form weights are sent, from what directory servers start, and what servers must be."""

from __future__ import annotations

import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch

from megatron_gspo.config import RolloutConfig
from megatron_gspo.config.rollouts import EIGHT_BITS
from megatron_gspo.config.servers import ServerSizes
from megatron_gspo.errors import ConfigError
from megatron_gspo.hf.catalog import read_config, read_model
from megatron_gspo.hf.directory import write_json
from megatron_gspo.hf.family import Family, ModelShape
from megatron_gspo.hf.fp8 import READ, unknown_settings
from megatron_gspo.hf.fp8_model import in_eight_bits, misfits, quantization_config, served_bytes, with_scales
from megatron_gspo.hf.quantisation import method_of, settings_of
from megatron_gspo.rollout.sglang.cards import EXPECTED
from megatron_gspo.storage import writing
from megatron_gspo.sync import gap
from megatron_gspo.sync.base import NamedTensor

GENERATION = "generation_config.json"


def sent(dtype: str, tensors: Iterator[NamedTensor], family: Family, model: ModelShape) -> Iterator[NamedTensor]:
    """The stream as an engine of ``rollout.engine_dtype`` takes it; expert biases stay in float32."""
    kept = family.bias_names(model)
    if dtype == EIGHT_BITS:
        return gap.in_eight_bits(tensors, in_eight_bits(family, model), kept)
    return gap.in_dtype(tensors, getattr(torch, dtype), kept) if dtype else tensors


def sent_names(dtype: str, names: set[str], family: Family, model: ModelShape) -> set[str]:
    """Names of what ``sent`` makes of tensors ``names``."""
    return with_scales(names, in_eight_bits(family, model)) if dtype == EIGHT_BITS else names


def served_directory(rollout: RolloutConfig, model: str | Path, beside: Path, sizes: ServerSizes) -> Path:
    """What local servers start from: the model's directory, or for eight bits one in ``beside`` that holds no weights.

    Its ``config.json`` says how those are stored that will be sent: SGLang makes layers from it. How many bytes they
    are stands beside it, for the check that they fit. Raises ConfigError.
    """
    if rollout.engine_dtype != EIGHT_BITS:
        return Path(model)
    family, shape = read_model(model)
    check_eight_bits(rollout, model, family, shape, sizes)
    directory, settings = beside / EIGHT_BITS, {"quantization_config": quantization_config(family, shape)}
    with writing(directory):
        directory.mkdir(parents=True, exist_ok=True)
        write_json(directory / "config.json", read_config(model) | settings)
        write_json(directory / EXPECTED, {"bytes": served_bytes(family, shape, READ.itemsize, eight_bits=True)})
        if (ends := Path(model) / GENERATION).is_file():  # at which tokens a response ends
            shutil.copyfile(ends, directory / GENERATION)
    return directory


def check_eight_bits(
    rollout: RolloutConfig, path: str | Path, family: Family, model: ModelShape, sizes: ServerSizes
) -> None:
    """Raises ConfigError for a model, that at ``path``, whose matrices local servers of these ``sizes`` would not take
    in eight bits."""
    if rollout.engine_dtype != EIGHT_BITS or rollout.named:
        return
    wrong = misfits(
        family,
        model,
        attention=max(1, sizes.tensor // sizes.attention_data),
        dense=sizes.tensor,
        experts=max(1, sizes.tensor // sizes.expert),
    )
    if wrong:
        raise ConfigError(
            f'rollout.engine_dtype = "{EIGHT_BITS}" needs matrices of whole blocks of 128 on each rank of a server; '
            f"with {sizes.tensor} tensor rank(s), {', '.join(wrong)}, of {path}: use "
            f"{'a smaller placement.tensor, or a larger placement.expert, or ' * (sizes.tensor > 1)}"
            f'"bfloat16"'
        )


def check_form(dtype: str, url: str, config: Mapping[str, Any], asked: object = None) -> None:
    """Raises ConfigError for a server that holds weights in another form than they will be sent in: it would take them
    without a word, eight bits without their scales or under old ones.

    ``config``: the ``config.json`` that it started from, empty where that cannot be read; ``asked``: its
    ``--quantization``.
    """
    settings = settings_of(dict(config))
    if dtype != EIGHT_BITS and (settings or asked):
        raise ConfigError(
            f"{url} quantises its weights ({asked or method_of(settings or {})}), and would be sent "
            f'{dtype or "those of model.dtype"}: set rollout.engine_dtype = "{EIGHT_BITS}" where it has eight bits '
            f"with scales a block, or start it from weights as they are"
        )
    blocks = settings is not None and not unknown_settings(settings)
    if dtype == EIGHT_BITS and config and not blocks:
        raise ConfigError(
            f'{url} holds no matrices of eight bits with scales a block, and rollout.engine_dtype = "{EIGHT_BITS}" '
            f"sends such: start it from a directory that megatron-gspo convert --dtype {EIGHT_BITS} wrote"
        )
