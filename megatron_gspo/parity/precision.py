"""What each dtype can hold a layout to."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Precision:
    """Tolerances of a dtype, relative to the largest entry of a tensor, and how its mini-batches are made."""

    tolerance: float
    """Of logprobs, entropies, ratios, losses, metrics, gradients and parameters."""
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
    """Whether every response with a near-tie is left out beforehand. In bfloat16 hardly one is without: there only
    those go that do fall on the other side, and the layout is run again."""
    group: int
    """Responses in each whole group; more where many will be left out."""
    lr: float
    """Learning rate. In float64 it is so small that the float32 norm, by which gradients are clipped, moves no weight
    by more than lr x norm = 1e-12 and no later gradient by more than the tolerance (docs/parity.md). In bfloat16 no
    weight moves by as much as its own rounding: routes then are the same in every pass."""
    eps: float
    """Adam's eps in units of the root mean square of the clipped gradient. A rounding of the gradient is a large part
    of Adam's step, g / (|g| + eps), wherever |g| is small: the coarser the dtype, the more of it is eps."""


PRECISIONS = {
    "float64": Precision(1e-10, 1e-6, 1e-6, 1e-5, 1e-9, 1e-3, 1e-5, sets_apart=True, group=4, lr=1e-6, eps=1.0),
    "float32": Precision(1e-5, 1e-5, 1e-3, 1e-4, 1e-5, 1e-3, 1e-5, sets_apart=True, group=4, lr=1e-3, eps=1.0),
    "bfloat16": Precision(1e-1, 1e-1, 1e-1, 1e-1, 5e-2, 1e-1, 5e-1, sets_apart=False, group=10, lr=1e-6, eps=100.0),
}
"""By ``model.dtype``. bfloat16's were measured on the tiny models: gradients within 6.1e-2 of one process's, and within
3.7e-1 of transformers', whose routes are not seen and may fall on the other side of a near-tie."""
