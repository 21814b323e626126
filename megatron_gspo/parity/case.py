"""The mini-batches of a check, the same for every layout."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

import numpy as np
import torch

from megatron_gspo import config
from megatron_gspo.algorithm.base import Algorithm, algorithm_class, make_algorithm
from megatron_gspo.config import RunConfig
from megatron_gspo.parity.layouts import Layout
from megatron_gspo.parity.precision import PRECISIONS, Precision
from megatron_gspo.types import Sample

Key = tuple[int, int]
"""(group, sample) of a response."""

STEPS = (1, 4)
"""What the two optimizer steps are numbered in a run of TOTAL_STEPS: one lies in the warm-up, one in the decay."""
TOTAL_STEPS, WARMUP_STEPS = 8, 3
GROUPS = 2
"""Of a mini-batch."""
LEFT = ((0, 1), (2,))
"""By group of the second mini-batch: which of its responses were not dropped."""
BETAS, WEIGHT_DECAY = (0.9, 0.98), 0.1
KL_COEF = 0.3


@dataclass(frozen=True)
class Case:
    """A model, the responses of an outer step of two mini-batches, and a loss."""

    path: str
    """Hugging Face directory."""
    samples: tuple[Sample, ...]
    """``train.batch.place`` gives them their weights in a layout, and the reference has its own."""
    old: Mapping[int, np.ndarray] = field(default_factory=dict)
    """Sample -> [R] float64 log pi_old; set by the reference."""
    ref: Mapping[int, np.ndarray] = field(default_factory=dict)
    """Sample -> [R] float64 log pi_ref; set by the reference. Layouts compute theirs."""
    clip_grad: float = 0.0
    """A part of the first gradient's norm; set by the reference."""
    eps: float = 1.0
    """Adam's, of the size of a gradient's entries: far below them, a step would not depend on clipping. Set by the
    reference."""
    dropped: tuple[Key, ...] = ()
    """Responses that were left out for a near-tie in a router."""
    seed: int = 0
    loss: str = "gspo"
    dtype: str = "float64"
    temperature: float = 0.8
    model: Mapping[str, Any] = field(default_factory=dict)
    """Further settings of ``[model]``."""
    lora: Mapping[str, Any] = field(default_factory=dict)
    """Settings of ``[lora]``, with a path of adapters whose B are not zero; empty: every weight is trained."""
    merged: str = ""
    """With adapters, the directory of the model that they make."""
    replay: bool = False
    """Whether routers are made to choose ``routes`` in every pass, which are not what they would choose."""

    @property
    def precision(self) -> Precision:
        """What its dtype is held to."""
        return PRECISIONS[self.dtype]

    @property
    def clip(self) -> float:
        """Both clip ranges."""
        return self.precision.spread

    @cached_property
    def algorithm(self) -> Algorithm:
        """The loss, with a clip range of the case's where it has one, and a KL term."""
        settings: dict[str, Any] = {"kl_loss_coef": KL_COEF}
        cls = algorithm_class(self.loss)
        if cls.clips != "nothing":
            settings |= dict.fromkeys(cls.clip_settings, self.clip)
        if "allow_wide_clip" in cls.model_fields:
            settings["allow_wide_clip"] = True
        if cls.needs_reference:
            settings["reference"] = self.path
        return make_algorithm(self.loss, **settings)

    @property
    def loss_dtype(self) -> torch.dtype:
        """Of advantages, weights and ratios."""
        return torch.float64 if self.dtype == "float64" else torch.float32

    @property
    def compares_everything(self) -> bool:
        """Whether every loss, every correction and a critic are compared too: where roundings decide nothing."""
        return self.dtype == "float64"

    @cached_property
    def keys(self) -> tuple[Key, ...]:
        """(group, sample) of each."""
        return tuple((sample.group, sample.sample) for sample in self.samples)

    @cached_property
    def index_of(self) -> dict[Key, int]:
        """Key -> index."""
        return {key: index for index, key in enumerate(self.keys)}

    @cached_property
    def starts(self) -> np.ndarray:
        """[samples + 1] int64: tokens of all samples are numbered one after the other; where each sample begins."""
        return np.cumsum([0, *(sample.length for sample in self.samples)])

    @property
    def tokens(self) -> int:
        """Of all samples."""
        return int(self.starts[-1])

    @cached_property
    def minibatches(self) -> list[list[int]]:
        """The samples of each mini-batch that has any, in order."""
        by_step: dict[int, list[int]] = {}
        for index, sample in enumerate(self.samples):
            by_step.setdefault(sample.group // GROUPS, []).append(index)
        return [by_step[step] for step in sorted(by_step)]

    def own(self, index: int) -> slice:
        """A sample's tokens, by number."""
        return slice(int(self.starts[index]), int(self.starts[index + 1]))

    def predicting(self, index: int) -> np.ndarray:
        """[R] int64: the tokens of a sample, by number, that predict its trained tokens."""
        return int(self.starts[index]) + self.samples[index].predicting

    def advantages(self, index: int) -> list[float]:
        """By response token: what the loss reads, the response's own or a token's."""
        sample = self.samples[index]
        return sample.token_advantages.tolist() if self.algorithm.per_token else [sample.advantage] * sample.num_trained

    def routes(self, layer: int, experts: int, top_k: int) -> np.ndarray:
        """[tokens, K] int64: random experts of a layer, all different in a row, by token number; of any layout."""
        rng = np.random.default_rng([self.seed, layer])
        return rng.random((self.tokens, experts)).argsort(axis=1)[:, :top_k]

    def without(self, indices: Collection[int]) -> Case:
        """The case without these samples, before its reference was computed."""
        kept = tuple(sample for index, sample in enumerate(self.samples) if index not in indices)
        gone = tuple(self.keys[index] for index in sorted(indices))
        return replace(self, samples=kept, dropped=self.dropped + gone, old={}, ref={})

    def run_config(self, layout: Layout) -> RunConfig:
        """The configuration of a layout. Raises LayoutError where ``ParallelConfig`` refuses it."""
        longest = max(sample.length for sample in self.samples)
        return config.parse(
            {
                "model": {**self.model, **layout.model, "path": self.path, "dtype": self.dtype},
                "data": {"path": "unused"},
                "algorithm": self.algorithm.model_dump(exclude_none=True),
                "train": {
                    "run_dir": "unused-run",
                    "outer_steps": TOTAL_STEPS // 2,
                    "prompts_per_step": 2 * GROUPS,
                    "minibatches": 2,
                    "microbatch_tokens": -(-longest // 16) * 16,
                },
                "lora": dict(self.lora),
                "parallel": dict(layout.parallel),
                "optimizer": {
                    "lr": self.precision.lr,
                    "min_lr": self.precision.lr / 10,
                    "schedule": "cosine",
                    "warmup_steps": WARMUP_STEPS,
                    "weight_decay": WEIGHT_DECAY,
                    "betas": list(BETAS),
                    "eps": self.eps,
                    "clip_grad": self.clip_grad,
                },
                "rollout": {
                    "temperature": self.temperature,
                    "group_size": self.precision.group,
                    "max_prompt_tokens": 1,
                    "max_response_tokens": longest - 1,
                },
                "replay": {"mode": "r3" if self.replay else "off"},
            },
            source=layout.name,
        )


def random_samples(
    vocabulary: int, seed: int, *, group_size: int = 4, max_prompt: int = 9, max_response: int = 40
) -> tuple[Sample, ...]:
    """Random tokens for two mini-batches: advantages of both signs, which for token losses differ by token.

    The first has two whole groups of responses of uneven lengths. Of the second's two groups, three long responses are
    left, each of which fills most of a micro-batch: groups count by the responses that survive, and of two or four data
    ranks one has a dummy. (Groups above four, of which many a response will be left out, are whole there too.) A
    response of twice the length comes first in both: what cuts a micro-batch goes through it. Of every other response
    that is long enough, two tokens in the middle are not trained, as if an environment had said them.
    """
    rng = np.random.default_rng(seed)
    samples = []
    whole = (range(group_size),) * GROUPS
    left = LEFT if group_size == 4 else whole
    for group, survivors in enumerate((*whole, *left)):
        prompt_ids = rng.integers(0, vocabulary, rng.integers(1, max_prompt + 1)).astype(np.int32)
        rewards = rng.random(group_size)
        advantages = (rewards - rewards.mean()) / rewards.std()
        clipped = 3 if group == 1 else 1  # ``straddling_old``: below the range, or above it
        advantages *= np.sign(advantages[clipped]) * (-1 if clipped == 3 else 1)
        for number in survivors:
            length = int(rng.integers(1, max_response + 1))
            if number == 0 and group % GROUPS == 0:
                length = 2 * max_response
            elif group >= GROUPS and left == LEFT:
                length = round(1.5 * max_response)
            token_ids = np.concatenate([prompt_ids, rng.integers(0, vocabulary, length)]).astype(np.int32)
            drawn = np.ones(length, dtype=bool)
            if number % 2 == 0 and length >= 6:
                drawn[length // 2 : length // 2 + 2] = False
            samples.append(
                Sample(
                    group=group,
                    sample=number,
                    token_ids=token_ids,
                    trained=np.concatenate([np.zeros(len(prompt_ids), dtype=bool), drawn]),
                    rollout_logprobs=rng.normal(-4.0, 1.0, length).astype(np.float32)[drawn],
                    advantage=float(advantages[number]),
                    token_advantages=rng.normal(advantages[number], 1.0, length)[drawn],
                    reward=float(rewards[number]),
                )
            )
    return tuple(samples)


def straddling_old(case: Case, index: int, new_R: np.ndarray) -> np.ndarray:
    """Old logprobs of a sample that put ratios on both sides of both ends of the clip range, and none near an end.

    A log-ratio is a third of the range or three times it, up or down. Sequence ratios: the samples of a group take the
    four in turn, and tokens vary around them with a mean of zero. Token ratios: tokens take one of the four at random.
    """
    group, number = case.keys[index]
    rng = np.random.default_rng([case.seed, group, number])
    places = case.clip * np.array([1 / 3, 3.0, -1 / 3, -3.0])
    if case.algorithm.clips != "responses":
        return new_R - rng.choice(places, len(new_R))
    noise_R = case.clip * rng.normal(size=len(new_R))
    return new_R - (places[number % 4] + noise_R - noise_R.mean())
