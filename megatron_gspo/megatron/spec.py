"""Layer specs: what Megatron's ``ModuleSpec`` is told to build where its own local modules cannot serve.

Megatron's local norm refuses sequence parallelism, which an MoE layer under tensor parallelism needs; its local
attention refuses packed sequences and context parallelism (``attention`` has ours); it has no norm over all heads.
Everything else of a layer is Megatron's.
"""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.fusions.fused_bias_dropout import get_bias_dropout_add
from megatron.core.tensor_parallel.layers import ColumnParallelLinear, RowParallelLinear
from megatron.core.transformer.attention import SelfAttention, SelfAttentionSubmodules
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.mlp import MLP, MLPSubmodules
from megatron.core.transformer.moe.experts import SequentialMLP
from megatron.core.transformer.moe.moe_layer import MoESubmodules
from megatron.core.transformer.moe.router import TopKRouter
from megatron.core.transformer.moe.shared_experts import SharedExpertMLP
from megatron.core.transformer.multi_latent_attention import MLASelfAttentionSubmodules
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.transformer_layer import TransformerLayer, TransformerLayerSubmodules

from megatron_gspo.hf.family import ModelShape
from megatron_gspo.kernels.choice import Kernels
from megatron_gspo.kernels.norm import rms_norm
from megatron_gspo.megatron.attention import core_attention
from megatron_gspo.megatron.cpu import keep_float64
from megatron_gspo.megatron.experts import GroupedExperts, OrderedMoELayer
from megatron_gspo.megatron.latent import LatentAttention
from megatron_gspo.parallel.context import sum_over


class RMSNorm(torch.nn.Module):
    """x / sqrt(mean(x^2) + eps) * weight, in float32 (float64 for float64 input), rounded once (``kernels.norm``).

    ``weight.sequence_parallel`` tells Megatron that each tensor rank saw its own tokens only, so that the weight's
    gradient is summed over tensor ranks. The norms of heads see all tokens but only the rank's own heads: their
    gradients are partial sums too, and carry the same mark (0.16.1 also knows them by name).
    """

    def __init__(
        self, config: TransformerConfig, hidden_size: int, eps: float = 1e-6, kernel: str = "torch", **_: Any
    ) -> None:
        super().__init__()
        self.eps, self.kernel = eps, kernel
        device = torch.cuda.current_device()
        self.weight = torch.nn.Parameter(torch.ones(hidden_size, dtype=config.params_dtype, device=device))
        self.weight.sequence_parallel = config.sequence_parallel  # type: ignore[attr-defined]

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """x / rms(x) x weight, in float32 or better."""
        return rms_norm(x, self.weight, self.eps, self.kernel)


class LatentNorm(RMSNorm):
    """The norm of a latent: Hugging Face gives its epsilon no setting."""

    def __init__(self, config: TransformerConfig, hidden_size: int, kernel: str = "torch", **_: Any) -> None:
        super().__init__(config, hidden_size, eps=1e-6, kernel=kernel)


class RMSNormOverHeads(torch.nn.Module):
    """One RMSNorm over all heads of a token's query or key, which tensor ranks hold a share of each.

    The mean square is of all ranks' heads. Each rank has the whole ``weight`` [heads * d] and uses its own heads' part:
    its gradient is zero elsewhere, and summed over tensor ranks as that of ``RMSNorm`` is. (A shard would be summed
    too: Megatron knows the parameter by its name.)
    """

    def __init__(
        self, config: TransformerConfig, hidden_size: int, heads: int, group: dist.ProcessGroup, eps: float = 1e-6
    ) -> None:
        """``hidden_size`` is d, of one head; ``heads`` are those of all ranks of ``group``."""
        super().__init__()
        self.eps, self.group = eps, group
        device = torch.cuda.current_device()
        self.weight = torch.nn.Parameter(torch.ones(heads * hidden_size, dtype=config.params_dtype, device=device))
        self.weight.sequence_parallel = config.sequence_parallel  # type: ignore[attr-defined]

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[T, 1, heads of this rank, d] -> the same shape."""
        rows = x.flatten(-2)
        wide = rows if x.dtype == torch.float64 else rows.float()
        mean = sum_over(wide.square().sum(-1, keepdim=True), self.group) / len(self.weight)
        own = self.weight.view(self.group.size(), -1)[self.group.rank()]
        return (wide * torch.rsqrt(mean + self.eps) * own.to(wide.dtype)).to(x.dtype).view(x.shape)


class Router(TopKRouter):
    """Megatron's router, whose sigmoids are float64 in a float64 run.

    It rounds logits to float32 for them, and float32's sigmoid differs in its last bit between the vectorised part of a
    tensor and the rest: a token's weights would depend on its place in the micro-batch.
    """

    def routing(self, logits: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        """Megatron's, of [tokens, experts] logits."""
        with keep_float64() if logits.dtype == torch.float64 else nullcontext():
            return super().routing(logits, *args, **kwargs)


