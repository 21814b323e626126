"""Tiny random models, and transformers' own logprobs of a response."""

from __future__ import annotations

import functools
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, Qwen3MoeConfig, Qwen3MoeForCausalLM

VOCAB_SIZE = 64


def save_tiny_model(directory: Path, seed: int) -> Path:
    config = Qwen3MoeConfig(
        vocab_size=VOCAB_SIZE,
        hidden_size=64,
        intermediate_size=128,
        moe_intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
        num_experts=8,
        num_experts_per_tok=2,
        norm_topk_prob=True,
        max_position_embeddings=256,
        tie_word_embeddings=False,
    )
    model = Qwen3MoeForCausalLM(config).float()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = 0.1 * torch.randn(parameter.shape, generator=generator)
            parameter.copy_(1 + noise if "norm" in name else noise)
    model.save_pretrained(directory)
    return directory


def tensors_of(directory: Path) -> Iterator[tuple[str, torch.Tensor]]:
    for file in sorted(directory.glob("*.safetensors")):
        yield from load_file(file).items()


def transformers_logprobs(
    directory: Path, prompt: Sequence[int], response: Sequence[int], temperature: float = 1.0
) -> np.ndarray:
    """[R] float64: log pi(token | prefix) of transformers' fp32 model."""
    model = _load(directory)
    ids = torch.tensor([[*prompt, *response]])
    with torch.no_grad():
        logits = model(ids).logits[0, len(prompt) - 1 : -1].double() / temperature
    logprobs = logits.log_softmax(-1).gather(1, torch.tensor(response)[:, None])
    return logprobs[:, 0].numpy()


def transformers_next(directory: Path, context: Sequence[int]) -> np.ndarray:
    """[V] float64: log pi(. | context) of transformers' fp32 model."""
    with torch.no_grad():
        return _load(directory)(torch.tensor([list(context)])).logits[0, -1].double().log_softmax(-1).numpy()


def transformers_routes(directory: Path, tokens: Sequence[int]) -> np.ndarray:
    """[T, L, K]: the experts of transformers' fp32 model, from the largest logit down."""
    with torch.no_grad():
        logits = _load(directory)(torch.tensor([list(tokens)]), output_router_logits=True).router_logits
    return torch.stack([layer.topk(2, dim=-1).indices for layer in logits], dim=1).numpy()


@functools.cache
def _load(directory: Path) -> torch.nn.Module:
    return AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32)
