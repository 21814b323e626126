"""Low-rank adapters."""

from __future__ import annotations

import math
from typing import Annotated

from pydantic import model_validator

from megatron_gspo.section import AsList, Count, Named, PositiveFloat, Section

ALL_LINEAR = "all-linear"


class LoraConfig(Section):
    """Low-rank adapters (LoRA, arXiv 2106.09685) on the policy's matrices, which are then all that is trained of it."""

    rank: Count = 0
    """Rank of each adapter; 0: there are none, and every weight is trained."""
    alpha: PositiveFloat = 32.0
    """An adapted matrix is W + (alpha / rank) B A."""
    rslora: bool = False
    """alpha / sqrt(rank) instead (arXiv 2312.03732), so that a higher rank doesn't learn more slowly."""
    targets: Annotated[tuple[Named, ...], AsList] = (ALL_LINEAR,)
    """Matrices that get one, by the ends of their Hugging Face names: "q_proj"; "experts.down_proj" for those of routed
    experts alone. "all-linear": every matrix of attention, MLPs and experts; never routers, embeddings and the head."""
    path: str = ""
    """Directory of adapters that training starts from, in PEFT's layout, as ``adapter/`` of an earlier run; of the same
    rank, alpha and targets. Empty: A is random (from ``train.seed``), B is zero, and the model starts as it is."""

    @property
    def scale(self) -> float:
        """What B A is multiplied by."""
        return self.alpha / (math.sqrt(self.rank) if self.rslora else self.rank)

    @model_validator(mode="after")
    def _check(self) -> LoraConfig:
        plain = type(self).model_fields
        for name in ("alpha", "rslora", "targets", "path"):
            if not self.rank and getattr(self, name) != plain[name].default:
                raise ValueError(f"{name} = {getattr(self, name)!r} has no effect with rank = 0: set lora.rank")
        if not self.targets:
            raise ValueError(f'targets = [] adapts nothing: name matrices, or "{ALL_LINEAR}"')
        twice = sorted({name for name in self.targets if self.targets.count(name) > 1})
        if twice:
            raise ValueError(f"targets names {twice[0]} more than once")
        if ALL_LINEAR in self.targets and len(self.targets) > 1:
            raise ValueError(f'targets = {list(self.targets)}: "{ALL_LINEAR}" stands alone')
        return self
