"""Adapters alone, as PEFT keeps them: ``adapter_config.json`` beside ``adapter_model.safetensors``.

Names are those of the model's matrices as checkpoints have them, an expert's own among them:
``base_model.model.model.layers.0.mlp.experts.3.up_proj.lora_A.weight``. transformers 5 stacks experts in memory, and
PEFT stacks their adapters with them when it loads (docs/lora.md says which families it knows).
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from megatron_gspo.config import LoraConfig
from megatron_gspo.errors import ConfigError
from megatron_gspo.hf.checkpoint import HfReader
from megatron_gspo.hf.directory import write_json
from megatron_gspo.hf.family import Family, ModelShape
from megatron_gspo.hf.lora import leaf_names, lora_targets
from megatron_gspo.untrusted import read_json

ADAPTER = "adapter_model"
"""What the file of tensors is called."""
CONFIG = "adapter_config.json"
PLAIN = {"bias": "none", "fan_in_fan_out": False}
"""Settings that say how tensors lie, or which others there are, and the only values that are read."""
MORE = (
    *("rank_pattern", "alpha_pattern", "modules_to_save", "use_dora", "use_qalora", "lora_bias", "exclude_modules"),
    *("layers_to_transform", "layer_replication", "trainable_token_indices"),
)
"""Settings that make something else of the adapters, unless they are empty."""


def adapter_config(family: Family, model: ModelShape, lora: LoraConfig, base: str) -> dict[str, Any]:
    """``adapter_config.json`` of adapters on the model at ``base``."""
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base,
        "r": lora.rank,
        "lora_alpha": lora.alpha,
        "use_rslora": lora.rslora,
        "target_modules": _target_modules(family, model, lora),
        "target_parameters": _beside_experts(family, model, lora),
        "lora_dropout": 0.0,
        "bias": "none",
        "fan_in_fan_out": False,
        "inference_mode": True,
        "init_lora_weights": True,
    }


def write_adapter_config(directory: Path, family: Family, model: ModelShape, lora: LoraConfig, base: str) -> None:
    """Writes it."""
    write_json(directory / CONFIG, adapter_config(family, model, lora, base))


def open_adapters(directory: Path, family: Family, model: ModelShape, lora: LoraConfig) -> HfReader:
    """The tensors of a directory of adapters, which must be those of ``lora``.

    Raises ConfigError where it is none, or of another rank, alpha or targets; WeightError for its files.
    """
    check_adapters(directory, family, model, lora)
    return HfReader(directory, ADAPTER)


def check_adapters(directory: Path, family: Family, model: ModelShape, lora: LoraConfig) -> None:
    """Raises ConfigError unless ``directory`` holds adapters of ``lora``'s rank, alpha and targets."""
    path = directory / CONFIG
    try:
        given = read_json(path)
    except (OSError, ValueError) as error:
        raise ConfigError(f"lora.path = {directory}: no adapters in PEFT's layout: {error}") from None
    if not isinstance(given, Mapping) or given.get("peft_type") != "LORA":
        raise ConfigError(f"lora.path = {directory}: {CONFIG} is not that of low-rank adapters")
    numbers = {"r": lora.rank, "lora_alpha": lora.alpha, "use_rslora": lora.rslora}
    settings = {"r": "rank", "lora_alpha": "alpha", "use_rslora": "rslora"}
    for name, value in numbers.items():
        if given.get(name, False) != value or isinstance(given.get(name, False), bool) != isinstance(value, bool):
            raise ConfigError(
                f"lora.path = {directory} has {name} = {given.get(name)!r}, and lora.{settings[name]} = {value!r}: use "
                f"the same"
            )
    unread = [name for name, only in PLAIN.items() if given.get(name, only) != only] + list(filter(given.get, MORE))
    for name in unread:
        raise ConfigError(f"lora.path = {directory}: {name} = {given[name]!r:.80} is not supported")
    targets, wanted = given.get("target_modules"), _target_modules(family, model, lora)
    if (sorted(map(str, targets)) if isinstance(targets, list) else targets) != wanted:
        raise ConfigError(
            f"lora.path = {directory} has target_modules = {targets!r:.200}, and lora.targets stands for {wanted}"
        )
    others = given.get("target_parameters")
    if others and others != _beside_experts(family, model, lora):
        raise ConfigError(
            f"lora.path = {directory} has target_parameters = {others!r:.200}, and lora.targets stands for "
            f"{_beside_experts(family, model, lora)}"
        )


def _target_modules(family: Family, model: ModelShape, lora: LoraConfig) -> list[str] | str:
    """The targets as ``target_modules``: what they are called, or, where ``lora.targets`` says whose they are
    ("experts.up_proj"), a regular expression of their whole names."""
    targets = lora_targets(family, model, lora)
    if "." not in "".join(lora.targets):
        return sorted(leaf_names(targets))
    names = sorted({target.weight.removesuffix(".weight") for target in targets})
    patterns = [re.sub(r"\\\{\w+\\\}", r"\\d+", re.escape(name)) for name in names]
    return rf".*\b({'|'.join(patterns)})"


def _beside_experts(family: Family, model: ModelShape, lora: LoraConfig) -> list[str]:
    """Matrices of dense MLPs and shared experts in a model whose routed experts are targets, as ``target_parameters``.

    PEFT takes "gate_proj" and its like for the stacked experts of transformers 5 and for nothing else there, so that
    others of that name would be left out without a word.
    """
    targets = lora_targets(family, model, lora)
    if not any(target.rule.is_expert for target in targets):
        return []
    others = {t.weight for t in targets if ".mlp." in t.rule.megatron and not t.rule.is_expert}
    return sorted(re.sub(r".*\{layer\}\.", "", name) for name in others)
