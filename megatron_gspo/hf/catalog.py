"""The model families, by Hugging Face architecture. Adding one is one file and one entry."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from megatron_gspo.errors import ConfigError
from megatron_gspo.hf import qwen3, qwen3_moe
from megatron_gspo.hf.family import Family, ModelShape

FAMILIES: dict[str, Family] = {family.architecture: family for family in (qwen3.FAMILY, qwen3_moe.FAMILY)}


def read_config(directory: str | Path) -> dict[str, Any]:
    """``config.json`` of a Hugging Face directory. Raises ConfigError when it is missing or not JSON."""
    path = Path(directory) / "config.json"
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ConfigError(f"{path}: not found; model.path must be a Hugging Face directory") from None
    except (OSError, ValueError) as error:
        raise ConfigError(f"{path}: {error}") from None
    if not isinstance(config, dict):
        raise ConfigError(f"{path}: holds a {type(config).__name__}, not an object of settings")
    return config


def read_model(directory: str | Path) -> tuple[Family, ModelShape]:
    """The family and shape of a Hugging Face directory. Raises ConfigError for an unknown architecture."""
    config = read_config(directory)
    names = config.get("architectures") or ["(none)"]
    if names[0] not in FAMILIES:
        raise ConfigError(f"{directory}: architecture {names[0]} is not supported (known: {', '.join(FAMILIES)})")
    family = FAMILIES[names[0]]
    try:
        return family, family.shape(config)
    except KeyError as error:
        raise ConfigError(f"{directory}: config.json lacks {error}") from None
