"""What servers hold of a model, in their own dtype."""

from __future__ import annotations

from math import ceil, prod

import torch

from megatron_gspo.config.rollouts import EIGHT_BITS
from megatron_gspo.doctor.facts import Facts
from megatron_gspo.hf.fp8 import BLOCK, READ
from megatron_gspo.hf.fp8_model import in_eight_bits


def engine_item(facts: Facts) -> int:
    """Bytes of an activation, or of a key or value in the cache."""
    dtype = facts.config.rollout.engine_dtype or facts.config.model.dtype
    return READ.itemsize if dtype == EIGHT_BITS else min(4, getattr(torch, dtype).itemsize)


def engine_weights(facts: Facts) -> int:
    """Bytes of the weights that are sent and held: of eight bits with their scales."""
    item = engine_item(facts)
    if facts.config.rollout.engine_dtype != EIGHT_BITS:
        return sum(prod(tensor.shape) for tensor in facts.tensors) * item
    chosen = in_eight_bits(facts.family, facts.shape)
    narrow = [tensor.shape for tensor in facts.tensors if chosen(tensor.name)]
    scales = sum(ceil(rows / BLOCK) * ceil(columns / BLOCK) for rows, columns in narrow)
    wide = sum(prod(tensor.shape) for tensor in facts.tensors if not chosen(tensor.name))
    return sum(map(prod, narrow)) + scales * torch.float32.itemsize + wide * item
