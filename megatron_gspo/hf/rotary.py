"""Rotary angles that are scaled for longer contexts: the inverse frequency of each pair of a head's dimensions.

Everything is float32, operation by operation as transformers and SGLang compute it: an angle is a frequency times a
position of up to 10^5, so that another rounding of a frequency would be seen.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Llama3Rope:
    """Llama 3.1's rule: wavelengths above ``original / low`` positions are ``factor`` times as long, those below
    ``original / high`` stay, and what lies between is interpolated (arXiv 2407.21783, sec. 3.4; Meta's release)."""

    factor: float
    low: float
    high: float
    original_positions: int
    """Of the context that the model was first trained with."""

    def scaled(self, powers_D: torch.Tensor, base: float) -> torch.Tensor:
        """[d / 2] float32 frequencies; ``powers_D`` are base^(2 i / d), of which those unscaled are the inverse."""
        inverse_D = 1.0 / powers_D
        wavelength = 2 * math.pi / inverse_D
        long, short = self.original_positions / self.low, self.original_positions / self.high
        stretched = torch.where(wavelength > long, inverse_D / self.factor, inverse_D)
        smooth = (self.original_positions / wavelength - self.low) / (self.high - self.low)
        between = (1 - smooth) * stretched / self.factor + smooth * stretched
        return torch.where((wavelength >= short) & (wavelength <= long), between, stretched)


@dataclass(frozen=True)
class YarnRope:
    """YaRN (arXiv 2309.00071, sec. 3.2 and 3.4): dimensions that turn more than ``fast`` times within the original
    context stay, those that turn less than ``slow`` times are ``factor`` times as long, with a ramp between them.

    Cosines and sines are multiplied by m(mscale) / m(mscale_all_dim), m(x) = 0.1 x ln(factor) + 1: by m(1), the paper's
    (eq. 22), unless a model states both.
    """

    factor: float
    fast: float
    slow: float
    original_positions: int
    mscale: float = 1.0
    mscale_all_dim: float = 0.0
    whole: bool = True
    """Whether the ramp begins and ends at whole dimensions."""

    def scaled(self, powers_D: torch.Tensor, base: float) -> torch.Tensor:
        """As ``Llama3Rope.scaled``."""
        half = len(powers_D)
        first, last = (self._dimension(turns, 2 * half, base) for turns in (self.fast, self.slow))
        if self.whole:
            first, last = math.floor(first), math.ceil(last)
        first, last = max(first, 0), min(last, 2 * half - 1)
        last += 0.001 * (first == last)
        ramp = ((torch.arange(half, dtype=torch.float32) - first) / (last - first)).clamp(0, 1)
        kept = 1 - ramp
        return 1.0 / (self.factor * powers_D) * (1 - kept) + 1.0 / powers_D * kept

    def _dimension(self, turns: float, dim: int, base: float) -> float:
        """The dimension that turns so often in the original context."""
        return dim * math.log(self.original_positions / (turns * 2 * math.pi)) / (2 * math.log(base))


ScaledRope = Llama3Rope | YarnRope


def inverse_frequencies(dim: int, base: float, scaling: ScaledRope | None) -> torch.Tensor:
    """[dim / 2] float32: radians a position for each pair of the ``dim`` dimensions that are turned."""
    powers = base ** (torch.arange(0, dim, 2).float() / dim)
    return 1.0 / powers if scaling is None else scaling.scaled(powers, base)
