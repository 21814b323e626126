"""Layer specs: what Megatron's ``ModuleSpec`` is told to build where its own local modules cannot serve.

Two modules are ours. Megatron's local norm refuses sequence parallelism, which an MoE layer under tensor parallelism
needs; its local attention refuses packed sequences. Everything else of a layer is Megatron's.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from megatron.core.fusions.fused_bias_dropout import get_bias_dropout_add
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.process_groups_config import ProcessGroupCollection
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


class PackedAttention(torch.nn.Module):
    """Causal attention within each sequence of a packed micro-batch (THD), by torch's fused kernels.

    Sequences of one length share a call, so there is no padding and no mask; a micro-batch costs one call per
    distinct length. float64 works.
    """

    def __init__(
        self,
        config: TransformerConfig,
        layer_number: int,
        attn_mask_type: AttnMaskType,
        attention_type: str,
        attention_dropout: float | None = None,
        softmax_scale: float | None = None,
        cp_comm_type: str | None = None,
        pg_collection: ProcessGroupCollection | None = None,
        **_: Any,
    ) -> None:
        super().__init__()
        self.softmax_scale = softmax_scale

    def forward(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        attention_mask: torch.Tensor | None,
        attn_mask_type: AttnMaskType | None = None,
        attention_bias: torch.Tensor | None = None,
        packed_seq_params: PackedSeqParams | None = None,
    ) -> torch.Tensor:
        """query [T, heads, d]; key, value [T, groups, d] -> [T, heads * d]."""
        assert packed_seq_params is not None, "the policy always packs"
        outputs = []
        index_of_length = _positions_by_length(packed_seq_params.cu_seqlens_q)
        for positions in index_of_length:
            q, k, v = (x[positions].transpose(1, 2) for x in (query, key, value))
            out = F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=self.softmax_scale, enable_gqa=True)
            outputs.append(out.transpose(1, 2).flatten(0, 1))
        order = torch.cat([positions.flatten() for positions in index_of_length])
        packed = torch.empty_like(query).index_copy(0, order, torch.cat(outputs))
        return packed.flatten(1)


def _positions_by_length(cu_seqlens: torch.Tensor) -> list[torch.Tensor]:
    """One index tensor [sequences, length] a distinct length, of the rows of a packed micro-batch."""
    starts, lengths = cu_seqlens[:-1].long(), (cu_seqlens[1:] - cu_seqlens[:-1]).long()
    groups = []
    for length in lengths.unique().tolist():
        offsets = torch.arange(length, device=cu_seqlens.device)
        groups.append(starts[lengths == length, None] + offsets)
    return groups


def block_spec(moe_layers: list[bool], *, qk_layernorm: bool) -> TransformerBlockSubmodules:
    """The spec of one pipeline stage: a layer spec for each of its layers, dense or MoE."""
    dense, moe = (_layer_spec(is_moe, qk_layernorm) for is_moe in (False, True))
    return TransformerBlockSubmodules(
        layer_specs=[moe if is_moe else dense for is_moe in moe_layers], layer_norm=RMSNorm
    )


def _layer_spec(is_moe: bool, qk_layernorm: bool) -> ModuleSpec:
    head_norm = RMSNorm if qk_layernorm else None
    attention = ModuleSpec(
        module=SelfAttention,
        params={"attn_mask_type": AttnMaskType.causal},
        submodules=SelfAttentionSubmodules(
            linear_qkv=ColumnParallelLinear,
            core_attention=PackedAttention,
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
