"""The nouns of the pipeline, in the order in which data flows through them.

    Prompt -> Rollout -> RolloutGroup -> Sample -> PackedBatch -> TokenShard -> LossOutput -> StepReport, RolloutRecord

Shape suffixes, used everywhere in this package:

    _T  tokens of a packed micro-batch that this rank holds        _S  sequences of a micro-batch
    _R  tokens of one response                                     _N  tokens of one prompt
    _G  responses of one prompt (the group)                        _P  prompts
    _V  vocabulary      _H  hidden      _L  layers      _K  experts chosen a token

Names say who computed a thing: ``rollout_`` the inference engine, ``old_`` the trainer before the outer step's first
update (pi_old), ``new_`` the trainer now (pi_theta), ``ref_`` the reference policy.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, ClassVar, Literal, NamedTuple, Protocol

import numpy as np
import torch

from megatron_gspo.errors import BatchError

FinishReason = Literal["stop", "length", "abort"]
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float64": torch.float64}
"""By ``model.dtype``."""


@dataclass(frozen=True)
class Prompt:
    """One prompt, rendered and tokenized."""

    id: str
    """Unique within its file; the seed of a rollout is derived from it."""
    text: str
    """After the chat template, exactly what ``token_ids`` encodes."""
    token_ids: tuple[int, ...]
    """[N], never empty."""
    answer: str
    """Reference answer, handed to the reward; empty when there is none."""
    metadata: dict[str, Any] = field(default_factory=dict)
    """Whatever else the prompt's line held."""
    visit: int = 0
    """How often this outer step has drawn the prompt before: an epoch's end may lie in it. Enters the seed."""


@dataclass(frozen=True)
class ServerAccess:
    """What a run and its rollout servers share, and no bystander has."""

    key: str = field(default="", repr=False)
    """Sent with every request as ``Authorization: Bearer KEY``; none when empty."""
    run: str = ""
    """Ends the names of this run's weight versions (``version_name``): a server that somebody else has given weights,
    or has started again, does not hold what this run has sent, whatever number it says."""

    def version_name(self, version: int) -> str:
        """A weight version as a server names it: "7-4f1c09ab", or "7" without ``run``."""
        return f"{version}-{self.run}" if self.run else str(version)

    def version_of(self, name: Any) -> int | None:
        """The version that ``version_name`` has named so; None for any other value."""
        number = name.removesuffix(f"-{self.run}") if isinstance(name, str) else ""
        known = number.isdecimal() and number.isascii() and len(number) < 20
        return int(number) if known and name == self.version_name(int(number)) else None


def is_of_another_run(name: Any, own: str) -> bool:
    """Whether a weight version names a run, by ``ServerAccess.version_name``, and another one than ``own`` does."""
    shape = re.compile(r"[0-9]+-([0-9a-f]+)(-incomplete)?")
    found, ours = (shape.fullmatch(each) if isinstance(each, str) else None for each in (name, own))
    return found is not None and (ours is None or found[1] != ours[1])


OPEN = ServerAccess()
"""Servers that ask for no key, with plain versions."""


@dataclass(frozen=True)
class RouteShape:
    """What the routes of a mixture-of-experts model look like."""

    moe_layers: tuple[bool, ...]
    """[L]: which of the hidden layers are mixtures of experts."""
    top_k: int
    num_experts: int

    @property
    def dtype(self) -> np.dtype[Any]:
        """uint8 holds 256 experts; what it does not hold is kept as uint16."""
        return np.dtype(np.uint8 if self.num_experts <= 256 else np.uint16)


@dataclass(frozen=True)
class Rollout:
    """One response of the inference engine, validated on arrival."""

    prompt: Prompt
    sample: int
    """Position in its group, 0 <= sample < G."""
    response_ids: np.ndarray
    """[R] int32; ends with the stop token when ``finish_reason`` is "stop"."""
    rollout_logprobs: np.ndarray
    """[R] float32; the engine's log mu(token | prefix) after temperature, aligned with ``response_ids``."""
    finish_reason: FinishReason
    """"stop": a stop token was drawn; "length": the limit cut it (truncated); "abort": the server gave up."""
    weight_versions: tuple[int, ...]
    """Distinct weight versions that produced the tokens, in order; more than one means a mixed-version response."""
    text: str = ""
    """``response_ids`` decoded without the stop token at their end, and without special tokens unless
    ``reward.special_tokens``; what rewards read."""
    routes: np.ndarray | None = None
    """[at most N + R - 1, L, K] uint8 (up to 256 experts) or uint16: row i holds the experts that token i, as input,
    was sent to. L counts dense layers too, whose rows mean nothing. None when routes were not asked for, or when they
    are not those of one set of weights (a mixed-version response)."""

    @property
    def truncated(self) -> bool:
        return self.finish_reason == "length"


