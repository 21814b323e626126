"""What a section of settings is, and the kinds of values in it."""

from __future__ import annotations

from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field

AsList = Field(strict=False)
"""Of a tuple: TOML has lists. Its items are as strict as everything else."""
MOST = 2**31 - 1
"""Of anything that is counted: what lies beyond is no number of things, and a loop over it is a hang."""
LONGEST_S = 1e9
"""Of a time in seconds, thirty years: threads and sockets take no longer ones."""
Positive = Annotated[int, Field(ge=1, le=MOST)]
Count = Annotated[int, Field(ge=0, le=MOST)]
Seconds = Annotated[float, Field(gt=0.0, le=LONGEST_S, allow_inf_nan=False)]
Named = Annotated[str, Field(min_length=1)]
PositiveFloat = Annotated[float, Field(gt=0.0, allow_inf_nan=False)]
NonNegativeFloat = Annotated[float, Field(ge=0.0, allow_inf_nan=False)]
Decay = Annotated[float, Field(ge=0, lt=1)]


class Section(BaseModel):
    """Strict: true is no number, "3" none either, 3.0 no count and 1 no truth value."""

    model_config = ConfigDict(
        extra="forbid", frozen=True, strict=True, use_attribute_docstrings=True, protected_namespaces=()
    )
