"""Tiny models of random weights, in the shapes on which layouts go wrong; and a real model cut to its first layers."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import TYPE_CHECKING, Any

from megatron_gspo.errors import ConfigError

if TYPE_CHECKING:
    from transformers import PreTrainedModel

VOCABULARY = 67
"""Divides by nothing."""

_FRAME: dict[str, Any] = {
    "num_hidden_layers": 4,
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_attention_heads": 8,  # heads x head_dim is not the hidden size
    "num_key_value_heads": 4,
    "head_dim": 8,
    "max_position_embeddings": 512,
    "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
    "tie_word_embeddings": False,
    "bos_token_id": None,
    "eos_token_id": VOCABULARY - 1,
    "pad_token_id": None,
}
_EXPERTS: dict[str, Any] = {
    "num_experts": 8,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 24,
    "norm_topk_prob": True,
    "decoder_sparse_step": 1,
    "mlp_only_layers": [0],
}
_SIGMOID: dict[str, Any] = {
    "n_routed_experts": 8,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 24,
    "n_shared_experts": 2,
    "first_k_dense_replace": 1,
    "routed_scaling_factor": 2.5,
    "norm_topk_prob": True,
    "num_mtp_layers": 0,
}
MODELS: dict[str, dict[str, Any]] = {
    "tiny-moe": _EXPERTS,
    "tiny-dense": {"model_type": "qwen3", "tie_word_embeddings": True},
    "uneven": _EXPERTS | {"num_hidden_layers": 5},
    "many-experts": _EXPERTS | {"num_experts": 300, "num_experts_per_tok": 8, "moe_intermediate_size": 8},
    "idle-expert": _EXPERTS,
    "tiny-mixtral": {"model_type": "mixtral", "num_local_experts": 8, "num_experts_per_tok": 2},
    "tiny-qwen2-moe": _EXPERTS
    | {"model_type": "qwen2_moe", "norm_topk_prob": False, "shared_expert_intermediate_size": 40},
    "tiny-olmoe": {"model_type": "olmoe", "num_experts": 8, "num_experts_per_tok": 2, "hidden_size": 64},
    "tiny-deepseek-v3": _SIGMOID
    | {
        "model_type": "deepseek_v3",
        "q_lora_rank": 24,
        "kv_lora_rank": 16,
        "qk_nope_head_dim": 8,
        "qk_rope_head_dim": 4,
        "v_head_dim": 6,
        "n_group": 4,
        "topk_group": 2,
        "num_experts_per_tok": 4,
        "rms_norm_eps": 1e-5,
        "num_key_value_heads": 8,
        "rope_parameters": {
            "rope_type": "yarn",
            "rope_theta": 10000.0,
            "factor": 8.0,
            "original_max_position_embeddings": 64,
            "beta_fast": 32.0,
            "beta_slow": 1.0,
            "mscale": 1.0,
            "mscale_all_dim": 0.7,
        },
    },
    "tiny-moonlight": _SIGMOID
    | {
        "model_type": "deepseek_v3",
        "q_lora_rank": None,
        "kv_lora_rank": 16,
        "qk_nope_head_dim": 8,
        "qk_rope_head_dim": 4,
        "v_head_dim": 8,
        "n_group": 1,
        "topk_group": 1,
        "num_key_value_heads": 8,
    },
    "tiny-qwen2": {
        "model_type": "qwen2",
        "rope_parameters": {
            "rope_type": "yarn",
            "rope_theta": 10000.0,
            "factor": 4.0,
            "original_max_position_embeddings": 16,
        },
    },
    "tiny-llama": {
        "model_type": "llama",
        "rope_parameters": {
            "rope_type": "llama3",
            "rope_theta": 10000.0,
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 64,
        },
    },
    "tiny-glm4-moe": _SIGMOID
    | {
        "model_type": "glm4_moe",
        "n_group": 1,
        "topk_group": 1,
        "use_qk_norm": True,
        "attention_bias": True,
        "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 0.5},
    },
}
"""Name -> what its configuration adds to the frame; a Qwen3-MoE unless ``model_type`` says otherwise.

tiny-moe: a leading dense layer, then 8 experts, top-2. tiny-dense: dense, embedding and head tied. uneven: 5 layers.
many-experts: 300, top-8. idle-expert: expert 0 of each layer gets no token, whatever the input. The others are one of
each further family, with what is particular to it."""


def make_model(name: str, directory: Path, seed: int) -> Path:
    """Writes a model of ``MODELS`` as a float64 Hugging Face directory; imports transformers.

    Weights are random at scale, so that logits differ by O(1), and norms lie in [0.5, 1.5]. Raises ConfigError.
    """
    from transformers import AutoConfig, AutoModelForCausalLM
    from transformers.utils import logging

    if name not in MODELS:
        raise ConfigError(f"no model {name} (known: {', '.join(MODELS)})")
    settings = {"model_type": "qwen3_moe", **_FRAME, **MODELS[name]}
    if settings["model_type"] in ("olmoe", "deepseek_v3", "qwen2"):
        del settings["head_dim"]  # theirs follows from other sizes
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(**settings))
    _randomise(model.double(), seed)
    if name == "idle-expert":
        _starve_expert_0(model)
    logging.disable_progress_bar()
    model.save_pretrained(str(directory))
    return directory


def _randomise(model: PreTrainedModel, seed: int) -> None:
    import torch

    generator = torch.Generator().manual_seed(seed)
    for name, weight in model.named_parameters():
        noise = torch.randn(weight.shape, generator=generator, dtype=torch.float64)
        if name.endswith("norm.weight"):
            noise = 1.0 + 0.5 * torch.tanh(noise)
        elif "embed_tokens" not in name or model.config.tie_word_embeddings:
            noise *= 1.0 / math.sqrt(weight.shape[-1])
        weight.data.copy_(noise)
    for name, bias in model.named_buffers():
        if name.endswith("e_score_correction_bias"):  # of sigmoids; float32 whatever the model's dtype
            noise = 0.05 * torch.randn(bias.shape, generator=generator, dtype=torch.float64)
            bias.data = noise.float()


def _starve_expert_0(model: PreTrainedModel) -> None:
    """The first five experts' logits are 0, z, 1.5 z, -z, -1.5 z: two are above the first one's unless z is 0."""
    for name, weight in model.named_parameters():
        if name.endswith("mlp.gate.weight"):
            row = weight.data[1].clone()
            for expert, factor in enumerate((0.0, 1.0, 1.5, -1.0, -1.5)):
                weight.data[expert] = factor * row


def cut_model(source: Path, directory: Path, layers: int) -> Path:
    """A directory of ``source``'s first layers: its own ``config.json``, and links to the same weights.

    Raises ConfigError when the model has fewer layers.
    """
    from megatron_gspo.hf.catalog import read_config  # it imports torch, and the names of MODELS are asked for without

    config = read_config(source)
    if not 1 <= layers <= config["num_hidden_layers"]:
        raise ConfigError(f"--layers {layers}: {source} has {config['num_hidden_layers']} layers")
    config["num_hidden_layers"] = layers
    if config.get("layer_types"):
        config["layer_types"] = config["layer_types"][:layers]
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "config.json").write_text(json.dumps(config), encoding="utf-8")
    for file in source.glob("*.safetensors*"):
        (directory / file.name).symlink_to(file.resolve())
    return directory
