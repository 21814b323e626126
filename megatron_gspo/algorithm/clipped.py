"""Settings of the losses that clip a ratio."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field, model_validator

from megatron_gspo.algorithm.base import Algorithm
from megatron_gspo.section import PositiveFloat

WIDE_CLIP = 0.05
"""A clip range of s_i above this needs ``allow_wide_clip``: it is what PPO uses for single tokens, and s_i, a geometric
mean over the response, hardly ever leaves it, so nothing would be clipped."""

Below = Annotated[float, Field(gt=0.0, lt=1.0)]


class Clipped(Algorithm):
    """An objective in which a ratio is clipped; subclasses have defaults for its range."""

    clip_low: Below
    """The ratio is clipped below at 1 - clip_low."""
    clip_high: PositiveFloat
    """The ratio is clipped above at 1 + clip_high."""
    allow_wide_clip: bool = False
    """Permits a clip range of the sequence ratio above 0.05, where GSPO hardly ever clips."""

    def clip_range(self) -> tuple[float, float]:
        return self.clip_low, self.clip_high

    @model_validator(mode="after")
    def _is_a_range_of_its_ratio(self) -> Clipped:
        if self.clips == "responses" and max(self.clip_range()) > WIDE_CLIP and not self.allow_wide_clip:
            fields = type(self).model_fields
            raise ValueError(
                f"clip_low = {self.clip_low:g}, clip_high = {self.clip_high:g} is a range for token ratios; "
                f"{self.name} clips the sequence ratio s_i, whose defaults are {fields['clip_low'].default:g} and "
                f"{fields['clip_high'].default:g}: use those, or set algorithm.allow_wide_clip = true"
            )
        return self
