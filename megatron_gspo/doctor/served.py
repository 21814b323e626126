"""What servers hold of a model, in their own dtype."""

from __future__ import annotations

import torch

from megatron_gspo.config.rollouts import EIGHT_BITS
from megatron_gspo.doctor.facts import Facts
from megatron_gspo.hf.family import ModelShape
from megatron_gspo.hf.fp8 import READ
from megatron_gspo.hf.fp8_model import served_bytes


def engine_item(facts: Facts) -> int:
    """Bytes of an activation, or of a key or value in the cache."""
    dtype = facts.config.rollout.engine_dtype or facts.config.model.dtype
    return READ.itemsize if dtype == EIGHT_BITS else min(4, getattr(torch, dtype).itemsize)


def cache_per_token(shape: ModelShape, tensor: int, *, item: int = 2, groups: int = 1, stages: int = 1) -> int:
    """Bytes of a token's keys and values on each card of a server, ``item`` a number.

    Heads are cut over the ``tensor`` ranks of each of the ``groups`` that attend to other requests, and repeated where
    there are fewer; latent attention keeps one vector a token (kv_lora_rank + qk_rope_head_dim), on every card.
    """
    layers = shape.num_layers // stages
    if latent := shape.megatron.get("kv_lora_rank"):
        return int(layers * (latent + shape.megatron["qk_pos_emb_head_dim"]) * item)
    return 2 * layers * max(1, shape.num_query_groups * groups // tensor) * shape.head_dim * item


def engine_weights(facts: Facts) -> int:
    """Bytes of the weights that are sent and held: of eight bits with their scales."""
    narrow = facts.config.rollout.engine_dtype == EIGHT_BITS
    return served_bytes(facts.family, facts.shape, engine_item(facts), eight_bits=narrow)
