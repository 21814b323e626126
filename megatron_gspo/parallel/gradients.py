"""Adding a weight's gradient where Megatron's DDP accumulates it, in place of returning it from a backward.

DDP gives a parameter ``main_grad``, its part of a contiguous buffer in the dtype of accumulation, and a hook that adds
what a backward returns to it, unless ``grad_added_to_main_grad`` says that this was done. ``zero_out_wgrad`` marks a
head that is tied to the embedding of the same stage: the hook gets the sum of both.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.distributed as dist


def where_gradients_add(weight: torch.Tensor) -> torch.Tensor | None:
    """The buffer that a backward adds this weight's gradient to, marked as added; None where it must return one."""
    main_grad: torch.Tensor | None = getattr(weight, "main_grad", None)
    fused = hasattr(weight, "grad_added_to_main_grad") and not getattr(weight, "zero_out_wgrad", False)
    if main_grad is None or not fused or main_grad.dtype != torch.promote_types(weight.dtype, torch.float32):
        return None
    weight.grad_added_to_main_grad = True  # type: ignore[attr-defined]
    return main_grad


def gradient_was_added(weight: torch.Tensor) -> None:
    """To be called by the backward that did, which then returns None for the weight.

    DDP's hook runs all the same, with what it asks for: that there is a gradient. It is one zero, repeated by strides
    of 0, that nobody reads; one that backward returned would be memory as large as the weight.
    """
    weight.grad = weight.new_zeros(()).expand(weight.shape)


def sum_gradients(gradients: Sequence[torch.Tensor], group: dist.ProcessGroup) -> None:
    """Replaces gradients, of one dtype, by their sums over the group, in one message. Collective."""
    if group.size() == 1 or not gradients:
        return
    together = torch.cat([gradient.flatten() for gradient in gradients])
    dist.all_reduce(together, group=group)
    for gradient, total in zip(gradients, together.split([gradient.numel() for gradient in gradients]), strict=True):
        gradient.copy_(total.view(gradient.shape))
