"""Rotary embeddings: queries and keys of a packed micro-batch are turned here, by Megatron's angles.

Megatron looks the angles up sequence by sequence in every layer, and newer releases turn each sequence by itself: tens
of small kernels a layer, a wait for the device where the boundaries lie on it, and tables that autograd keeps for every
layer. ``Rotation`` makes one table a micro-batch.

Megatron has Llama 3's rule of scaling for longer contexts with fixed numbers, and YaRN as another class; here both are
frequencies that take the place of its own (``hf.rotary``), so that one table says what they are.
"""

from __future__ import annotations

from typing import Any

import torch

from megatron_gspo.hf.family import ModelShape
from megatron_gspo.hf.rotary import YarnRope, inverse_frequencies
from megatron_gspo.kernels.rotary import rotate


class Rotation:
    """How a micro-batch's queries and keys are turned; made with its boundaries, and used by every layer of a stage."""

    def __init__(self, position_T: torch.Tensor, kernel: str = "torch") -> None:
        """``position_T``: [T] int64, of this rank's tokens within their sequences. ``kernel`` is ``rotate``'s."""
        self.position_T, self.kernel = position_T, kernel
        self._table: tuple[torch.Tensor, torch.Tensor] | None = None

    def __call__(
        self, x_Thd: torch.Tensor, angles_L11d: torch.Tensor, amplitude: float, *, neighbours: bool
    ) -> torch.Tensor:
        """x turned by Megatron's angles [longest, 1, 1, 2 R], each of them there twice; times ``amplitude``."""
        if self._table is None:  # all layers have the same angles
            wide = torch.promote_types(x_Thd.dtype, torch.float32)
            self._table = self._of(angles_L11d.cos(), amplitude, wide), self._of(angles_L11d.sin(), amplitude, wide)
        return rotate(x_Thd, *self._table, neighbours=neighbours, kernel=self.kernel)

    def _of(self, table_L11d: torch.Tensor, amplitude: float, dtype: torch.dtype) -> torch.Tensor:
        """[T, R]: of each token's position."""
        once_LR = table_L11d[:, 0, 0, : table_L11d.shape[-1] // 2]
        return (once_LR * amplitude).to(dtype).index_select(0, self.position_T)


def rotate_packed(
    t: torch.Tensor,
    cu_seqlens: Any,
    freqs: torch.Tensor,
    rotary_interleaved: bool = False,
    *,
    mscale: float = 1.0,
    multi_latent_attention: bool = False,
    mla_rotary_interleaved: bool = False,
    **_: Any,
) -> torch.Tensor:
    """In the place of Megatron's ``_apply_rotary_pos_emb_thd``, with its arguments in 0.16.1 and in 0.19.2.

    ``cu_seqlens`` are boundaries of ``attention.packed_sequences``, which have the ``Rotation`` with them.
    """
    assert not rotary_interleaved, "no family asks for it"
    rotation: Rotation = cu_seqlens.rotation
    return rotation(t, freqs, mscale, neighbours=multi_latent_attention or mla_rotary_interleaved)


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
