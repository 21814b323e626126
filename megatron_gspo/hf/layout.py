"""Whether a layout divides what it shards, checked from ``config.json`` alone."""

from __future__ import annotations

from megatron_gspo.config import ParallelConfig
from megatron_gspo.errors import LayoutError
from megatron_gspo.hf.family import ModelShape


def check_layout(parallel: ParallelConfig, model: ModelShape) -> None:
    """Raises LayoutError, showing the division that fails."""
    rows = [
        (model.num_attention_heads, "attention heads", parallel.tensor, "tensor"),
        (model.num_query_groups, "key-value heads", parallel.tensor, "tensor"),
        (model.num_layers, "layers", parallel.pipeline, "pipeline"),
    ]
    if not all(model.moe_layers):
        rows.append((model.ffn_hidden_size, "rows of an MLP", parallel.tensor, "tensor"))
    if model.num_experts:
        rows.append((model.num_experts, "experts", parallel.expert, "expert"))
        rows.append((model.expert_hidden_size, "rows of an expert", parallel.expert_tensor, "expert_tensor"))
    for count, noun, ranks, name in rows:
        if count % ranks:
            raise LayoutError(f"{count} {noun} / parallel.{name} {ranks} = {count / ranks:g}: it must divide")
    if parallel.expert > 1 and not model.num_experts:
        raise LayoutError(f"parallel.expert = {parallel.expert}, but {model.architecture} has no experts")
