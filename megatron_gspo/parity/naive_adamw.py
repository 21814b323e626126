"""AdamW once more, one tensor at a time, in float64 and in one process: what the product's optimizer is held against.

Written from arXiv 1711.05101 (algorithm 2) and, for clipping, ``torch.nn.utils.clip_grad_norm_``; shares nothing with
``megatron_gspo.megatron``. What decays is told by Hugging Face names, not by shapes.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field

import torch


@dataclass
class NaiveAdamW:
    """Weights by Hugging Face name with their moments, all float64."""

    weights: dict[str, torch.Tensor]
    betas: tuple[float, float]
    eps: float
    weight_decay: float
    clip_grad: float
    steps: int = 0
    first: dict[str, torch.Tensor] = field(default_factory=dict)
    second: dict[str, torch.Tensor] = field(default_factory=dict)

    def step(self, gradients: Mapping[str, torch.Tensor], lr: float) -> None:
        """Moves the weights that have a gradient: clipped by the norm over all of them, decayed, then Adam's step."""
        norm = gradient_norm(gradients)
        factor = min(1.0, self.clip_grad / (norm + 1e-6))
        self.steps += 1
        b1, b2 = self.betas
        for name, gradient in gradients.items():
            g = factor * gradient.double()
            m = b1 * self.first.get(name, torch.zeros_like(g)) + (1 - b1) * g
            v = b2 * self.second.get(name, torch.zeros_like(g)) + (1 - b2) * g * g
            self.first[name], self.second[name] = m, v
            m_hat, v_hat = m / (1 - b1**self.steps), v / (1 - b2**self.steps)
            decay = self.weight_decay if decays(name) else 0.0
            w = self.weights[name]
            self.weights[name] = w - lr * decay * w - lr * m_hat / (torch.sqrt(v_hat) + self.eps)


def decays(name: str) -> bool:
    """Whether a tensor decays: norms and biases are exempt."""
    parts = name.split(".")
    return parts[-1] != "bias" and not (len(parts) > 1 and "norm" in parts[-2])


def gradient_norm(gradients: Mapping[str, torch.Tensor]) -> float:
    """The Euclidean norm of all gradients as one vector, each tensor of the model once."""
    return math.sqrt(sum(float(gradient.double().square().sum()) for gradient in gradients.values()))


def naive_lr(step: int, *, lr: float, min_lr: float, warmup: int, total: int) -> float:
    """Of an optimizer step, counted from 0: a linear warm-up, the last step of which has ``lr``, then half a cosine."""
    if step < warmup:
        return lr * (step + 1) / warmup
    angle = math.pi * (step - warmup) / (total - warmup)
    return min_lr + (lr - min_lr) * (1 + math.cos(angle)) / 2
