"""The experts that tokens are sent to."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch


@dataclass(frozen=True)
class RouteShape:
    """What the routes of a mixture-of-experts model look like.

    >>> RouteShape(moe_layers=(False, True), top_k=8, num_experts=128).dtype
    dtype('uint8')
    """

    moe_layers: tuple[bool, ...]
    """[L]: which of the hidden layers are mixtures of experts."""
    top_k: int
    num_experts: int

    @property
    def dtype(self) -> np.dtype[Any]:
        """uint8 holds 256 experts; what it does not hold is kept as uint16."""
        return np.dtype(np.uint8 if self.num_experts <= 256 else np.uint16)


@dataclass(frozen=True)
class RouteShard:
    """The experts of one micro-batch's tokens, as far as one rank's routers choose them: its own layers and tokens.

    One layer, two tokens, two experts each; the last token has no route:

    >>> experts = torch.tensor([[[3, 1], [0, 0]]], dtype=torch.uint8)
    >>> RouteShard((1,), experts, torch.tensor([True, False])).experts_LTK.shape
    torch.Size([1, 2, 2])
    """

    layers: tuple[int, ...]
    """Of this rank's MoE layers, their numbers over all stages and dense layers, from 0; ascending."""
    experts_LTK: torch.Tensor
    """[len(layers), T_local, K] uint8, above 256 experts int16 or uint16: each token's experts, all different. Their
    order within a row is that of the router's softmax, whose last bits depend on it."""
    present_T: torch.Tensor
    """[T_local] bool; where it is False there is no route: the token routes live, and its row may hold anything."""
