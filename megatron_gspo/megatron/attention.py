"""Causal attention within each sequence of a packed micro-batch (THD), also when its tokens lie on several ranks.

Under context parallelism each of n ranks holds two chunks of every sequence (``batching.packing.zigzag_positions``).
A layer gathers keys and values of the micro-batch over the context ranks, and then a rank computes its own queries
only: those of the chunk that ends at position e see keys [0, e), the last rows of a causal triangle. So each rank does
1/n of the attention, and holds the keys and values of one whole micro-batch, 2 x T x groups / tensor x head dimension
numbers: without recompute each layer keeps its own for backward, with it one layer does at a time.

Three kernels, chosen in ``attention_kernel`` alone. ``sdpa`` is exact in every dtype, and what the CPU runs. ``varlen``
and Transformer Engine's are for half precision on a GPU; neither has been run yet.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.transformer_config import TransformerConfig

from megatron_gspo.batching.packing import zigzag_positions
from megatron_gspo.megatron.rotary import Rotation
from megatron_gspo.parallel.context import gather_rows
from megatron_gspo.platforms import here
from megatron_gspo.types import Shard

Attend = Callable[[torch.Tensor, torch.Tensor, torch.Tensor, float | None], torch.Tensor]
"""(query [T_own, heads, d], key and value [T, groups, d] as gathered, scale) -> [T_own, heads, d].

Latent attention's values have a d of their own, which is also the result's."""


@dataclass
class PackedSequences(PackedSeqParams):
    """Megatron's THD parameters of a micro-batch, and how to attend in it: worked out once, used by every layer."""

    attend: Attend | None = None


def attention_kernel(config: TransformerConfig) -> Literal["sdpa", "varlen", "transformer_engine"]:
    """The one place that chooses: by device, dtype and what is installed (``make kernels``).

    Transformer Engine is deterministic only by an environment variable, so a deterministic run takes torch's kernel.
    """
    half = config.params_dtype in (torch.bfloat16, torch.float16)
    if not here().half_kernels or not half:
        return "sdpa"
    if _has_transformer_engine() and not config.deterministic_mode:
        return "transformer_engine"
    if config.multi_latent_attention:  # values are narrower than keys
        return "sdpa"
    flash = torch.cuda.get_device_capability() >= (8, 0) and config.kv_channels % 8 == 0 and config.kv_channels <= 256
    return "varlen" if flash else "sdpa"


def core_attention(config: TransformerConfig) -> type[torch.nn.Module]:
    """The module that a layer's spec names."""
    if attention_kernel(config) != "transformer_engine":
        return PackedAttention
    from megatron.core.extensions.transformer_engine import TEDotProductAttention

    return TEDotProductAttention


def packed_sequences(
    cu_seqlens: torch.Tensor, shard: Shard, config: TransformerConfig, device: torch.device, rotary: str = "torch"
) -> PackedSequences:
    """What a micro-batch's layers need to know of it, from its boundaries [S + 1] on the host, where they stay.
    (Transformer Engine wants them on the device.) ``rotary``: the kernel of ``kernels.rotary``.
    """
    kernel, longest = attention_kernel(config), int(cu_seqlens.diff().max())
    boundaries = cu_seqlens.to(device if kernel == "transformer_engine" else cu_seqlens.device, copy=True)
    position_T = positions(cu_seqlens, shard.context_size, shard.context_rank)
    boundaries.rotation = Rotation(position_T.to(device), rotary)  # type: ignore[attr-defined]
    attend = None
    if kernel != "transformer_engine":
        runs = query_runs(cu_seqlens, shard.context_size, shard.context_rank)
        make: Callable[[QueryRuns, torch.device], Attend] = Sdpa if kernel == "sdpa" else Varlen
        attend = make(runs, device)
    return PackedSequences(
        qkv_format="thd",
        cu_seqlens_q=boundaries,
        cu_seqlens_kv=boundaries,
        max_seqlen_q=longest,
        max_seqlen_kv=longest,
        attend=attend,
    )