def block_spec(
    moe_layers: list[bool],
    config: TransformerConfig,
    shape: ModelShape,
    tensor: dist.ProcessGroup,
    kernels: Kernels,
) -> TransformerBlockSubmodules:
    """The spec of one pipeline stage: a layer spec for each of its layers, dense or MoE."""
    norm = ModuleSpec(module=RMSNorm, params={"kernel": kernels["norm"]})
    attention = _attention_spec(config, shape, tensor, norm)
    dense, moe = (_layer_spec(norm, attention, mlp) for mlp in (_mlp_spec(), _moe_spec(kernels)))
    return TransformerBlockSubmodules(layer_specs=[moe if is_moe else dense for is_moe in moe_layers], layer_norm=norm)


def _layer_spec(norm: ModuleSpec, attention: ModuleSpec, mlp: ModuleSpec) -> ModuleSpec:
    return ModuleSpec(
        module=TransformerLayer,
        submodules=TransformerLayerSubmodules(
            input_layernorm=norm,
            self_attention=attention,
            self_attn_bda=get_bias_dropout_add,
            pre_mlp_layernorm=norm,
            mlp=mlp,
            mlp_bda=get_bias_dropout_add,
        ),
    )


def _attention_spec(
    config: TransformerConfig, shape: ModelShape, tensor: dist.ProcessGroup, norm: ModuleSpec
) -> ModuleSpec:
    if config.multi_latent_attention:
        return _latent_spec(config, norm.params)
    query_norm, key_norm = (
        _head_norm(config, shape, heads, tensor, norm) for heads in (shape.num_attention_heads, shape.num_query_groups)
    )
    return ModuleSpec(
        module=SelfAttention,
        params={"attn_mask_type": AttnMaskType.causal},
        submodules=SelfAttentionSubmodules(
            linear_qkv=ColumnParallelLinear,
            core_attention=core_attention(config),
            linear_proj=RowParallelLinear,
            q_layernorm=query_norm,
            k_layernorm=key_norm,
        ),
    )


def _latent_spec(config: TransformerConfig, params: dict[str, Any]) -> ModuleSpec:
    through_latent = config.q_lora_rank is not None
    norm = ModuleSpec(module=LatentNorm, params=params)
    return ModuleSpec(
        module=LatentAttention,
        params={"attn_mask_type": AttnMaskType.causal},
        submodules=MLASelfAttentionSubmodules(
            linear_q_proj=None if through_latent else ColumnParallelLinear,
            linear_q_down_proj=ColumnParallelLinear if through_latent else None,
            linear_q_up_proj=ColumnParallelLinear if through_latent else None,
            linear_kv_down_proj=ColumnParallelLinear,
            linear_kv_up_proj=ColumnParallelLinear,
            core_attention=core_attention(config),
            linear_proj=RowParallelLinear,
            q_layernorm=norm if through_latent else None,
            kv_layernorm=norm,
        ),
    )


def _head_norm(
    config: TransformerConfig, shape: ModelShape, heads: int, tensor: dist.ProcessGroup, norm: ModuleSpec
) -> Any:
    """What norms a query or a key: None, a norm of each head, or one of all of them."""
    if not config.qk_layernorm:
        return None
    if not shape.norm_over_heads:
        return norm
    return ModuleSpec(module=RMSNormOverHeads, params={"heads": heads, "group": tensor})


def _mlp_submodules() -> MLPSubmodules:
    return MLPSubmodules(linear_fc1=ColumnParallelLinear, linear_fc2=RowParallelLinear)


def _mlp_spec() -> ModuleSpec:
    return ModuleSpec(module=MLP, submodules=_mlp_submodules())


def _moe_spec(kernels: Kernels) -> ModuleSpec:
    experts = ModuleSpec(module=GroupedExperts, params={"kernel": kernels["swiglu"]})
    if kernels["experts"] == "sequential":
        experts = ModuleSpec(module=SequentialMLP, submodules=_mlp_submodules())
    shared = ModuleSpec(module=SharedExpertMLP, submodules=_mlp_submodules())
    submodules = MoESubmodules(router=Router, experts=experts, shared_experts=shared)
    return ModuleSpec(module=OrderedMoELayer, submodules=submodules)
