"""Generated micro-batches for the tests of ``algorithm``: every case clips some responses and leaves others alone."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from hypothesis import strategies as st

from megatron_gspo.batching.packing import pack, shard_tokens
from megatron_gspo.types import PlacedSample, Shard, TokenShard


@dataclass(frozen=True)
class Case:
    """Responses with new and old log-probabilities, and a clip range that lies among their ratios."""

    samples: list[PlacedSample]
    new: list[torch.Tensor]
    """By sample, [R] float64, a leaf that requires a gradient."""
    old: list[torch.Tensor]
    ref: list[torch.Tensor]
    clip_low: float
    clip_high: float

    @property
    def weights(self) -> list[float]:
        return [s.weight for s in self.samples]

    @property
    def token_advantages(self) -> list[list[float]]:
        return [s.token_advantages.tolist() for s in self.samples]

    def shard(self, multiple: int = 1, *, masked_value: float = 0.0) -> tuple[TokenShard, torch.Tensor]:
        """(shard with old and reference log-probabilities, new log-probabilities [T]).

        ``masked_value`` stands wherever the mask is False, in all of the per-token fields.
        """
        return shard_of(self.samples, self.new, self.old, self.ref, multiple, masked_value)


def shard_of(
    samples: Sequence[PlacedSample],
    new: Sequence[torch.Tensor],
    old: Sequence[torch.Tensor],
    ref: Sequence[torch.Tensor],
    multiple: int = 1,
    masked_value: float = 0.0,
) -> tuple[TokenShard, torch.Tensor]:
    batch = pack(samples, tensor=multiple, loss_dtype=torch.float64)
    new_T, old_T, ref_T = (spread(values, batch.mask_T, masked_value) for values in (new, old, ref))
    shard = shard_tokens(batch, Shard()).replace(
        old_logprobs_T=old_T,
        ref_logprobs_T=ref_T,
        rollout_logprobs_T=batch.rollout_logprobs_T.masked_fill(~batch.mask_T, masked_value),
        advantages_T=batch.advantages_T.masked_fill(~batch.mask_T, masked_value),
    )
    return shard, new_T


def token_shard(samples: Sequence[tuple[int, int]], **columns: torch.Tensor | None) -> TokenShard:
    """A shard of columns by name; None leaves one out."""
    return TokenShard({}, samples=tuple(samples)).replace(**columns)


def spread(values: Sequence[torch.Tensor], mask_T: torch.Tensor, masked_value: float = 0.0) -> torch.Tensor:
    """Response values at their positions in T; the gradient flows back to them."""
    values_T = torch.full(mask_T.shape, masked_value, dtype=torch.float64)
    return values_T.masked_scatter(mask_T, torch.cat(list(values)))


@st.composite
def cases(draw: st.DrawFn, *, per_token_advantages: bool = False) -> Case:
    """Responses of which the first three are clipped above, clipped below, and not at all; the rest fall as they do."""
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    clip_low, clip_high = draw(st.floats(1e-4, 0.5)), draw(st.floats(1e-4, 0.5))
    lengths = draw(st.lists(st.integers(1, 7), min_size=3, max_size=6))
    noise = draw(st.sampled_from([0.0, 0.3, 3.0]))
    samples, new, old, ref = [], [], [], []
    for i, length in enumerate(lengths):
        shift, advantage = _shift_and_advantage(i, clip_low, clip_high, rng)
        wobble = rng.normal(0, noise * min(clip_low, clip_high), length)
        old_R = torch.from_numpy(rng.normal(-2, 1, length))
        token_advantages = np.full(length, advantage)
        if per_token_advantages:
            token_advantages = token_advantages * rng.uniform(0.5, 2, length)
        samples.append(
            PlacedSample.of_response(
                group=i // 2,
                sample=i % 2,
                prompt_ids=rng.integers(1, 50, rng.integers(1, 5)).astype(np.int32),
                response_ids=rng.integers(1, 50, length).astype(np.int32),
                rollout_logprobs=(old_R.numpy() + rng.normal(0, 0.5, length)).astype(np.float32),
                advantage=advantage,
                token_advantages=token_advantages,
                weight=float(rng.uniform(0.1, 1)),
            )
        )
        old.append(old_R)
        new.append((old_R + torch.from_numpy(shift + wobble - wobble.mean())).requires_grad_())
        ref.append(old_R + torch.from_numpy(rng.normal(0, 0.3, length)))
    return Case(samples, new, old, ref, clip_low, clip_high)


def _shift_and_advantage(i: int, clip_low: float, clip_high: float, rng: np.random.Generator) -> tuple[float, float]:
    floor, ceiling = math.log1p(-clip_low), math.log1p(clip_high)
    if i == 0:
        return 2 * ceiling, 1.5
    if i == 1:
        return 2 * floor, -0.5
    if i == 2:
        return 0.4 * ceiling, 1.0
    return float(rng.uniform(2 * floor, 2 * ceiling)), float(rng.choice([-1.0, 0.0, 0.7]))
