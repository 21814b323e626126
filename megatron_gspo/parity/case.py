"""The mini-batch of a check, the same for every layout, and how a layout lays it out."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

import numpy as np
import torch

from megatron_gspo import config
from megatron_gspo.algorithm.catalog import LOSSES
from megatron_gspo.config import RunConfig
from megatron_gspo.parity.layouts import Layout
from megatron_gspo.parity.precision import PRECISIONS, Precision
from megatron_gspo.types import Sample

Key = tuple[int, int]
"""(group, sample) of a response."""
Plan = list[list[list[int]]]
"""Data-parallel rank -> micro-batch -> indices of samples; an empty micro-batch is a dummy."""

ADAM = {"lr": 1e-4, "weight_decay": 0.1, "betas": [0.9, 0.98], "eps": 1e-8}
SGD_LIMIT = {"lr": 1e6, "weight_decay": 0.0, "betas": [0.9, 0.98], "eps": 1e6}
"""Adam's first step where eps is far above every gradient: one unit of SGD."""
MICROBATCHES = 4


@dataclass(frozen=True)
class Case:
    """A model, a mini-batch and a loss."""

    path: str
    """Hugging Face directory."""
    samples: tuple[Sample, ...]
    """Their advantages and weights are the mini-batch's. A weight of 0 sets a response with a near-tie apart."""
    old: tuple[np.ndarray, ...] = ()
    """By sample, [R] float64 log pi_old; set by the reference."""
    alone: int = 0
    """The sample with a micro-batch to itself; the reference chooses one that a cut in the middle goes through."""
    seed: int = 0
    """Places the old logprobs."""
    loss: str = "gspo"
    dtype: str = "float64"
    temperature: float = 0.8
    model: Mapping[str, Any] = field(default_factory=dict)
    """Further settings of ``[model]``."""
    replay: bool = False
    """Whether routers are made to choose ``routes`` in every pass, which are not what they would choose."""

    @property
    def precision(self) -> Precision:
        return PRECISIONS[self.dtype]

    @property
    def clip(self) -> float:
        """Both clip ranges."""
        return self.precision.spread

    @property
    def loss_dtype(self) -> torch.dtype:
        return torch.float64 if self.dtype == "float64" else torch.float32

    @cached_property
    def keys(self) -> tuple[Key, ...]:
        return tuple((sample.group, sample.sample) for sample in self.samples)

    @cached_property
    def index_of(self) -> dict[Key, int]:
        return {key: index for index, key in enumerate(self.keys)}

    @cached_property
    def starts(self) -> np.ndarray:
        """[samples + 1] int64: tokens of all samples are numbered one after the other; where each sample begins."""
        return np.cumsum([0, *(sample.length for sample in self.samples)])

    def predicting(self, index: int) -> slice:
        """The tokens of a sample, by number, that predict its response tokens: from the prompt's last on."""
        first = int(self.starts[index]) + len(self.samples[index].prompt_ids) - 1
        return slice(first, first + len(self.samples[index].response_ids))

    def advantages(self, index: int) -> list[float]:
        """By response token: what the loss reads, the response's own or a token's."""
        sample = self.samples[index]
        per_token = self.loss != "gspo"
        return sample.token_advantages.tolist() if per_token else [sample.advantage] * len(sample.response_ids)

    def routes(self, layer: int, experts: int, top_k: int) -> np.ndarray:
        """[tokens, K] int64: random experts of a layer, all different in a row, by token number; of any layout."""
        rng = np.random.default_rng([self.seed, layer])
        return rng.random((int(self.starts[-1]), experts)).argsort(axis=1)[:, :top_k]

    def run_config(self, layout: Layout) -> RunConfig:
        """The configuration of a layout. Raises LayoutError where ``ParallelConfig`` refuses it."""
        return config.parse(
            {
                "model": {**self.model, **layout.model, "path": self.path, "dtype": self.dtype},
                "data": {"path": "unused"},
                "train": {"run_dir": "unused-run"},
                "parallel": dict(layout.parallel),
                "optimizer": {**(ADAM if self.precision.adam else SGD_LIMIT), "clip_grad": 0.0},
                "rollout": {"temperature": self.temperature},
            },
            source=layout.name,
        )


