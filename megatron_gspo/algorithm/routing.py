"""Routes as arrays: laid out along a micro-batch, cut for a rank, and compared.

Two routes of one token differ in a layer by the experts of the one that are not among those of the other; over tokens t
and layers l, with K experts each,

    mismatch_l      = mean_t |a_tl minus b_tl| / K = mean_t (1 - |a_tl and b_tl| / K)        (arXiv 2510.11370)
    mismatch        = mean_l mismatch_l
    changed tokens  = share of tokens with mismatch_tl > 0 in some layer

which is ``route/drift`` between the live choices under pi_old and under pi_theta, and ``route/engine_mismatch`` between
the engine's routes and the trainer's live choices under pi_old. Order within a row plays no part in it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from megatron_gspo.algorithm.ratios import expand
from megatron_gspo.batching.packing import shard_positions
from megatron_gspo.errors import BatchError
from megatron_gspo.types import PackedBatch, RouteShape, RouteShard, Sample, Shard


def lay_out(samples: Sequence[Sample], batch: PackedBatch, shape: RouteShape) -> tuple[np.ndarray, np.ndarray]:
    """The routes of a micro-batch's tokens, before it is cut.

    Args:
        samples: those that were packed into ``batch``, in its order; none for a dummy. Their routes may have fewer rows
            than tokens, or be None: the tokens behind have no route.
    Returns:
        ([T, L, K] in ``shape.dtype``, [T] bool: where there is a route).
    """
    experts_TLK = np.zeros((batch.num_tokens, len(shape.moe_layers), shape.top_k), dtype=shape.dtype)
    present_T = np.zeros(batch.num_tokens, dtype=bool)
    for sample, start in zip(samples, batch.cu_seqlens[: len(samples)].tolist(), strict=True):
        if sample.routes is not None:
            if len(sample.routes) >= sample.length:
                raise BatchError(
                    f"response {sample.sample} of group {sample.group} has {len(sample.routes)} rows of routes for "
                    f"{sample.length} tokens, the last of which was never an input"
                )
            own = slice(start, start + len(sample.routes))
            experts_TLK[own], present_T[own] = sample.routes, True
    return experts_TLK, present_T


def cut(experts_TLK: np.ndarray, present_T: np.ndarray, layers: Sequence[int], own: np.ndarray) -> np.ndarray:
    """What a rank gets, as bytes: its layers' routes [layers, T_local, K], then [T_local] whether there is one.

    ``own`` [T_local] are the rank's positions in T, in its order; ``pasted`` reads the bytes back.
    """
    experts_LTK = np.ascontiguousarray(experts_TLK[own][:, list(layers)].transpose(1, 0, 2))
    return np.concatenate([experts_LTK.reshape(-1).view(np.uint8), present_T[own].view(np.uint8)])


def cut_size(tokens: int, layers: int, shape: RouteShape) -> int:
    """Bytes of ``cut`` for that many tokens and layers of a rank."""
    return tokens * (layers * shape.top_k * shape.dtype.itemsize + 1)


def pasted(data: torch.Tensor, layers: tuple[int, ...], tokens: int, shape: RouteShape) -> RouteShard:
    """The routes that ``cut`` made bytes of (a uint8 tensor), where they are."""
    dtype = torch.uint8 if shape.dtype == np.uint8 else torch.uint16
    experts = data[: len(data) - tokens].view(dtype)
    return RouteShard(layers, experts.view(len(layers), tokens, shape.top_k), data[len(data) - tokens :].bool())


def counted_tokens(batch: PackedBatch, shard: Shard) -> torch.Tensor:
    """[T_local] bool: a rank's tokens, of prompts and responses, that are neither padding nor a dummy's."""
    own = shard_positions(batch.cu_seqlens, shard)
    return expand(batch.weights_S > 0, batch.sequence_T)[own]


@dataclass(frozen=True)
class RouteChanges:
    """How one rank's routes of some micro-batches differ between two passes, over the tokens that count."""

    layers: tuple[int, ...]
    experts_L: torch.Tensor
    """[L] float64: summed over tokens, the share of a token's K experts that the other pass did not choose."""
    changed_T: torch.Tensor
    """[T_local over micro-batches] bool: one of this rank's layers differs. Other layers are on other stages."""
    counted_T: torch.Tensor
    """[T_local over micro-batches] bool."""


@torch.no_grad()
def route_changes(
    before: Sequence[RouteShard], after: Sequence[RouteShard], counted: Sequence[torch.Tensor]
) -> RouteChanges:
    """Compares two passes over the same micro-batches, at least one, on one rank.

    Args:
        counted: [T_local] bool of each micro-batch; of these, tokens that have a route in both passes count.
    Raises BatchError when the passes are not of the same layers and tokens.
    """
    layers, device = before[0].layers, counted[0].device
    experts_L = torch.zeros(len(layers), dtype=torch.float64, device=device)
    changed, counts = [], []
    for a, b, counted_T in zip(before, after, counted, strict=True):
        if not (a.layers == b.layers == layers and a.experts_LTK.shape[:2] == b.experts_LTK.shape[:2]):
            raise BatchError(
                f"routes {tuple(a.experts_LTK.shape)} of layers {a.layers} and {tuple(b.experts_LTK.shape)} of layers "
                f"{b.layers} are not of the same routers and tokens"
            )
        counts.append(counted_T & a.present_T.to(device) & b.present_T.to(device))
        missing_LT = _missing(a.experts_LTK.to(device), b.experts_LTK.to(device)) * counts[-1]
        experts_L += missing_LT.sum(dim=1).double() / max(1, a.experts_LTK.shape[-1])
        changed.append((missing_LT > 0).any(dim=0))
    return RouteChanges(layers, experts_L, torch.cat(changed), torch.cat(counts))


def _missing(a_LTK: torch.Tensor, b_LTK: torch.Tensor) -> torch.Tensor:
    """[L, T] int64: experts of a row of ``a`` that are not in that row of ``b``."""
    missing = torch.zeros(a_LTK.shape[:2], dtype=torch.int64, device=a_LTK.device)
    b_LTK = b_LTK.int()  # uint16 has few operators
    for slot_LT in a_LTK.int().unbind(dim=-1):
        missing += (slot_LT[..., None] != b_LTK).all(dim=-1)
    return missing
