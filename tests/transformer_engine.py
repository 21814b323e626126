"""A stand-in for Transformer Engine 2.20, for a process of its own: Megatron-Core imports it, and believes it is there.

It has the signatures of the real attention, checks what that checks, and computes by definition. Every other name that
Megatron imports can be imported, and says its name when it is called: so a test shows which of them training calls.
Names that 2.20 has no longer cannot be imported, as it is with the real one. Read from its sources
(``transformer_engine/pytorch/attention/dot_product_attention/dot_product_attention.py``).
"""

from __future__ import annotations

import contextlib
import importlib
import importlib.abc
import importlib.machinery
import sys
from collections.abc import Callable, Sequence
from types import ModuleType
from typing import Any

import torch

GONE = {
    "transformer_engine.pytorch.attention._SplitAlongDim",
    "transformer_engine.pytorch.attention.apply_rotary_pos_emb",
    "transformer_engine.pytorch.cpp_extensions.cast_to_fp8",
    "transformer_engine.pytorch.module.base.get_workspace",
}
"""What Megatron-Core 0.16.1 and 0.19.2 ask for in vain; all else that they import is in 2.20."""


class DotProductAttention(torch.nn.Module):
    """The arguments, checks and extra state of the real one; grouped heads, causal, packed."""

    def __init__(
        self,
        num_attention_heads: int,
        kv_channels: int | tuple[int, int],
        num_gqa_groups: int | None = None,
        attention_dropout: float = 0.0,
        qkv_format: str = "sbhd",
        attn_mask_type: str = "causal",
        window_size: tuple[int, int] | None = None,
        bottom_right_diagonal: bool | None = None,
        sequence_parallel: bool = False,
        tp_size: int = 1,
        get_rng_state_tracker: Callable[[], Any] | None = None,
        tp_group: Any = None,
        layer_number: int | None = None,
        attention_type: str = "self",
        cp_group: Any = None,
        cp_global_ranks: list[int] | None = None,
        cp_stream: Any = None,
        cp_comm_type: str = "p2p",
        softmax_scale: float | None = None,
        softmax_type: str = "vanilla",
        return_max_logit: bool | None = False,
        name: str | None = None,
    ) -> None:
        super().__init__()
        assert attention_dropout == 0.0 and attention_type == "self" and softmax_type == "vanilla"
        assert num_attention_heads % (num_gqa_groups or num_attention_heads) == 0
        width = kv_channels if isinstance(kv_channels, int) else kv_channels[0]
        self.scale = softmax_scale or width**-0.5
        self.calls = 0

    def get_extra_state(self) -> torch.Tensor:
        """Empty, as where nothing is in eight bits."""
        return torch.empty(0, dtype=torch.uint8)

    def set_extra_state(self, state: torch.Tensor | None) -> None:
        """Nothing to set."""
        assert state is None or state.numel() == 0

    def forward(
        self,
        query_layer: torch.Tensor,
        key_layer: torch.Tensor,
        value_layer: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        qkv_format: str | None = None,
        cu_seqlens_q: torch.Tensor | None = None,
        cu_seqlens_kv: torch.Tensor | None = None,
        cu_seqlens_q_padded: torch.Tensor | None = None,
        cu_seqlens_kv_padded: torch.Tensor | None = None,
        max_seqlen_q: int | None = None,
        max_seqlen_kv: int | None = None,
        attn_mask_type: str | None = None,
        window_size: tuple[int, int] | None = None,
        bottom_right_diagonal: bool | None = None,
        checkpoint_core_attention: bool = False,
        core_attention_bias_type: str = "no_bias",
        core_attention_bias: torch.Tensor | None = None,
        alibi_slopes: torch.Tensor | None = None,
        fast_zero_fill: bool = True,
        inference_params: Any = None,
        pad_between_seqs: bool | None = None,
        fp8_output: bool | None = False,
        bf16_backward: bool | None = None,
        num_splits: int | None = 1,
    ) -> torch.Tensor:
        """query [T, heads, d], key and value [T, groups, d] -> [T, heads * d]."""
        assert qkv_format == "thd" and attn_mask_type is not None and "padding" in attn_mask_type
        assert "causal" in attn_mask_type and attention_mask is None and core_attention_bias is None
        assert query_layer.dim() == key_layer.dim() == value_layer.dim() == 3
        assert query_layer.dtype in (torch.bfloat16, torch.float16)
        assert cu_seqlens_q is not None and cu_seqlens_kv is not None
        assert cu_seqlens_q.dtype == cu_seqlens_kv.dtype == torch.int32
        assert cu_seqlens_q.device == query_layer.device and cu_seqlens_q.shape == cu_seqlens_kv.shape
        assert cu_seqlens_q_padded is None and cu_seqlens_kv_padded is None and not pad_between_seqs
        lengths = cu_seqlens_q.diff().tolist()
        assert sum(lengths) == len(query_layer) == len(key_layer)
        assert max_seqlen_q is not None and max_seqlen_q >= max(lengths) and max_seqlen_kv == max_seqlen_q
        self.calls += 1
        parts = zip(*(layer.split(lengths) for layer in (query_layer, key_layer, value_layer)), strict=True)
        return torch.cat([self._one(*part) for part in parts]).to(query_layer.dtype)

    def _one(self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
        repeats = query.shape[1] // key.shape[1]
        q, k, v = (layer.double().transpose(0, 1) for layer in (query, key, value))
        k, v = k.repeat_interleave(repeats, 0), v.repeat_interleave(repeats, 0)
        future = torch.ones(len(query), len(query), dtype=torch.bool).triu(1)
        scores = (q @ k.transpose(1, 2) * self.scale).masked_fill(future, -torch.inf)
        return (scores.softmax(-1) @ v).transpose(0, 1).flatten(1)


def get_cpu_offload_context(
    enabled: bool = False,
    num_layers: int | None = 1,
    model_layers: int = 1,
    offload_activations: bool = True,
    offload_weights: bool = False,
    double_buffering: bool = False,
    manual_synchronization: bool = False,
    retain_pinned_cpu_buffers: bool = False,
    offload_stream: Any = None,
) -> tuple[Any, Callable[[torch.Tensor], torch.Tensor]]:
    """What every block asks for, and does not want."""
    assert not enabled and not manual_synchronization
    return contextlib.nullcontext(), lambda x: x


class FusedAdam(torch.optim.Optimizer):
    """Megatron's choice where it is installed; our own AdamW takes its parameters over."""

    def __init__(
        self,
        params: Any,
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        amsgrad: bool = False,
        *,
        bias_correction: bool = True,
        adam_w_mode: bool = True,
        capturable: bool = False,
        master_weights: bool = False,
        master_weight_dtype: torch.dtype = torch.float32,
        exp_avg_dtype: torch.dtype = torch.float32,
        exp_avg_sq_dtype: torch.dtype = torch.float32,
        use_decoupled_grad: bool = False,
        store_param_remainders: bool = False,
        set_grad_none: bool | None = None,
    ) -> None:
        assert not (amsgrad or capturable or master_weights or store_param_remainders)
        defaults = {"lr": lr, "bias_correction": bias_correction, "betas": betas, "eps": eps}
        super().__init__(params, defaults | {"weight_decay": weight_decay})

    def step(self, closure: Any = None) -> None:
        """Not training's."""
        raise AssertionError("training calls Transformer Engine's FusedAdam")


class _Members:
    """An enumeration of the compiled part, whose members are their names."""

    def __getattr__(self, name: str) -> str:
        return name


THERE = {
    "transformer_engine_torch.DType": _Members(),
    "transformer_engine.pytorch.optimizers.FusedAdam": FusedAdam,
    "transformer_engine.__version__": "2.20.2",
    "transformer_engine.pytorch.DotProductAttention": DotProductAttention,
    "transformer_engine.pytorch.cpu_offload.get_cpu_offload_context": get_cpu_offload_context,
}


def _uncalled(name: str) -> type:
    def refuse(self: Any, *args: Any, **kwargs: Any) -> None:
        raise AssertionError(f"training calls Transformer Engine's {name}")

    return type(name.rsplit(".", 1)[-1], (torch.nn.Module,), {"__init__": refuse})


class _Package(ModuleType):
    def __getattr__(self, name: str) -> Any:
        whole = f"{self.__name__}.{name}"
        if whole in THERE:
            return THERE[whole]
        if name.startswith("__") or whole in GONE:
            raise AttributeError(name)
        if name in ("pytorch", "ops", "distributed", "common", "recipe"):  # which the packages import by themselves
            return importlib.import_module(whole)
        setattr(self, name, _uncalled(whole))
        return self.__dict__[name]


class _Finder(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    def find_spec(self, name: str, path: Sequence[str] | None, target: ModuleType | None = None) -> Any:
        if name.split(".")[0] not in ("transformer_engine", "transformer_engine_torch") or name in GONE:
            return None
        return importlib.machinery.ModuleSpec(name, self, is_package=True)

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> ModuleType:
        return _Package(spec.name)

    def exec_module(self, module: ModuleType) -> None:
        pass


def install() -> None:
    """In this process, before Megatron-Core is imported."""
    assert "megatron.core" not in sys.modules
    sys.meta_path.insert(0, _Finder())
