"""Weights that are there in another form than the one that is read: which, and what makes it one that is."""

from __future__ import annotations

import re
from collections.abc import Collection, Sequence
from pathlib import Path

from megatron_gspo.hf.names import holds_weights
from megatron_gspo.hf.quantisation import ORIGINAL
from megatron_gspo.untrusted import read_json

SAVE_AGAIN = "load it in transformers (AutoModelForCausalLM) and save_pretrained() it"
MERGE = "an adapter, not a model: merge it into its base{base} with peft (merge_and_unload()) and save the result"
FILES = (
    (r".*\.(incomplete|part|partial|crdownload|aria2|download)", "a download that did not end: download it again"),
    (r"adapter_(model|config)\..*", MERGE),
    (r".*\.gguf", "llama.cpp's format: take the model that it was made from, in safetensors"),
    (r"consolidated.*", "in the names of its maker, not of transformers: take the files that transformers reads"),
    (r".*\.(bin|pt|pth|ckpt)(\.index\.json)?", f"pickles, which are not opened here: {SAVE_AGAIN}"),
    (r".*\.(h5|msgpack|onnx|tflite)", "another framework's: take the model in safetensors"),
    (r".*\.safetensors", "by another name: call it model.safetensors, if it is the whole model"),
    (r"\.metadata|.*\.distcp", "a Megatron checkpoint: megatron-gspo convert makes a Hugging Face directory of it"),
)
"""(Names of files, what they are and what to do), the first that fits."""
NO_WEIGHTS = re.compile(r"(training_args|optimizer|scheduler|rng_state|scaler).*\.(bin|pt|pth)")
"""What a trainer leaves beside weights."""
EMBEDDING = "embed_tokens.weight"
TENSORS = (
    (r".*\.(qweight|qzeros|g_idx)", f"GPTQ's or AWQ's: {ORIGINAL}"),
    (r".*\.(absmax|quant_map|quant_state\..*|SCB)", f"of bitsandbytes: {SAVE_AGAIN} after dequantize(), or {ORIGINAL}"),
    (r".*\.(weight_packed|weight_scale|weight_zero_point)", f"of compressed-tensors: decompress it, or {ORIGINAL}"),
    (r".*\.lora_[AB]\..*", MERGE.format(base="")),
    (r".*\.experts\.(gate_up_proj|down_proj)", "stacked experts, but not as [experts, 2 x rows, hidden] and [experts, "
     f"hidden, rows], as transformers writes them for this family: {SAVE_AGAIN}"),
)  # fmt: skip
"""(Names of tensors, what they are and what to do)."""
NAMED = 3


def what_is_there(directory: Path) -> str:
    """The weights of a directory that holds none under the names that are read."""
    if not directory.is_dir():
        return "it is a file, not a directory" if directory.exists() else "no such directory"
    names = sorted(path.name for path in directory.iterdir() if not path.is_dir())
    gone = [name for name in names if not (directory / name).exists()]
    if gone:
        return f"{some(gone)} links to a file that is not there: download the model again"
    found: dict[str, list[str]] = {}
    for name in names:
        words = next((words for pattern, words in FILES if re.fullmatch(pattern, name)), None)
        if words and not NO_WEIGHTS.fullmatch(name):
            found.setdefault(words.format(base=_base(directory)), []).append(name)
    if found:
        return "; ".join(f"{some(files)} is there, {words}" for words, files in found.items())
    below = [path.name for path in sorted(directory.iterdir()) if path.is_dir() and holds_weights(path)]
    return f"there are weights in {some(below)}: name that directory" if below else "there are no weights in it"


def other_names(stored: Collection[str]) -> str:
    """What tensors are that no family's table names, and what to do; empty where nothing is known of them."""
    for pattern, words in TENSORS:
        found = sorted(name for name in stored if re.fullmatch(pattern, name))
        if found:
            return f"there is {some(found)}, {words}"
    names = (name.removesuffix(EMBEDDING) for name in sorted(stored) if name.endswith(EMBEDDING))
    prefix = next(names, "model.")
    if prefix == "model.":
        return ""
    if not prefix:
        return f"the names lack 'model.' (there is {EMBEDDING}): a model saved without its head; {SAVE_AGAIN}"
    return f"the names begin with {prefix!r}, where 'model.' is read: of another model around this one; {SAVE_AGAIN}"


def some(names: Sequence[str]) -> str:
    """ "a, b, c and 4 more"."""
    more = f" and {len(names) - NAMED} more" if len(names) > NAMED else ""
    return ", ".join(names[:NAMED]) + more


def _base(directory: Path) -> str:
    """The model that an adapter was trained on, where it says so."""
    try:
        base = read_json(directory / "adapter_config.json")["base_model_name_or_path"]
    except (OSError, ValueError, KeyError, TypeError):
        return ""
    return f" ({base!s:.120})"
