"""Rotary frequencies that are scaled for longer contexts are transformers' own, to the last bit."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from transformers import LlamaConfig, Qwen2Config, Qwen3Config
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from megatron_gspo.hf.config_json import scaled_rope
from megatron_gspo.hf.rotary import YarnRope, inverse_frequencies

Settings = dict[str, Any]
LLAMA31: Settings = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
LLAMA31 |= {"original_max_position_embeddings": 8192}
PUBLISHED: dict[str, tuple[type, int, float, int, Settings]] = {
    "Llama-3.1-8B": (LlamaConfig, 128, 5e5, 131072, LLAMA31),
    "Llama-3.2-1B": (LlamaConfig, 64, 5e5, 131072, LLAMA31 | {"factor": 32.0}),
    "Qwen3, YaRN to 131,072": (
        *(Qwen3Config, 128, 1e6, 40960),
        {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32768},
    ),
    "Qwen2.5, YaRN": (
        *(Qwen2Config, 128, 1e6, 32768),
        {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32768},
    ),
    "ends of the ramp between dimensions": (
        *(Qwen3Config, 64, 1e4, 4096),
        {"rope_type": "yarn", "factor": 10.0, "original_max_position_embeddings": 1024, "truncate": False},
    ),
    "turns of its own": (
        *(Qwen3Config, 64, 1e4, 4096),
        {"rope_type": "yarn", "factor": 3.0, "original_max_position_embeddings": 512, "beta_fast": 8, "beta_slow": 2},
    ),
    "two scales": (
        *(Qwen3Config, 64, 1e4, 4096),
        {"rope_type": "yarn", "factor": 40.0, "original_max_position_embeddings": 4096}
        | {"mscale": 1.0, "mscale_all_dim": 0.7},
    ),
}
"""What published files say, and corners: (transformers' class, head_dim, base, positions, rope)."""


@pytest.mark.parametrize("name", PUBLISHED)
def test_frequencies_and_the_factor_of_amplitudes_are_those_of_transformers(name: str) -> None:
    kind, dim, base, positions, rope = PUBLISHED[name]
    sizes = {"hidden_size": 4 * dim, "num_attention_heads": 4, "num_key_value_heads": 4, "head_dim": dim}
    config = kind(**sizes, max_position_embeddings=positions, rope_parameters=rope | {"rope_theta": base})
    theirs, amplitude = ROPE_INIT_FUNCTIONS[rope["rope_type"]](config, "cpu")
    scaling = scaled_rope({"max_position_embeddings": positions, "rope_parameters": rope})
    assert torch.equal(inverse_frequencies(dim, base, scaling), theirs)
    assert not torch.equal(inverse_frequencies(dim, base, None), theirs)
    if isinstance(scaling, YarnRope):
        over, under = (0.1 * x * math.log(scaling.factor) + 1 for x in (scaling.mscale, scaling.mscale_all_dim))
        assert over / under == amplitude
    else:
        assert amplitude == 1.0


def test_an_older_file_says_the_same_in_rope_scaling() -> None:
    old = {
        "rope_scaling": {"type": "yarn", **{k: v for k, v in PUBLISHED["Qwen2.5, YaRN"][4].items() if k != "rope_type"}}
    }
    new = {"rope_parameters": PUBLISHED["Qwen2.5, YaRN"][4]}
    assert scaled_rope({"max_position_embeddings": 32768} | old) == scaled_rope({"max_position_embeddings": 7} | new)


def test_without_scaling_there_is_none() -> None:
    assert scaled_rope({"max_position_embeddings": 32768, "rope_theta": 1e6}) is None
    assert scaled_rope({"max_position_embeddings": 32768, "rope_parameters": {"rope_type": "default"}}) is None
