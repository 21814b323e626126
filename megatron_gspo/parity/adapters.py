"""Adapters for a check, whose B are not zero, and what they make of a model, by matrices of the whole in float64."""

from __future__ import annotations

import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from megatron_gspo.config import LoraConfig
from megatron_gspo.hf.catalog import read_model
from megatron_gspo.hf.checkpoint import HfReader
from megatron_gspo.hf.lora import PEFT_PREFIX, AdapterTensor, every_adapter
from megatron_gspo.hf.peft import ADAPTER, write_adapter_config
from megatron_gspo.parity.case import Case

ALPHA = 1.5
"""alpha / rank: other than 1, so that one that is left out shows."""
B_SIZE = 0.5


def make_adapters(case: Case, directory: str, rank: int) -> dict[str, Any]:
    """Writes random adapters of a case's model in PEFT's layout, and the model with them merged in.

    Returns the case's ``lora`` and ``merged``.
    """
    family, shape = read_model(case.path)
    lora = LoraConfig(rank=rank, alpha=ALPHA * rank)
    there = Path(directory)
    there.mkdir(parents=True, exist_ok=True)
    write_adapter_config(there, family, shape, lora, case.path)
    generator, dtype = torch.Generator().manual_seed(case.seed), getattr(torch, case.dtype)
    tensors = {
        PEFT_PREFIX + each.name: (
            torch.randn(each.shape, generator=generator, dtype=torch.float64) * _size(each, rank)
        ).to(dtype)
        for each in every_adapter(family, shape, lora)
    }
    save_file(tensors, there / f"{ADAPTER}.safetensors")
    settings = {"rank": rank, "alpha": lora.alpha, "path": directory}
    merged = there / "merged"
    merged.mkdir(exist_ok=True)
    save_file(dict(_merged(case.path, there, lora.alpha / rank, dtype)), merged / "model.safetensors", {"format": "pt"})
    shutil.copy(Path(case.path) / "config.json", merged)
    return {"lora": settings, "merged": str(merged)}


def adapter_gradients(case: Case, gradients: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Of the adapters, by the chain rule from gradients dW of the merged weights: s B^T dW of A, and s dW A^T of B."""
    found = {}
    scale = case.lora["alpha"] / case.lora["rank"]
    for weight, a, b in _pairs(Path(case.lora["path"])):
        of_weight = gradients[f"{weight}.weight"].double()
        found[f"{weight}.lora_A.weight"] = scale * b.T @ of_weight
        found[f"{weight}.lora_B.weight"] = scale * of_weight @ a.T
    return found


def _merged(path: str, adapters: Path, scale: float, dtype: torch.dtype) -> Iterator[tuple[str, torch.Tensor]]:
    reader = HfReader(path)
    changes = {f"{weight}.weight": (a, b) for weight, a, b in _pairs(adapters)}
    for name in reader.names():
        tensor = reader.read(name)
        if name in changes:
            a, b = changes[name]
            tensor = (tensor.double() + scale * b @ a).to(dtype)
        yield name, tensor


def _pairs(adapters: Path) -> Iterator[tuple[str, torch.Tensor, torch.Tensor]]:
    """(name of a matrix, A, B), float64."""
    tensors = load_file(adapters / f"{ADAPTER}.safetensors")
    for name, tensor in tensors.items():
        if name.endswith(".lora_A.weight"):
            b = tensors[name.replace("lora_A", "lora_B")]
            yield name.removeprefix(PEFT_PREFIX).removesuffix(".lora_A.weight"), tensor.double(), b.double()


def _size(each: AdapterTensor, rank: int) -> float:
    """A's entries are as large as PEFT's first ones; B's, so that B A is about half as large as a weight."""
    return each.shape[1] ** -0.5 if each.name.endswith(".lora_A.weight") else B_SIZE * rank**-0.5
