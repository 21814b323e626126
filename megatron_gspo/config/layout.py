"""How the model lies over ranks."""

from __future__ import annotations

import math
from typing import Annotated

from pydantic import Field, model_validator

from megatron_gspo.errors import LayoutError
from megatron_gspo.section import AsList, Positive, Section


class ParallelConfig(Section):
    """How the model is laid out over ranks: world = tensor x pipeline x context x data."""

    tensor: Positive = 1
    """Tensor-parallel ranks; sequence parallelism is on whenever this is above 1."""
    pipeline: Positive = 1
    """Pipeline stages."""
    virtual_pipeline: Positive = 1
    """Virtual stages per pipeline rank: it holds every ``pipeline``-th of pipeline x virtual_pipeline pieces of the
    model, which shortens the time that stages wait at the ends of a step. Micro-batches come in multiples of
    ``pipeline``; where there are fewer, dummies fill up."""
    stage_layers: Annotated[tuple[Annotated[int, Field(ge=0)], ...], AsList] | None = None
    """Layers of each of the pipeline x virtual_pipeline virtual stages, in the model's order. Absent: the
    same number each, and where they do not divide, the first ones have one more (the last one also has the output
    layer)."""
    context: Positive = 1
    """Context-parallel ranks: each holds 1/context of every sequence's tokens (load-balanced, zigzag)."""
    expert: Positive = 1
    """Expert-parallel ranks: each holds 1/expert of the experts. Drawn from tensor x context x data."""
    expert_tensor: Positive = 1
    """Tensor-parallel ranks within an expert; 1 whatever ``tensor`` is, unless set."""
    data: Positive | None = None
    """Data-parallel ranks. Absent: what is left of the world under torchrun, else the fewest that hold the experts."""

    overlap: bool = True
    """Reduces gradients over data-parallel ranks, a bucket at a time, while backward goes on, and gathers new weights
    while what follows a step does. It cannot change a step."""

    def world_size(self) -> int:
        """Ranks that this layout needs when it starts by itself."""
        return self.tensor * self.pipeline * self.context * self.data_size()

    def data_size(self, world_size: int | None = None) -> int:
        """Data-parallel ranks, for ``world_size`` ranks or for the smallest world that fits.

        Raises LayoutError, showing the product, when it does not multiply out.
        """
        model = self.tensor * self.pipeline * self.context
        text = f"tensor {self.tensor} x pipeline {self.pipeline} x context {self.context}"
        experts = self.expert * self.expert_tensor
        dense = self.tensor * self.context
        if self.data is not None:
            data = self.data
        elif world_size is not None:
            data = max(1, world_size // model)
        else:
            data = experts // math.gcd(dense, experts)  # the fewest that the experts divide
        if world_size is not None and model * data != world_size:
            raise LayoutError(f"{text} x data {data} = {model * data} ranks, but the world has {world_size}")
        if (dense * data) % experts:
            raise LayoutError(
                f"expert {self.expert} x expert_tensor {self.expert_tensor} = {experts} does not divide "
                f"tensor {self.tensor} x context {self.context} x data {data} = {dense * data}"
            )
        return data

    @property
    def microbatch_multiple(self) -> int:
        """Micro-batches of a mini-batch come in multiples of this: virtual stages take turns a round of stages long."""
        return self.pipeline if self.virtual_pipeline > 1 else 1

    @model_validator(mode="after")
    def _check(self) -> ParallelConfig:
        if self.virtual_pipeline > 1 and self.pipeline == 1:
            raise LayoutError(
                f"virtual_pipeline = {self.virtual_pipeline} cuts the stages of a pipeline, and pipeline = 1 has none"
            )
        stages = self.pipeline * self.virtual_pipeline
        if self.stage_layers is not None and len(self.stage_layers) != stages:
            raise LayoutError(
                f"stage_layers = {list(self.stage_layers)} names {len(self.stage_layers)} virtual stages, but "
                f"pipeline {self.pipeline} x virtual_pipeline {self.virtual_pipeline} = {stages}"
            )
        self.data_size()
        return self
