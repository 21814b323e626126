"""Layer specs: what Megatron's ``ModuleSpec`` is told to build where its own local modules cannot serve.

Two modules are ours. Megatron's local norm refuses sequence parallelism, which an MoE layer under tensor parallelism
needs; its local attention refuses packed sequences and context parallelism (``attention`` has ours). Everything else of
a layer is Megatron's.
"""

from __future__ import annotations

from typing import Any

import torch
from megatron.core.fusions.fused_bias_dropout import get_bias_dropout_add
from megatron.core.tensor_parallel.layers import ColumnParallelLinear, RowParallelLinear
from megatron.core.transformer.attention import SelfAttention, SelfAttentionSubmodules
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.mlp import MLP, MLPSubmodules
from megatron.core.transformer.moe.experts import SequentialMLP
from megatron.core.transformer.moe.moe_layer import MoELayer, MoESubmodules
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.transformer_layer import TransformerLayer, TransformerLayerSubmodules

from megatron_gspo.policy.attention import core_attention


class RMSNorm(torch.nn.Module):
    """x / sqrt(mean(x^2) + eps) * weight, in float32 (float64 for float64 input), like Hugging Face's.

    ``weight.sequence_parallel`` tells Megatron that each tensor rank saw its own tokens only, so that the weight's
    gradient is summed over tensor ranks. The norms of heads see all tokens but only the rank's own heads: their
    gradients are partial sums too, and carry the same mark (0.16.1 also knows them by name).
    """

    def __init__(self, config: TransformerConfig, hidden_size: int, eps: float = 1e-6, **_: Any) -> None:
        super().__init__()
        self.eps = eps
        device = "cpu" if config.use_cpu_initialization else torch.cuda.current_device()
        self.weight = torch.nn.Parameter(torch.ones(hidden_size, dtype=config.params_dtype, device=device))
        self.weight.sequence_parallel = config.sequence_parallel  # type: ignore[attr-defined]

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        wide = x if x.dtype == torch.float64 else x.float()
        normed = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + self.eps)
        return self.weight * normed.to(x.dtype)


def block_spec(moe_layers: list[bool], config: TransformerConfig) -> TransformerBlockSubmodules:
    """The spec of one pipeline stage: a layer spec for each of its layers, dense or MoE."""
    dense, moe = (_layer_spec(is_moe, config) for is_moe in (False, True))
    return TransformerBlockSubmodules(
        layer_specs=[moe if is_moe else dense for is_moe in moe_layers], layer_norm=RMSNorm
    )


def _layer_spec(is_moe: bool, config: TransformerConfig) -> ModuleSpec:
    head_norm = RMSNorm if config.qk_layernorm else None
    attention = ModuleSpec(
        module=SelfAttention,
        params={"attn_mask_type": AttnMaskType.causal},
        submodules=SelfAttentionSubmodules(
            linear_qkv=ColumnParallelLinear,
            core_attention=core_attention(config),
            linear_proj=RowParallelLinear,
            q_layernorm=head_norm,
            k_layernorm=head_norm,
        ),
    )
    return ModuleSpec(
        module=TransformerLayer,
        submodules=TransformerLayerSubmodules(
            input_layernorm=RMSNorm,
            self_attention=attention,
            self_attn_bda=get_bias_dropout_add,
            pre_mlp_layernorm=RMSNorm,
            mlp=_moe_spec() if is_moe else _mlp_spec(),
            mlp_bda=get_bias_dropout_add,
        ),
    )


def _mlp_submodules() -> MLPSubmodules:
    return MLPSubmodules(linear_fc1=ColumnParallelLinear, linear_fc2=RowParallelLinear)


def _mlp_spec() -> ModuleSpec:
    return ModuleSpec(module=MLP, submodules=_mlp_submodules())


def _moe_spec() -> ModuleSpec:
    experts = ModuleSpec(module=SequentialMLP, submodules=_mlp_submodules())
    return ModuleSpec(module=MoELayer, submodules=MoESubmodules(experts=experts))
