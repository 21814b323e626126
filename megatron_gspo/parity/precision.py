"""What each dtype can hold a layout to."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Precision:
    """Tolerances of a dtype, relative to the largest entry of a tensor, and how its mini-batch is made."""

    tolerance: float
    """Of logprobs, entropies, ratios, losses, gradients and parameters."""
    norm: float
    """Of the gradient norm, which Megatron keeps in float32 whatever the model's dtype."""
    floor: float
    """A tensor whose largest entry is below this part of the column's largest is compared to that part: one that is
    zero by theory (an idle expert's gradient) has no scale of its own."""
    near_tie: float
    """A router's k-th and (k+1)-th logits closer than this may change places without a fault."""
    near_clip: float
    """A log-ratio closer than this to an end of the clip range may fall on either side of it."""
    spread: float
    """Clip range of the mini-batch on either side of 1; old logprobs lie a third and three times as far from it."""
    independent: float
    """Tolerance against transformers, which rounds norms, rotary angles and router scores to float32 inside."""
    sets_apart: bool
    """Whether every response with a near-tie is taken out of the loss beforehand. In bfloat16 hardly one is without:
    there only those go that do fall on the other side, and the layout is run again."""
    adam: bool
    """Whether the optimizer step is AdamW's own. Elsewhere a rounding of the gradient is a large part of Adam's first
    step, g / (|g| + eps), wherever g is small: eps is then far above every gradient, and the step is SGD's."""


PRECISIONS = {
    "float64": Precision(1e-10, 1e-6, 1e-6, 1e-5, 1e-9, 1e-3, 1e-5, sets_apart=True, adam=True),
    "float32": Precision(1e-5, 1e-5, 1e-3, 1e-4, 1e-5, 1e-3, 1e-5, sets_apart=True, adam=False),
    "bfloat16": Precision(1e-1, 1e-1, 1e-1, 1e-1, 5e-2, 1e-1, 5e-1, sets_apart=False, adam=False),
}
"""By ``model.dtype``. bfloat16's were measured on the tiny models: gradients within 5e-2 of one process's, and within
2.1e-1 of transformers', whose routes are not seen and may fall on the other side of a near-tie."""
