"""The model families, by Hugging Face architecture. Adding one is one file and one entry."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any, get_type_hints

from megatron_gspo.errors import ConfigError
from megatron_gspo.hf import deepseek_v3, glm4_moe, llama, mixtral, olmoe, qwen2, qwen2_moe, qwen3, qwen3_moe
from megatron_gspo.hf.elsewhere import what_is_there
from megatron_gspo.hf.family import Family, ModelShape
from megatron_gspo.hf.quantisation import without_quantization
from megatron_gspo.untrusted import read_json, strange_entry

FAMILIES: dict[str, Family] = {
    module.FAMILY.architecture: module.FAMILY
    for module in (qwen3, qwen3_moe, mixtral, qwen2_moe, olmoe, deepseek_v3, glm4_moe, qwen2, llama)
}

SIZES = (
    *("hidden_size", "intermediate_size", "vocab_size", "num_hidden_layers", "max_position_embeddings"),
    *("num_attention_heads", "num_key_value_heads", "head_dim"),
    *("num_experts", "num_local_experts", "num_experts_per_tok", "moe_intermediate_size", "decoder_sparse_step"),
    *("shared_expert_intermediate_size", "n_routed_experts", "n_shared_experts", "n_group", "topk_group"),
    *("q_lora_rank", "kv_lora_rank", "qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim"),
)
"""Of config.json, in any family."""
LARGEST = 2**24
FLAGS = (
    *("tie_word_embeddings", "norm_topk_prob", "attention_bias", "use_sliding_window"),
    *("qkv_bias", "use_qk_norm", "rope_interleave"),
)


def read_config(directory: str | Path) -> dict[str, Any]:
    """``config.json`` of a Hugging Face directory. Raises ConfigError when it is missing or not JSON that is read."""
    path = Path(directory) / "config.json"
    try:
        config = read_json(path)
    except (FileNotFoundError, NotADirectoryError):
        raise ConfigError(
            f"{path}: not found: {directory} is no Hugging Face directory: {what_is_there(Path(directory))}"
        ) from None
    except (OSError, ValueError) as error:
        raise ConfigError(f"{path}: {error}") from None
    if not isinstance(config, dict):
        raise ConfigError(f"{path}: holds a {type(config).__name__}, not an object of settings")
    return config


def read_model(
    directory: str | Path, *, dequantised: bool = False, renamed: Mapping[str, str] = MappingProxyType({})
) -> tuple[Family, ModelShape]:
    """The family and shape of a Hugging Face directory.

    Args:
        dequantised: as if its fp8 weights were bfloat16.
        renamed: how an architecture's name may end -> what it is read as then.

    Raises:
        ConfigError: an unknown architecture, or what it cannot do.
    """
    config = read_config(directory)
    if problem := strange_entry(Path(directory)):
        raise ConfigError(f"{directory}: {problem}")
    return model_of(config, directory, dequantised=dequantised, renamed=renamed)


def model_of(
    config: dict[str, Any],
    directory: str | Path,
    *,
    dequantised: bool = False,
    renamed: Mapping[str, str] = MappingProxyType({}),
) -> tuple[Family, ModelShape]:
    """The family and shape of a ``config.json`` that has been read; ``directory`` is what errors name. See
    ``read_model``."""
    config = without_quantization(config) if dequantised else config
    names = config.get("architectures")
    if isinstance(names, str):
        raise ConfigError(f"{directory}: architectures = {names!r:.80} in config.json is a text: write it as a list")
    name = str(names[0]) if isinstance(names, list) and names else "(none)"
    for ending, other in renamed.items():
        name = name.removesuffix(ending) + other if name.endswith(ending) else name
    if name not in FAMILIES:
        raise ConfigError(f"{directory}: architecture {name} is not supported (known: {', '.join(FAMILIES)})")
    _check_sizes(directory, config)
    try:
        shape = FAMILIES[name].shape(config)
        _check_complete(shape)
        _check_shape(shape)
    except ConfigError as error:
        raise ConfigError(f"{directory}: {error}{_defaults_in(str(error), FAMILIES[name], config)}") from None
    except KeyError as error:
        raise ConfigError(f"{directory}: config.json lacks {error}") from None
    except (TypeError, ValueError, AttributeError, ArithmeticError) as error:
        raise ConfigError(f"{directory}: config.json cannot be read as {name}: {error}{_nulls(config)}") from None
    return FAMILIES[name], shape


def _defaults_in(message: str, family: Family, config: dict[str, Any]) -> str:
    """Says which of the settings that a message names stand nowhere in config.json."""
    absent = [f"{name} = {value}" for name, value in family.defaults.items() if name in message and name not in config]
    return f" ({', '.join(absent)}: transformers' default, where config.json has none)" if absent else ""


def _nulls(config: dict[str, Any]) -> str:
    """Says which settings are null: one of them may be what a number was needed of."""
    names = [name for name, value in config.items() if value is None]
    return f" (null in it: {', '.join(names)})" if names else ""


def _check_sizes(directory: str | Path, config: dict[str, Any]) -> None:
    """Raises ConfigError for a size that is no positive integer, or of a size that nothing has."""
    for name in SIZES:
        value = config.get(name)
        if value is not None and (type(value) is not int or not 0 < value <= LARGEST):
            raise ConfigError(
                f"{directory}: {name} = {value!r:.80} in config.json is not an integer in 1 ... {LARGEST}"
            )
    for name in FLAGS:
        value = config.get(name)
        if value is not None and type(value) is not bool:  # the text "false" would count as true
            raise ConfigError(f"{directory}: {name} = {value!r:.80} in config.json is not true or false")


def _check_complete(shape: ModelShape) -> None:
    """Raises TypeError for a number that null was read as: a key that is there and says nothing is no size."""
    for name, kind in get_type_hints(ModelShape).items():
        if kind in (int, float) and getattr(shape, name) is None:
            raise TypeError(f"it gives no {name}")


def _check_shape(shape: ModelShape) -> None:
    """Raises ConfigError for what no model can be, whichever fields of config.json made it so."""
    for name in ("num_layers", "hidden_size", "vocab_size", "num_attention_heads", "num_query_groups", "head_dim"):
        if not getattr(shape, name):
            raise ConfigError(f"config.json gives {name} = {getattr(shape, name)!r}")
    for name in ("rotary_base", "norm_epsilon"):
        value = getattr(shape, name)
        if not (type(value) in (float, int) and 0 < value < math.inf):
            raise ConfigError(f"config.json gives {name} = {value!r:.80}, not a positive number")
    if shape.num_attention_heads % shape.num_query_groups:
        raise ConfigError(
            f"config.json has {shape.num_attention_heads} attention heads for "
            f"{shape.num_query_groups} key-value heads (num_key_value_heads): it must divide"
        )
    width = shape.expert_hidden_size if any(shape.moe_layers) else shape.ffn_hidden_size
    if not (width and shape.max_positions):
        raise ConfigError(f"config.json gives an MLP of {width!r} rows, {shape.max_positions!r} positions")
    if any(shape.moe_layers) and not 0 < (shape.top_k or 0) <= (shape.num_experts or 0):
        raise ConfigError(f"config.json chooses {shape.top_k} of {shape.num_experts} experts per token")
