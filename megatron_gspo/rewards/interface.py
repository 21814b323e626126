"""What a reward is given, and what it may return."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Protocol

import numpy as np

from megatron_gspo.types import Prompt, Rollout

if TYPE_CHECKING:
    from megatron_gspo.config import RewardConfig, RewardServerConfig, RunConfig
    from megatron_gspo.config.sandbox import SandboxConfig


@dataclass(frozen=True)
class TokenRewards:
    """A reward for each token of a response; gspo-token trains on them, other losses on their mean."""

    values: np.ndarray
    """[R] in the reward's range, aligned with ``Rollout.response_ids``."""

    @classmethod
    def from_turns(cls, rewards: Sequence[float], lengths: Sequence[int]) -> TokenRewards:
        """Each turn's reward for each of its tokens; ``lengths`` are the turns' token counts and sum to R."""
        return cls(np.repeat(np.asarray(rewards, dtype=np.float64), lengths))


class Stopped(float):
    """``Stopped()`` is a reward of 0 for a response whose grading took too long and was stopped; it is counted."""


@dataclass(frozen=True)
class Score:
    """A reward, and what it is made of.

    >>> Score(0.75, {"correct": 1.0, "length": 0.5}).components["length"]
    0.5
    """

    reward: float | TokenRewards
    components: Mapping[str, float] = field(default_factory=dict)
    """Name (``[a-z0-9_]+``) -> a finite number: logged as ``reward/component/NAME``, stored with the response."""


@dataclass(frozen=True)
class Ungraded:
    """The grader failed, not the response: it leaves the batch and is counted, and is never a 0.

    >>> Ungraded("the judge answered HTTP 503 four times").reason
    'the judge answered HTTP 503 four times'
    """

    reason: str


RewardResult = float | TokenRewards | Score | Ungraded
"""``Stopped`` is a float."""


@dataclass(frozen=True)
class RewardServers:
    """Servers of a reward model or a judge that the run has started (``[reward_server]``)."""

    urls: tuple[str, ...]
    """``http://HOST:PORT`` of each."""
    key: str = field(repr=False)
    """They answer requests with ``Authorization: Bearer KEY`` alone."""


@dataclass(frozen=True)
class RewardContext:
    """What a reward class may know of the run, when its constructor has a parameter ``context``.

    Every field has a default, so that a class can be made, and its options checked, without a run.
    """

    config: RewardConfig | None = None
    """The ``[reward]`` section that the reward is made from."""
    sandbox: SandboxConfig | None = None
    """The ``[sandbox]`` section, for rewards that run programs."""
    decode: Callable[[Sequence[int]], str] | None = None
    """The policy's tokenizer: ids -> text, special tokens included."""
    model_path: str = ""
    """``model.path``: the Hugging Face directory that the policy starts from."""
    run_dir: str = ""
    """``train.run_dir``; it need not exist yet."""
    server: RewardServerConfig | None = None
    """The ``[reward_server]`` section."""
    servers: RewardServers | None = None
    """What was started for it; None before that, when options are checked, and where it names no model."""

    @classmethod
    def of(
        cls,
        config: RunConfig,
        decode: Callable[[Sequence[int]], str] | None = None,
        servers: RewardServers | None = None,
    ) -> RewardContext:
        """That of a run's configuration."""
        model, run_dir = config.model.path, config.train.run_dir
        return cls(config.reward, config.sandbox, decode, model, run_dir, config.reward_server, servers)


class RewardFunction(Protocol):
    """``reward(prompt, response)``: a number in [0, 1], or one a token; ``async def`` functions are awaited.

    It reads ``prompt.answer`` and ``prompt.metadata``, and of the response ``text``, ``response_ids`` and
    ``finish_reason``. It must not change them, and it may be called from several threads at a time.

    A class is made once, with the options, and is then called in the same way, or, where it has
    ``score_group(prompt, responses)``, with all responses to a prompt at a time (in an evaluation, or when references
    are looked at, that may be one). ``Reward`` says what else it may have.
    """

    def __call__(self, prompt: Prompt, response: Rollout) -> RewardResult | Awaitable[RewardResult]: ...


class GroupReward(Protocol):
    """A reward that sees the responses to one prompt together."""

    def score_group(
        self, prompt: Prompt, responses: Sequence[Rollout]
    ) -> Sequence[RewardResult] | Awaitable[Sequence[RewardResult]]:
        """One result a response, in their order."""
