"""A policy's logits, whole: for comparing checkpoints, never in training."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from megatron_gspo.batching.packing import pack
from megatron_gspo.errors import LayoutError
from megatron_gspo.megatron.heads import LogitsHead
from megatron_gspo.megatron.policy import Policy
from megatron_gspo.parallel.exchange import broadcast_object, gather_objects
from megatron_gspo.types import PlacedSample


@torch.no_grad()
def logits_of(policy: Policy, token_ids: Sequence[int]) -> torch.Tensor:
    """[T, V] float32 logits of one sequence, T >= 2, on every rank. Collective.

    The model is run as in training, with another head.
    """
    groups = policy.groups
    if groups.context.size() > 1:
        raise LayoutError(f"logits are compared at context = 1, not {groups.context.size()}")
    batch = pack([_sample(token_ids)], loss_dtype=torch.float32, tensor=groups.tensor.size(), context=1)
    found = policy.outputs([batch] * policy.config.parallel.microbatch_multiple, LogitsHead())
    logits = found[0][: len(token_ids)].float().cpu() if found and groups.tensor.rank() == 0 else None
    parts = gather_objects(logits is not None, groups.world)
    return broadcast_object(logits, parts.index(True), groups.world)


def _sample(token_ids: Sequence[int]) -> PlacedSample:
    ids = np.asarray(token_ids, dtype=np.int32)
    zeros = np.zeros(len(ids) - 1)
    rest = {"rollout_logprobs": zeros, "advantage": 0.0, "token_advantages": zeros}
    return PlacedSample.of_response(ids[:1], ids[1:], group=0, sample=0, **rest, weight=1.0)