@dataclass(frozen=True)
class RolloutGroup:
    """The surviving responses of one prompt, with their rewards."""

    prompt: Prompt
    rollouts: tuple[Rollout, ...]
    """G_p survivors, at least two."""
    rewards_G: np.ndarray
    """[G_p] float64 in [0, 1]."""
    token_rewards_G: tuple[np.ndarray, ...] | None = None
    """Per-token rewards, each [R] float64 in [0, 1]; None when the reward gave one number per response."""


@dataclass(frozen=True)
class Sample:
    """One response as training sees it: the unit that packing places and data-parallel ranks exchange."""

    group: int
    """Index of its prompt in the outer step's batch; orders samples the same way on every rank."""
    sample: int
    """Position in its group."""
    prompt_ids: np.ndarray
    """[N] int32."""
    response_ids: np.ndarray
    """[R] int32, R >= 1."""
    rollout_logprobs: np.ndarray
    """[R] float32."""
    advantage: float
    """A_i, the group-relative advantage of the response."""
    token_advantages: np.ndarray
    """[R] float64; A_i repeated unless the reward was per token."""
    weight: float
    """1 / (P * G_p): the response's share of the mini-batch (design: each prompt 1/P, each survivor 1/G_p)."""
    reward: float = 0.0
    routes: np.ndarray | None = None
    """``Rollout.routes``; on the data-parallel leader alone, which deals them out (``train.routes``)."""

    @property
    def length(self) -> int:
        """Tokens that the model sees: prompt and response."""
        return len(self.prompt_ids) + len(self.response_ids)


@dataclass(frozen=True)
class PackedBatch:
    """One micro-batch: sequences laid end to end (Megatron's THD format), the same on every rank that works on it.

    Alignment: position t predicts token t + 1. ``labels_T[t]`` is ``tokens_T[t + 1]`` inside a sequence, and
    ``mask_T[t]`` is True where that label is a response token (the stop token included). So a response of R tokens
    after a prompt of N owns positions N - 1 ... N + R - 2 of its sequence, and the last position owns nothing.

    Padding is what sharding needs and no more; its tokens and labels are 0 and its mask is False. T is a multiple of
    context x tensor ranks: the tail that makes it so is a sequence of its own, not counted in S, with an entry in
    ``cu_seqlens``. Under context parallelism each sequence, the tail too, is filled up behind its last token to a
    multiple of 2 x context, which its zigzag shards need; causal attention never looks back from a token to it.
    """

    tokens_T: torch.Tensor
    """[T] int64."""
    labels_T: torch.Tensor
    """[T] int64; 0 where there is nothing to predict."""
    mask_T: torch.Tensor
    """[T] bool."""
    sequence_T: torch.Tensor
    """[T] int64 in [0, S]; S marks padding, behind a sequence's last token or in the tail."""
    cu_seqlens: torch.Tensor
    """[S + 1] int32, or [S + 2] when there is a padding tail; starts at 0, ends at T. Boundaries with padding."""
    rollout_logprobs_T: torch.Tensor
    """[T] float32; 0 where the mask is False."""
    advantages_T: torch.Tensor
    """[T] in the run's loss dtype; 0 where the mask is False."""
    advantages_S: torch.Tensor
    """[S] in the run's loss dtype (float32; float64 in a float64 run)."""
    weights_S: torch.Tensor
    """[S] in the run's loss dtype; all 0 in a dummy micro-batch."""
    lengths_S: torch.Tensor
    """[S] int64: response tokens |y_i| of the whole sequence, over all ranks."""
    samples: tuple[tuple[int, int], ...]
    """[S] which response each sequence is, as (group, sample); (-1, -1) in a dummy micro-batch."""

    @property
    def num_sequences(self) -> int:
        return len(self.samples)

    @property
    def num_tokens(self) -> int:
        return self.tokens_T.numel()


@dataclass(frozen=True)
class Shard:
    """Which of a micro-batch's tokens a rank stores; by default all of them.

    The T positions are dealt to the context ranks in zigzag order (``algorithm.packing.zigzag_positions``), and a
    context rank's share is cut into one contiguous slice a tensor rank.
    """

    tensor_rank: int = 0
    tensor_size: int = 1
    context_rank: int = 0
    context_size: int = 1

    @property
    def size(self) -> int:
        """Ranks among which the tokens are spread."""
        return self.tensor_size * self.context_size


@dataclass(frozen=True)
class TokenShard:
    """The part of a PackedBatch whose per-token tensors one rank stores, as a ``Shard`` says.

    Per-token fields hold the rank's own T_local = T / (context x tensor) positions, in the order in which the model's
    outputs come; per-sequence fields are whole on every rank. On one rank a shard is the batch.
    """

    labels_T: torch.Tensor
    mask_T: torch.Tensor
    sequence_T: torch.Tensor
    rollout_logprobs_T: torch.Tensor
    advantages_T: torch.Tensor
    advantages_S: torch.Tensor
    weights_S: torch.Tensor
    lengths_S: torch.Tensor
    samples: tuple[tuple[int, int], ...]
    old_logprobs_T: torch.Tensor | None = None
    """[T_local]; set by the pi_old pass."""
    ref_logprobs_T: torch.Tensor | None = None
    """[T_local]; set when a KL to the reference is in use."""

    @property
    def num_sequences(self) -> int:
        return len(self.samples)


