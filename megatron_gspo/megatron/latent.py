"""Multi-head latent attention (DeepSeek-V2, arXiv 2405.04434, section 2.1), right under tensor parallelism.

Megatron's local spec cuts the down projections over tensor ranks and gathers what they give by a collective whose
backward keeps a rank's own slice: other ranks' heads' parts of the gradient are lost, and only gradients show it. Here,
as with Transformer Engine, every tensor rank has the whole down projections and runs them on its own tokens; Megatron's
forward then takes its path for that, whose collectives are right.
"""

from __future__ import annotations

from typing import Any

import torch
from megatron.core.transformer.multi_latent_attention import MLASelfAttention
from megatron.core.transformer.transformer_config import MLATransformerConfig


class DuplicatedLinear(torch.nn.Module):
    """A linear layer that every tensor rank holds whole, for its own tokens; ``weight`` [out, in].

    Its gradient on one rank is of that rank's tokens: the mark has it summed over tensor ranks.
    """

    def __init__(self, config: MLATransformerConfig, inputs: int, outputs: int) -> None:
        super().__init__()
        device = torch.cuda.current_device()
        self.weight = torch.nn.Parameter(torch.empty(outputs, inputs, dtype=config.params_dtype, device=device))
        self.weight.sequence_parallel = config.sequence_parallel  # type: ignore[attr-defined]

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, None]:
        """Megatron's form: (output, bias)."""
        return torch.nn.functional.linear(x, self.weight), None


class LatentAttention(MLASelfAttention):
    """Megatron's latent attention with duplicated down projections."""

    def __init__(self, config: MLATransformerConfig, *args: Any, **kwargs: Any) -> None:
        super().__init__(config, *args, **kwargs)
        latent = config.kv_lora_rank + config.qk_pos_emb_head_dim
        self.linear_kv_down_proj = DuplicatedLinear(config, config.hidden_size, latent)
        if config.q_lora_rank is not None:
            self.linear_q_down_proj = DuplicatedLinear(config, config.hidden_size, config.q_lora_rank)

    def _resolve_qk_norm_config(self, submodules: Any) -> dict[str, Any]:
        """Asked by 0.19.2 alone: the spec as it stands. Its own answer would fuse a norm into ``linear_q_proj``, which
        has none."""
        names = ("linear_q_proj", "linear_q_up_proj", "linear_kv_up_proj", "q_layernorm", "kv_layernorm")
        return {name: getattr(submodules, name) for name in names}
