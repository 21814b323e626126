"""From a sample to the part of a micro-batch that one rank holds."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any, Self

import numpy as np
import torch

from megatron_gspo.types.columns import Column, Columns


@dataclass(frozen=True)
class Sample:
    """One response as training sees it: the unit that packing places and data-parallel ranks exchange.

    Which tokens are trained is stored. Behind a prompt of two tokens, a response of two:

    >>> sample = Sample.of_response(
    ...     np.array([5, 6]), np.array([7, 8]), group=0, sample=0, rollout_logprobs=np.array([-0.1, -2.0]),
    ...     advantage=1.0, token_advantages=np.array([1.0, 1.0]))
    >>> sample.token_ids.tolist(), sample.trained.tolist(), sample.length, sample.num_trained
    ([5, 6, 7, 8], [False, False, True, True], 4, 2)
    """

    group: int
    """Index of its prompt in the outer step's batch; orders samples the same way on every rank."""
    sample: int
    """Position in its group."""
    token_ids: np.ndarray
    """[L] int32: everything that the model sees, prompt and response."""
    trained: np.ndarray
    """[L] bool: tokens that the policy drew and is trained on; never the first, which nothing predicts. R of them."""
    rollout_logprobs: np.ndarray
    """[R] float32: the engine's, of the trained tokens."""
    advantage: float
    """A_i, the advantage of the response."""
    token_advantages: np.ndarray
    """[R] float64; A_i repeated unless credit is given per token."""
    reward: float = 0.0
    token_rewards: np.ndarray | None = None
    """[R] float64 where the reward gives one a token; None: ``reward`` comes with the last trained token."""
    routes: np.ndarray | None = None
    """``Rollout.routes``; on the data-parallel leader alone, which deals them out (``train.routing``)."""

    @classmethod
    def of_response(cls, prompt_ids: np.ndarray, response_ids: np.ndarray, **rest: Any) -> Self:
        """A sample whose trained tokens are those behind a prompt: [N] and [R] token ids, and the other fields."""
        token_ids = np.concatenate([prompt_ids, response_ids]).astype(np.int32)
        return cls(token_ids=token_ids, trained=np.arange(len(token_ids)) >= len(prompt_ids), **rest)

    def placed(self, weight: float) -> PlacedSample:
        """The sample in its mini-batch."""
        return PlacedSample(**{each.name: getattr(self, each.name) for each in fields(Sample)}, weight=weight)

    @property
    def length(self) -> int:
        """L, the tokens that the model sees."""
        return len(self.token_ids)

    @property
    def num_trained(self) -> int:
        """R, the tokens that are trained."""
        return int(self.trained.sum())

    @property
    def rewards(self) -> np.ndarray:
        """[R] float64 by trained token."""
        if self.token_rewards is not None:
            return self.token_rewards
        rewards = np.zeros(self.num_trained)
        rewards[-1:] = self.reward
        return rewards

    @property
    def predicting(self) -> np.ndarray:
        """[R] int64: the positions in [0, L) that predict the trained tokens, each one before its token."""
        return np.flatnonzero(self.trained) - 1


@dataclass(frozen=True, kw_only=True)
class PlacedSample(Sample):
    """A sample in its mini-batch.

    >>> tokens, zero = np.array([5, 6, 7], dtype=np.int32), np.zeros(1)
    >>> Sample.of_response(
    ...     tokens[:2], tokens[2:], group=0, sample=0, rollout_logprobs=zero, advantage=0.0, token_advantages=zero
    ... ).placed(0.125).weight
    0.125
    """

    weight: float
    """Its share of the mini-batch: 1 / (P * G_p) unless an aggregation says otherwise (``algorithm.weights``)."""


class PackedBatch(Columns):
    """One micro-batch: sequences laid end to end (Megatron's THD format), the same on every rank that works on it.

    Alignment: position t predicts token t + 1. ``labels_T[t]`` is ``tokens_T[t + 1]`` inside a sequence, and
    ``mask_T[t]`` is True where that label is a trained token (the stop token included). So a response of R tokens
    after a prompt of N owns positions N - 1 ... N + R - 2 of its sequence, and the last position owns nothing.

    Padding is what sharding needs and no more; its tokens and labels are 0 and its mask is False. T is a multiple of
    context x tensor ranks: the tail that makes it so is a sequence of its own, not counted in S, with an entry in
    ``cu_seqlens``. Under context parallelism each sequence, the tail too, is filled up behind its last token to a
    multiple of 2 x context, which its zigzag shards need; causal attention never looks back from a token to it.

        tokens_T     5 6 7 8 | 3 4
        labels_T     6 7 8 0 | 4 0         trained: 7, 8 and 4
        mask_T       . x x . | x .
        sequence_T   0 0 0 0 | 1 1         cu_seqlens 0 4 6
    """

    cu_seqlens: torch.Tensor
    """[S + 1] int32, or [S + 2] when there is a padding tail; starts at 0, ends at T. Boundaries with padding."""

    def __init__(
        self,
        columns: Mapping[Column, torch.Tensor],
        *,
        cu_seqlens: torch.Tensor,
        samples: tuple[tuple[int, int], ...],
    ) -> None:
        super().__init__(columns, samples=samples)
        self.cu_seqlens = cu_seqlens

    def to(self, device: torch.device | str) -> Self:
        """On a device."""
        moved = self.map(lambda values: values.to(device))
        return type(self)(dict(moved), cu_seqlens=self.cu_seqlens.to(device), samples=self.samples)

    def _with(self, columns: Mapping[Column, torch.Tensor]) -> Self:
        return type(self)(columns, cu_seqlens=self.cu_seqlens, samples=self.samples)


@dataclass(frozen=True)
class Shard:
    """Which of a micro-batch's tokens a rank stores; by default all of them.

    The T positions are dealt to the context ranks in zigzag order (``batching.packing.zigzag_positions``), and a
    context rank's share is cut into one contiguous slice a tensor rank.

    >>> Shard(tensor_size=2, context_size=4).size
    8
    """

    tensor_rank: int = 0
    tensor_size: int = 1
    context_rank: int = 0
    context_size: int = 1

    @property
    def size(self) -> int:
        """Ranks among which the tokens are spread."""
        return self.tensor_size * self.context_size


class TokenShard(Columns):
    """The part of a PackedBatch whose per-token columns one rank stores, as a ``Shard`` says.

    Per-token columns hold the rank's own T_local = T / (context x tensor) positions, in the order in which the model's
    outputs come; per-sequence columns are whole on every rank. On one rank a shard is the batch.

    >>> shard = TokenShard({TokenShard.mask_T: torch.tensor([True, False])}, samples=((0, 0),))
    >>> shard.replace(old_logprobs_T=torch.tensor([-0.5, 0.0])).old_logprobs_T.tolist()
    [-0.5, 0.0]
    """
