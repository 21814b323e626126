"""Rotary embeddings that are scaled for longer contexts, in Megatron's own.

Megatron has Llama 3's rule with fixed numbers and YaRN as another class; here both are frequencies that take the place
of its own (``hf.rotary``), so that one table says what they are.
"""

from __future__ import annotations

from typing import Any

import torch

from megatron_gspo.hf.family import ModelShape
from megatron_gspo.hf.rotary import YarnRope, inverse_frequencies


def scale_angles(embedding: Any, shape: ModelShape) -> None:
    """Gives Megatron's ``RotaryEmbedding`` the frequencies of ``shape.scaled_rope``. Before its first use: it keeps
    the angles of each length."""
    before: torch.Tensor = embedding.inv_freq
    dim = int(shape.head_dim * shape.rotary_fraction)
    embedding.inv_freq = inverse_frequencies(dim, shape.rotary_base, shape.scaled_rope).to(before)


def scale_amplitudes(config: Any, shape: ModelShape) -> None:
    """Has attention multiply cosines and sines by YaRN's factor, which it reads off the ``TransformerConfig``; some
    releases when it is built."""
    if isinstance(shape.scaled_rope, YarnRope):
        config.yarn_rotary_scaling_factor = shape.scaled_rope.factor
        config.yarn_mscale = shape.scaled_rope.mscale
        config.yarn_mscale_all_dim = shape.scaled_rope.mscale_all_dim