@dataclass(frozen=True)
class RouteShard:
    """The experts of one micro-batch's tokens, as far as one rank's routers choose them: its own layers and tokens."""

    layers: tuple[int, ...]
    """Of this rank's MoE layers, their numbers over all stages and dense layers, from 0; ascending."""
    experts_LTK: torch.Tensor
    """[len(layers), T_local, K] uint8, above 256 experts int16 or uint16: each token's experts, all different. Their
    order within a row is that of the router's softmax, whose last bits depend on it."""
    present_T: torch.Tensor
    """[T_local] bool; where it is False there is no route: the token routes live, and its row may hold anything."""


class SequenceSum(Protocol):
    """Sums per-token tensors over each sequence: [..., T_local] -> [..., S], complete on every rank.

    Leading dimensions are summed independently, so that several sums share one call (and one collective).

    The single-process form is ``algorithm.ratios.segment_sum``; the sharded one, with the mathematics of its
    backward, is ``parallel.sequence.ShardedSequenceSum``.
    """

    def __call__(self, values_T: torch.Tensor, sequence_T: torch.Tensor, num_sequences: int) -> torch.Tensor: ...


@dataclass(frozen=True)
class LossOutput:
    """What a policy loss returns for one micro-batch."""

    loss: torch.Tensor
    """Scalar to differentiate: this micro-batch's part of the globally normalised sum."""
    loss_S: torch.Tensor
    """[S] detached: each sequence's part of ``loss``, complete on every rank."""
    log_ratio_S: torch.Tensor
    """[S] detached: log s_i, the length-normalised sequence log-ratio (for every loss, whether it uses it or not)."""
    log_ratio_T: torch.Tensor
    """[T_local] detached: log w_t = new - old; 0 where the mask is False."""
    clipped_low_T: torch.Tensor
    """[T_local] bool: response tokens on the clipped branch with the ratio below 1 - clip_low."""
    clipped_high_T: torch.Tensor
    """[T_local] bool: response tokens on the clipped branch with the ratio above 1 + clip_high."""
    clipped_S: torch.Tensor
    """[S] bool: the sequence has a token on the clipped branch, on whichever rank."""


class Trained(NamedTuple):
    """What a micro-batch gave in training."""

    new_logprobs_T: torch.Tensor
    """[T_local] detached."""
    entropy_T: torch.Tensor
    """[T_local] detached, nats."""
    output: LossOutput


@dataclass
class StepReport:
    """One optimizer step, as a line of ``metrics.jsonl``."""

    step: int
    """Optimizer steps taken before this one, from 0."""
    outer_step: int
    minibatch: int
    """Position in the outer step, from 0; the first one's ratios are exactly 1."""
    metrics: dict[str, float]
    """Metric name (docs/metrics.md) -> value."""

    def as_record(self) -> dict[str, float]:
        return {"step": self.step, "outer_step": self.outer_step, "minibatch": self.minibatch, **self.metrics}


@dataclass(frozen=True)
class RolloutRecord:
    """One response to read, as the trainer saw it; a line of ``rollouts/outer_*.jsonl``."""

    prompt_id: str
    sample: int
    """Position in its group."""
    prompt: str
    response: str
    tokens: Sequence[str]
    """[R] the response's tokens, each decoded by itself."""
    reward: float
    advantage: float
    finish_reason: str
    ratio: float | None = None
    """s_i when its mini-batch was trained on."""
    clipped: bool | None = None
    """Whether its sequence ratio (any token's, for a token-ratio loss) was clipped."""
    rollout_logprobs: Sequence[float] | None = None
    """[R] log mu, the engine's."""
    old_logprobs: Sequence[float] | None = None
    """[R] log pi_old."""
    new_logprobs: Sequence[float] | None = None
    """[R] log pi_theta when its mini-batch was trained on."""
    group: int | None = None
    """Its prompt's position among those of the outer step, which may have drawn one prompt twice."""
    answer: str | None = None
    """The reference answer."""

    PER_TOKEN: ClassVar = ("rollout_logprobs", "old_logprobs", "new_logprobs")

    def __post_init__(self) -> None:
        for name in self.PER_TOKEN:
            values = getattr(self, name)
            if values is not None and len(values) != len(self.tokens):
                raise BatchError(
                    f"response {self.prompt_id}/{self.sample}: {len(self.tokens)} tokens but {len(values)} {name}"
                )

    def as_record(self) -> dict[str, Any]:
        """JSON values only; what was not recorded is left out."""
        record = {name: value for name, value in asdict(self).items() if value is not None}
        for name in record.keys() & set(self.PER_TOKEN):
            record[name] = [round(float(value), 7) for value in record[name]]
        for name in record.keys() & {"reward", "advantage", "ratio"}:
            record[name] = float(record[name])  # rewards arrive as numpy scalars
        return record | {"tokens": list(self.tokens)}
