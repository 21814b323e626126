"""What a section of settings is, and the kinds of values in it."""

from __future__ import annotations

from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field

AsList = Field(strict=False)
"""Of a tuple: TOML has lists. Its items are as strict as everything else."""
Positive = Annotated[int, Field(ge=1)]
Named = Annotated[str, Field(min_length=1)]
PositiveFloat = Annotated[float, Field(gt=0.0, allow_inf_nan=False)]
NonNegativeFloat = Annotated[float, Field(ge=0.0, allow_inf_nan=False)]
Decay = Annotated[float, Field(ge=0, lt=1)]


class Section(BaseModel):
    """Strict: true is no number, "3" none either, 3.0 no count and 1 no truth value."""

    model_config = ConfigDict(
        extra="forbid", frozen=True, strict=True, use_attribute_docstrings=True, protected_namespaces=()
    )
