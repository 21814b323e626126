"""What a written Hugging Face directory holds beside its tensors: the one place for training, exports and conversions.

Everything that lies beside the source's weights goes with them: ``config.json``, tokenizers of every kind, chat
templates, generation settings, code that ``auto_map`` names, licence and model card.
"""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from megatron_gspo.errors import WeightError
from megatron_gspo.hf.catalog import read_config
from megatron_gspo.hf.fp8 import READ
from megatron_gspo.hf.names import MODEL, index_name, shard_name, single_name
from megatron_gspo.hf.quantisation import settings_of, without_quantization
from megatron_gspo.hf.remote_code import keep_what_is_there
from megatron_gspo.untrusted import leads_out, read_json

WEIGHTS = frozenset((".safetensors", ".bin", ".pt", ".pth", ".gguf", ".h5", ".msgpack", ".onnx", ".ckpt", ".distcp"))
"""Suffixes of files that hold weights: they are read or left, never copied."""
OF_WEIGHTS = re.compile(
    r".*\.index\.json|checkpoint\.json|metadata\.json|adapter_config\.json|trainer_state\.json|\..*"
)
"""Files that describe the source's weights, or how a trainer made them: not those that are written."""
TEMPLATES = "additional_chat_templates"
"""The one directory that transformers keeps beside a tokenizer."""
DTYPE_KEYS = ("dtype", "torch_dtype")
"""Of config.json: the second was the name before transformers 5."""
SETTINGS = re.compile(r".*config\.json")
"""Files in which ``auto_map`` may stand."""


def companions(source: Path) -> list[Path]:
    """Everything that goes with the weights at ``source``, as paths within it."""
    found = [*source.iterdir(), *(source / TEMPLATES).glob("*.jinja")]
    kept = (path for path in found if path.is_file() and path.suffix not in WEIGHTS)
    return sorted(path.relative_to(source) for path in kept if not OF_WEIGHTS.fullmatch(path.name))


def copy_companions(
    source: Path, directory: Path, *, dtype: str | None = None, quantization: dict[str, Any] | None = None
) -> list[str]:
    """Copies them, byte for byte but for what would be wrong of the weights in ``directory``.

    ``config.json`` loses the quantisation that the weights have lost, gets the ``quantization`` that they now have, and
    names ``dtype`` where that is given and it names another. An ``auto_map`` keeps the references whose code is there;
    the code is copied with what it imports from beside it. Returns a line for each reference that was left out.
    """
    said: list[str] = []
    code: set[Path] = set()
    for path in companions(source):
        (directory / path).parent.mkdir(parents=True, exist_ok=True)
        _copy(source, path, directory)
        if SETTINGS.fullmatch(path.name):
            lines, files = keep_what_is_there(source, directory / path)
            said += lines
            code |= files
    for path in sorted(code):
        (directory / path).parent.mkdir(parents=True, exist_ok=True)
        _copy(source, path, directory)
    _describe_weights(directory, dtype, quantization)
    return said


def check_companions(source: Path) -> None:
    """Raises WeightError for a companion that is a link to a file from outside of ``source``: a copy of it would go
    wherever the trained weights go, and a model from elsewhere may name any file of yours."""
    for path in companions(source):
        _check_inside(source, path)


def _check_inside(source: Path, path: Path) -> None:
    if leads_out(source, source / path):
        raise WeightError(
            f"{source / path} is a link to {os.path.realpath(source / path)}, outside of the directory, and would be "
            f"copied to where the trained weights go: put a copy in its place, or remove it"
        )


def _copy(source: Path, path: Path, directory: Path) -> None:
    _check_inside(source, path)
    shutil.copyfile(source / path, directory / path)


def _describe_weights(directory: Path, dtype: str | None, quantization: dict[str, Any] | None) -> None:
    """Makes ``config.json`` say how the weights are stored, as far as they changed."""
    config = read_config(directory)
    changed = config
    if settings_of(config):
        changed = without_quantization(config)
        dtype = dtype or str(READ).removeprefix("torch.")
    if dtype:
        keys = [key for key in DTYPE_KEYS if key in changed] or list(DTYPE_KEYS[:1])
        changed = changed | dict.fromkeys(keys, dtype)
    if quantization:
        changed = changed | {"quantization_config": quantization}
    if changed != config:
        write_json(directory / "config.json", changed)


def name_stop_tokens(directory: Path, stop_ids: Sequence[int]) -> None:
    """Adds ids to those at which ``generation_config.json`` ends a response, so that whoever serves the directory stops
    where training did."""
    path = directory / "generation_config.json"
    settings = read_json(path) if path.is_file() else {}
    named = settings.get("eos_token_id")
    own = named if isinstance(named, list) else [] if named is None else [named]
    write_json(path, settings | {"eos_token_id": list(dict.fromkeys([*own, *stop_ids]))})


def write_json(path: Path, content: Any) -> None:
    """Writes it indented, with a line's end."""
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def name_shards(directory: Path, weight_map: Mapping[str, str]) -> dict[str, str]:
    """Gives files that were numbered while nobody knew how many there would be the names that transformers gives.

    ``weight_map``: {tensor: file}; returns it with the new names. They are sorted by their old ones.
    """
    files = sorted(set(weight_map.values()))
    names = {file: shard_name(MODEL, number, len(files)) for number, file in enumerate(files)}
    for file, name in names.items():
        (directory / file).rename(directory / name)
    return {tensor: names[file] for tensor, file in weight_map.items()}


def write_index(directory: Path, weight_map: Mapping[str, str], stem: str = MODEL) -> list[str]:
    """Writes the index that makes several files one model; returns its name, or nothing where one file needs none."""
    files = sorted(set(weight_map.values()))
    if files == [single_name(stem)]:
        return []
    total = sum(tensor_bytes(directory / file) for file in files)
    index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
    write_json(directory / index_name(stem), index)
    return [index_name(stem)]


def tensor_bytes(path: Path) -> int:
    """Of all tensors in a safetensors file: it is eight bytes, a header of as many as they say, and tensors.

    Raises WeightError for a file that is shorter.
    """
    with path.open("rb") as file:
        header = int.from_bytes(file.read(8), "little")
    size = path.stat().st_size - 8 - header
    if size < 0:
        raise WeightError(f"{path}: {path.stat().st_size} bytes, and a header of {header}: it is cut short")
    return size
