"""What a directory holds, and which of its files go with the weights."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Literal

from megatron_gspo.errors import ConfigError
from megatron_gspo.hf.carried import CARRIED
from megatron_gspo.hf.catalog import read_config
from megatron_gspo.hf.checkpoint import INDEX, SINGLE, index_name
from megatron_gspo.hf.quantisation import without_quantization
from megatron_gspo.policy.checkpoint_files import HEADER, METADATA, read_header
from megatron_gspo.policy.checkpoint_write import COMMON

Kind = Literal["hugging-face", "megatron"]
WEIGHTS = frozenset((".safetensors", ".bin", ".pt", ".pth", ".gguf", ".h5", ".msgpack", ".onnx", ".ckpt", ".distcp"))
"""Suffixes of files that hold weights: they are converted or left, never copied."""
OURS = frozenset(
    (INDEX, index_name(CARRIED), "pytorch_model.bin.index.json", HEADER, METADATA, COMMON, "metadata.json")
)


def kind_of(directory: Path) -> Kind:
    """Raises ConfigError for a directory that is neither."""
    if not directory.is_dir():
        raise ConfigError(f"{directory}: no such directory")
    if (directory / METADATA).is_file():
        return "megatron"
    if (directory / INDEX).is_file() or (directory / SINGLE).is_file():
        return "hugging-face"
    raise ConfigError(
        f"{directory}: neither {SINGLE} or {INDEX} (Hugging Face) nor {METADATA} (a Megatron distributed checkpoint)"
    )


def holds_checkpoint(directory: Path) -> bool:
    """Whether ``kind_of`` knows it."""
    try:
        kind_of(directory)
    except ConfigError:
        return False
    return True


def home_of_config(directory: Path, config: Path | None) -> Path:
    """The directory that holds ``config.json`` and the tokenizer of a checkpoint.

    ``config`` where it is given; else the checkpoint itself; else ``model.path`` of the run that wrote it.
    """
    candidates = [config] if config else [directory]
    if not config and (directory / HEADER).is_file():
        path = read_header(directory)["extra"].get("config", {}).get("model", {}).get("path")
        candidates += [Path(path)] if path else []
    for candidate in candidates:
        if (candidate / "config.json").is_file():
            return candidate
    places = ", ".join(map(str, candidates))
    raise ConfigError(f"{directory}: no config.json in {places}: name the Hugging Face directory with --config")


def companions(directory: Path) -> list[Path]:
    """Configuration, tokenizer, generation files and whatever else lies beside the weights."""
    return [
        path
        for path in sorted(directory.iterdir())
        if path.is_file() and path.suffix not in WEIGHTS and path.name not in OURS and not path.name.startswith(".")
    ]


def copy_companions(source: Path, directory: Path) -> None:
    """Copies them byte for byte; but ``config.json`` loses the quantisation that the weights have lost."""
    for path in companions(source):
        shutil.copyfile(path, directory / path.name)
    config = read_config(directory)
    if config.get("quantization_config"):
        text = json.dumps(without_quantization(config), indent=2)
        (directory / "config.json").write_text(text + "\n", encoding="utf-8")


def check_replaceable(destination: Path, *, overwrite: bool) -> None:
    """Raises ConfigError unless a conversion may put its result at ``destination``."""
    if not destination.exists() and not destination.is_symlink():
        return
    if not destination.is_dir() or destination.is_symlink():
        raise ConfigError(f"{destination} exists and is not a directory: name another destination")
    if not any(destination.iterdir()):
        return
    if not overwrite:
        raise ConfigError(f"{destination} exists: name another destination, or replace it with --overwrite")
    if not holds_checkpoint(destination):
        raise ConfigError(f"{destination} holds no checkpoint, so nothing replaces it: name another")


def set_dtype(path: Path, dtype: str) -> None:
    """Makes ``config.json`` name the dtype of the weights, where it names another."""
    config = json.loads(path.read_text(encoding="utf-8"))
    key = "torch_dtype" if "torch_dtype" in config else "dtype"
    if config.get(key) != dtype:
        path.write_text(json.dumps(config | {key: dtype}, indent=2) + "\n", encoding="utf-8")
