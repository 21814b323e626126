"""The experts that tokens are sent to."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch


@dataclass(frozen=True)
class RouteShape:
    """What the routes of a mixture-of-experts model look like."""

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
    """The experts of one micro-batch's tokens, as far as one rank's routers choose them: its own layers and tokens."""

    layers: tuple[int, ...]
    """Of this rank's MoE layers, their numbers over all stages and dense layers, from 0; ascending."""
    experts_LTK: torch.Tensor
    """[len(layers), T_local, K] uint8, above 256 experts int16 or uint16: each token's experts, all different. Their
    order within a row is that of the router's softmax, whose last bits depend on it."""
    present_T: torch.Tensor
    """[T_local] bool; where it is False there is no route: the token routes live, and its row may hold anything."""
