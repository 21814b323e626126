"""What a softmax needs to know of some columns: their maximum, and sums relative to it."""

from __future__ import annotations

from dataclasses import dataclass

import torch


@dataclass
class Sums:
    """Per token, over columns; tensors of one shape, float32 or float64."""

    maximum: torch.Tensor
    """A finite lowest number where there are no columns: -inf would make 0 * inf of sums that are 0."""
    exp: torch.Tensor
    """sum exp(z - maximum)"""
    weighted: torch.Tensor
    """sum exp(z - maximum) (z - maximum)"""
    label: torch.Tensor
    """z at the label, for a label among the columns"""
    found: torch.Tensor
    """whether the label is among the columns"""

    def move_to(self, maximum: torch.Tensor) -> None:
        """Makes the sums relative to another maximum, not below the present one."""
        difference = self.maximum - maximum
        scale = difference.exp()
        self.weighted = (self.weighted + difference * self.exp) * scale
        self.exp = self.exp * scale
        self.maximum = maximum

    def stacked(self) -> torch.Tensor:
        """[3, tokens]: what adds up over tensor ranks, the label's logit relative to the maximum."""
        return torch.stack([self.exp, self.weighted, (self.label - self.maximum).where(self.found, 0)])
