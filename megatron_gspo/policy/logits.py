"""A policy's logits, whole: for comparing checkpoints, never in training."""

from __future__ import annotations

from collections.abc import Sequence
from types import MethodType

import numpy as np
import torch

from megatron_gspo.algorithm.packing import pack
from megatron_gspo.errors import LayoutError
from megatron_gspo.parallel.exchange import broadcast_object, gather_objects, gather_pieces
from megatron_gspo.policy.model import PolicyModel
from megatron_gspo.policy.policy import Policy
from megatron_gspo.types import PlacedSample


@torch.no_grad()
def logits_of(policy: Policy, token_ids: Sequence[int]) -> torch.Tensor:
    """[T, V] float32 logits of one sequence, T >= 2, on every rank. Collective.

    The model is run as in training, and where it would make logprobs its head is applied instead.
    """
    groups = policy.groups
    if groups.context.size() > 1:
        raise LayoutError(f"logits are compared at context = 1, not {groups.context.size()}")
    batch = pack([_sample(token_ids)], loss_dtype=torch.float32, tensor=groups.tensor.size(), context=1)
    found: list[torch.Tensor] = []

    def keep(chunk: PolicyModel, labels_T: torch.Tensor, hidden_TH: torch.Tensor, temperature: float) -> torch.Tensor:
        found.append(_head(chunk, hidden_TH)[: len(token_ids)])
        return hidden_TH.new_zeros(2, len(hidden_TH))

    for chunk in policy.chunks:
        chunk.logprobs = MethodType(keep, chunk)  # type: ignore[method-assign]  # of this instance alone
    policy.logprobs([batch] * policy.config.parallel.microbatch_multiple)
    for chunk in policy.chunks:
        del chunk.logprobs
    logits = found[0].float().cpu() if found and groups.tensor.rank() == 0 else None
    parts = gather_objects(logits is not None, groups.world)
    return broadcast_object(logits, parts.index(True), groups.world)


def _head(chunk: PolicyModel, hidden_TH: torch.Tensor) -> torch.Tensor:
    """[T, V] from every tensor rank's slice of tokens and of the vocabulary."""
    group = chunk.groups.tensor
    weight = chunk.shared_embedding_or_output_weight() if chunk.share_embeddings_and_output_weights else None
    hidden = torch.cat(gather_pieces(hidden_TH, group))
    shard = hidden @ (chunk.output_layer.weight if weight is None else weight).T
    return torch.cat(gather_pieces(shard, group), dim=1)[:, : chunk.shape.vocab_size]


def _sample(token_ids: Sequence[int]) -> PlacedSample:
    ids = np.asarray(token_ids, dtype=np.int32)
    zeros = np.zeros(len(ids) - 1)
    rest = {"rollout_logprobs": zeros, "advantage": 0.0, "token_advantages": zeros}
    return PlacedSample.of_response(ids[:1], ids[1:], group=0, sample=0, **rest, weight=1.0)
