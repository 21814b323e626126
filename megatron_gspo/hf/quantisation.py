"""Quantised weights: what ``config.json`` says of them, and what makes weights of them that can be trained."""

from __future__ import annotations

from typing import Any

from megatron_gspo.errors import ConfigError
from megatron_gspo.hf import fp8

ORIGINAL = "take the model that was quantised, in bfloat16"
REMEDIES = {
    "gptq": ORIGINAL,
    "awq": ORIGINAL,
    "bitsandbytes": f"load it in transformers, call dequantize() and save_pretrained(), or {ORIGINAL}",
    "compressed-tensors": f"decompress it with the compressed-tensors package, or {ORIGINAL}",
}
"""``quant_method`` -> what to do; of any other, ``OTHER``."""
OTHER = f"dequantise it with the tool that quantised it, or {ORIGINAL}"
KEYS = ("quantization_config", "compression_config")
"""Of config.json; the second is compressed-tensors' own, of before transformers had one for it."""


def refuse_quantised(config: dict[str, Any]) -> None:
    """Raises ConfigError, with what to do, for weights that training cannot take as they are."""
    settings = settings_of(config)
    if settings is None:
        return
    if not fp8.unknown_settings(settings):
        raise ConfigError(
            "quantization_config in config.json is not supported: servers would quantise what they are sent; "
            "megatron-gspo convert, there and back, makes bfloat16 of these fp8 blocks"
        )
    raise ConfigError(
        f"quantization_config with quant_method = {method_of(settings)!r:.80} in config.json is not supported: "
        f"{remedy(settings)}"
    )


def without_quantization(config: dict[str, Any]) -> dict[str, Any]:
    """``config.json`` of the weights once they are read. Raises ConfigError for any quantisation but fp8 blocks."""
    settings = settings_of(config) or {}
    for name, value in fp8.unknown_settings(settings).items() if settings else ():
        raise ConfigError(
            f"quantization_config with {name} = {value!r:.80} in config.json: only fp8 in blocks of "
            f"{fp8.BLOCK} x {fp8.BLOCK} is read; {remedy(settings)}"
        )
    return {name: value for name, value in config.items() if name not in KEYS}


def settings_of(config: dict[str, Any]) -> dict[str, Any] | None:
    """How the weights are quantised; None where they are not. Raises ConfigError for what is no object."""
    found = next((config[key] for key in KEYS if config.get(key)), None)
    if found is not None and not isinstance(found, dict):
        raise ConfigError(f"quantization_config = {found!r:.80} in config.json is not an object of settings")
    return found


def method_of(settings: dict[str, Any]) -> str:
    """ "gptq", "awq", ...; bitsandbytes used to write none."""
    if settings.get("load_in_4bit") or settings.get("load_in_8bit"):
        return "bitsandbytes"
    return str(settings.get("quant_method") or "(none)")


def remedy(settings: dict[str, Any]) -> str:
    """What makes weights of it that are read here."""
    return REMEDIES.get(method_of(settings), OTHER)
