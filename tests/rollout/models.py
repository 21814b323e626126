"""Tiny random models, and transformers' own logprobs of a response."""

from __future__ import annotations

import functools
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModelForCausalLM, Qwen3MoeConfig, Qwen3MoeForCausalLM

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
    return _save_random(Qwen3MoeForCausalLM(config), directory, seed)


FRAME: dict[str, Any] = {
    "vocab_size": VOCAB_SIZE,
    "hidden_size": 64,
    "intermediate_size": 96,
    "moe_intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "num_experts_per_tok": 2,
    "max_position_embeddings": 256,
    "tie_word_embeddings": False,
    "bos_token_id": None,
    "eos_token_id": 1,
    "pad_token_id": None,
}
FURTHER: dict[str, dict[str, Any]] = {
    "glm4_moe": {
        "n_routed_experts": 8,
        "n_shared_experts": 1,
        "n_group": 1,
        "topk_group": 1,
        "first_k_dense_replace": 1,
        "routed_scaling_factor": 2.5,
        "use_qk_norm": True,
        "attention_bias": True,
    },
    "qwen2_moe": {"num_experts": 8, "shared_expert_intermediate_size": 48, "norm_topk_prob": False},
}
"""Model type -> what is particular to it: shared experts, expert biases, a leading dense layer, biases of attention."""


SERVED: dict[str, dict[str, Any]] = FURTHER | {
    "qwen3": {},
    "qwen2": {},
    "llama": {},
    "qwen3_moe": {"num_experts": 8, "norm_topk_prob": True},
    "mixtral": {"num_local_experts": 8},
    "olmoe": {"num_experts": 8, "num_key_value_heads": 4, "pad_token_id": 2},
    "deepseek_v3": {
        "n_routed_experts": 8,
        "n_shared_experts": 1,
        "n_group": 1,
        "topk_group": 1,
        "first_k_dense_replace": 1,
        "num_key_value_heads": 4,
        "q_lora_rank": 32,
        "kv_lora_rank": 32,
        "qk_nope_head_dim": 16,
        "qk_rope_head_dim": 16,
        "v_head_dim": 16,
    },
}
"""Every family's."""


WIDE: dict[str, Any] = {
    "hidden_size": 128,
    "intermediate_size": 128,
    "moe_intermediate_size": 128,
    "head_dim": 64,
    "n_routed_experts": 4,
    "num_experts": 4,
    "num_local_experts": 4,
    "shared_expert_intermediate_size": 128,
    "q_lora_rank": 128,
    "kv_lora_rank": 128,
    "v_head_dim": 32,
}
"""Sizes of whole blocks of 128, but for latent attention's key and value: 144 rows."""


def save_wide_model(model_type: str, directory: Path, seed: int, **asked: Any) -> Path:
    """A random model of ``SERVED`` that an engine takes in eight bits."""
    own = {name: size for name, size in WIDE.items() if name in FRAME | SERVED[model_type]}
    if model_type == "deepseek_v3":
        del own["head_dim"]  # its heads follow from other sizes
    if model_type == "qwen2_moe":
        own["num_attention_heads"] = 2  # SGLang works the size of its heads out: the model's over their number
    return save_further_model(model_type, directory, seed, **own | asked)


def save_further_model(model_type: str, directory: Path, seed: int, **asked: Any) -> Path:
    """A tiny random model of ``SERVED``, with what else its ``config.json`` asks for."""
    config = AutoConfig.for_model(**FRAME | SERVED[model_type] | asked, model_type=model_type)
    return _save_random(AutoModelForCausalLM.from_config(config), directory, seed)


@torch.no_grad()
def _save_random(model: torch.nn.Module, directory: Path, seed: int) -> Path:
    generator = torch.Generator().manual_seed(seed)
    for name, tensor in [*model.float().named_parameters(), *model.named_buffers()]:
        noise = 0.1 * torch.randn(tensor.shape, generator=generator)
        if isinstance(tensor, torch.nn.Parameter) or name.endswith("e_score_correction_bias"):
            tensor.copy_(1 + noise if "norm" in name else noise)
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