def random_samples(
    vocabulary: int, seed: int, *, groups: int = 4, group_size: int = 4, max_prompt: int = 9, max_response: int = 40
) -> tuple[Sample, ...]:
    """Groups of random tokens: uneven lengths, advantages of both signs, which for token losses differ by token."""
    rng = np.random.default_rng(seed)
    samples = []
    for group in range(groups):
        prompt_ids = rng.integers(0, vocabulary, rng.integers(1, max_prompt + 1)).astype(np.int32)
        rewards = rng.random(group_size)
        for number, advantage in enumerate((rewards - rewards.mean()) / rewards.std()):
            length = int(rng.integers(1, max_response + 1))
            samples.append(
                Sample(
                    group=group,
                    sample=number,
                    prompt_ids=prompt_ids,
                    response_ids=rng.integers(0, vocabulary, length).astype(np.int32),
                    rollout_logprobs=np.zeros(length, np.float32),
                    advantage=float(advantage),
                    token_advantages=rng.normal(advantage, 1.0, length),
                    weight=1.0 / (groups * group_size),
                )
            )
    return tuple(samples)


def straddling_old(case: Case, new: Sequence[np.ndarray]) -> tuple[np.ndarray, ...]:
    """Old logprobs that put ratios on both sides of both ends of the clip range, and none near an end.

    A log-ratio is a third of the range or three times it, up or down. Sequence ratios: samples take the four in turn,
    and tokens vary around them with a mean of zero. Token ratios: tokens take one of the four at random.
    """
    rng = np.random.default_rng(case.seed)
    places = case.clip * np.array([1 / 3, 3.0, -1 / 3, -3.0])
    olds = []
    for index, new_R in enumerate(new):
        if LOSSES[case.loss].ratio == "token":
            log_ratio_R = rng.choice(places, len(new_R))
        else:
            noise_R = case.clip * rng.normal(size=len(new_R))
            log_ratio_R = places[index % 4] + noise_R - noise_R.mean()
        olds.append(new_R - log_ratio_R)
    return tuple(olds)


def set_apart(case: Case, indices: Sequence[int]) -> Case:
    """The case with the loss of these samples taken out: their weight is 0."""
    samples = [replace(s, weight=0.0) if i in set(indices) else s for i, s in enumerate(case.samples)]
    return replace(case, samples=tuple(samples))


def uneven_plan(samples: int, data_ranks: int, multiple: int, alone: int = 0) -> Plan:
    """Shares of different sizes, out of order; the last of several ranks has one micro-batch fewer and a dummy.

    Args:
        multiple: micro-batches a rank come in multiples of it.
        alone: this sample is the first rank's first micro-batch.
    """
    order = np.random.default_rng(7).permutation(samples)
    order = np.concatenate([[alone], order[order != alone]])
    cuts = (np.linspace(0, 1, data_ranks + 1)[1:-1] ** 0.7 * samples).round().astype(int)  # the first rank has more
    count = -(-MICROBATCHES // multiple) * multiple
    plan: Plan = []
    for rank, share in enumerate(np.split(order, cuts)):
        used = MICROBATCHES - (data_ranks > 1 and rank == data_ranks - 1)
        first = [share[:1]] if rank == 0 else []
        rest, packs = share[len(first) :], np.arange(1, used - len(first) + 1)
        parts = np.split(rest, (packs.cumsum()[:-1] / packs.sum() * len(rest)).round().astype(int))  # uneven packs
        plan.append([part.tolist() for part in first + parts] + [[] for _ in range(count - used)])
    return plan