def positions(cu_seqlens: torch.Tensor, context: int, rank: int) -> torch.Tensor:
    """[T_own] int64: of the tokens of context rank ``rank`` of ``context`` within their sequences."""
    own_T = zigzag_positions(cu_seqlens, context, rank)
    return own_T - cu_seqlens[:-1].long().repeat_interleave(cu_seqlens.diff().long() // context)


@dataclass(frozen=True)
class QueryRuns:
    """A rank's queries as runs of consecutive positions, in the order in which it holds them.

    Run i is the last ``queries[i]`` of the first ``keys[i]`` positions of its sequence. One context rank has one run a
    sequence, the whole of it; of several ranks each has two, its chunks.
    """

    queries: npt.NDArray[np.int64]
    """[runs] their lengths."""
    keys: npt.NDArray[np.int64]
    """[runs] how many positions of its sequence a run's last query sees."""
    first_key: npt.NDArray[np.int64]
    """[runs] the position in T where its sequence begins."""
    row_T: npt.NDArray[np.int64]
    """[T] which row of the gathered keys a position is."""

    def key_rows(self, runs: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
        """Rows of the keys of these runs, end to end."""
        counts = self.keys[runs]
        offset = np.arange(counts.sum()) - np.repeat(np.cumsum(counts) - counts, counts)
        return self.row_T[np.repeat(self.first_key[runs], counts) + offset]


def query_runs(cu_seqlens: torch.Tensor, context: int, rank: int) -> QueryRuns:
    """The runs of context rank ``rank`` of ``context``. ``cu_seqlens``: [S + 1] on the host."""
    boundaries = cu_seqlens.numpy().astype(np.int64)
    starts, lengths = boundaries[:-1], np.diff(boundaries)
    if context == 1:
        return QueryRuns(lengths, lengths, starts, np.arange(boundaries[-1]))
    chunks = lengths // (2 * context)
    rows = torch.cat([zigzag_positions(cu_seqlens, context, other) for other in range(context)])
    return QueryRuns(
        queries=np.repeat(chunks, 2),
        keys=np.stack([(rank + 1) * chunks, (2 * context - rank) * chunks], axis=1).ravel(),
        first_key=np.repeat(starts, 2),
        row_T=rows.argsort().numpy(),
    )


class Sdpa:
    """torch's scaled_dot_product_attention; runs of one shape share a call, so nothing is padded. float64 works.

    A micro-batch costs one call a distinct shape: one a distinct length, and two under context parallelism, where a
    chunk behind others needs a mask of its queries x keys (shared by its call, never of the whole pack).
    """

    def __init__(self, runs: QueryRuns, device: torch.device) -> None:
        first_query = np.cumsum(runs.queries) - runs.queries
        shapes, shape_of = np.unique(np.stack([runs.queries, runs.keys]), axis=1, return_inverse=True)
        calls, order = [], []
        for index, (queries, keys) in enumerate(shapes.T.tolist()):
            same = np.flatnonzero(shape_of.ravel() == index)
            rows = first_query[same, None] + np.arange(queries)
            mask = None if queries == keys else torch.ones(queries, keys, dtype=torch.bool).tril(keys - queries)
            calls.append((rows, runs.key_rows(same).reshape(len(same), keys), mask))
            order.append(rows.ravel())
        self.calls = [
            (torch.from_numpy(q).to(device), torch.from_numpy(k).to(device), m if m is None else m.to(device))
            for q, k, m in calls
        ]
        self.order = torch.from_numpy(np.concatenate(order)).to(device)

    def __call__(
        self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scale: float | None
    ) -> torch.Tensor:
        outputs = []
        for query_rows, key_rows, mask in self.calls:
            q, k, v = (x[rows].transpose(1, 2) for x, rows in ((query, query_rows), (key, key_rows), (value, key_rows)))
            causal = mask is None
            out = F.scaled_dot_product_attention(
                q, k, v, attn_mask=mask, is_causal=causal, scale=scale, enable_gqa=True
            )
            outputs.append(out.transpose(1, 2).flatten(0, 1))
        out = torch.cat(outputs)
        return torch.empty_like(out).index_copy(0, self.order, out)


class Varlen:
    """torch's variable-length flash attention: one call a micro-batch, and no mask. Not run yet.

    Its causal mask is aligned to the last key, which is what a run of queries behind others needs. Under context
    parallelism the keys of every run are laid end to end: 1 + 1 / (2 x context) copies of the gathered keys.
    """

    def __init__(self, runs: QueryRuns, device: torch.device) -> None:
        self.cu_queries, self.cu_keys = (
            torch.from_numpy(np.append(0, np.cumsum(counts)).astype(np.int32)).to(device)
            for counts in (runs.queries, runs.keys)
        )
        self.longest = int(runs.queries.max()), int(runs.keys.max())
        whole = np.array_equal(runs.queries, runs.keys)
        self.key_rows = None if whole else torch.from_numpy(runs.key_rows(np.arange(len(runs.keys)))).to(device)

    def __call__(
        self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scale: float | None
    ) -> torch.Tensor:
        from torch.nn.attention.varlen import varlen_attn

        if self.key_rows is not None:
            key, value = key[self.key_rows], value[self.key_rows]
        grouped: dict[str, Any] = {"enable_gqa": True}
        if "enable_gqa" not in inspect.signature(varlen_attn).parameters:  # torch 2.11
            grouped = {}
            heads = query.shape[1] // key.shape[1]
            key, value = (x.repeat_interleave(heads, dim=1) for x in (key, value))
        causal = (-1, 0)
        out = varlen_attn(
            query,
            key,
            value,
            self.cu_queries,
            self.cu_keys,
            *self.longest,
            scale=scale,
            window_size=causal,
            **grouped,
        )
        assert isinstance(out, torch.Tensor)
        return out


class PackedAttention(torch.nn.Module):
    """The core attention of a layer: gathers keys and values over the context ranks and attends as the pack says."""

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
        assert pg_collection is not None, "groups are passed, never looked up"
        self.softmax_scale, self.context = softmax_scale, pg_collection.cp

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
        """query, key, value [T_own, heads or groups, d] -> [T_own, heads * d of a value]; T_own = T / context ranks."""
        assert isinstance(packed_seq_params, PackedSequences) and packed_seq_params.attend, "the policy always packs"
        if self.context.size() > 1:
            both = gather_rows(torch.cat([key, value], dim=-1), self.context)
            key, value = both.split([key.shape[-1], value.shape[-1]], dim=-1)
        return packed_seq_params.attend(query, key, value, self.softmax_scale).flatten(1)


def _has_transformer_engine() -> bool:
    from megatron.core.extensions.transformer_engine import HAVE_TE

    return bool(HAVE_TE)
