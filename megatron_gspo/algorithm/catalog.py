"""The losses that a configuration can name, without importing torch.

Adding a loss is one file in ``algorithm/losses`` and one entry here (docs/extending.md shows both).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class LossEntry:
    """What the configuration has to know of a loss."""

    function: str
    """``module:function``, imported when training starts."""
    clip_low: float
    clip_high: float
    """The default clip range: the ratio is kept in [1 - clip_low, 1 + clip_high]."""
    ratio: Literal["sequence", "token"]
    """Whether the clip range applies to s_i (whose natural spread is far narrower) or to a token's w_t."""
    source: str
    """Where the formula and the defaults come from."""


LOSSES: dict[str, LossEntry] = {
    "gspo": LossEntry(
        "megatron_gspo.algorithm.losses.gspo:gspo", 3e-4, 4e-4, "sequence", "arXiv 2507.18071, eq. 5 and section 5.1"
    ),
    "gspo-token": LossEntry(
        "megatron_gspo.algorithm.losses.gspo_token:gspo_token", 3e-4, 4e-4, "sequence", "arXiv 2507.18071, eq. 13"
    ),
    "grpo": LossEntry(
        "megatron_gspo.algorithm.losses.grpo:grpo", 0.2, 0.27, "token", "arXiv 2507.18071, eq. 2 and section 5.1"
    ),
    "ppo": LossEntry("megatron_gspo.algorithm.losses.ppo:ppo", 0.2, 0.2, "token", "arXiv 1707.06347, eq. 7"),
}
