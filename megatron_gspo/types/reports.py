"""What a step says of itself: a line of numbers, and responses to read."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any, ClassVar

from megatron_gspo.errors import BatchError


@dataclass
class StepReport:
    """One optimizer step, as a line of ``metrics.jsonl``.

    >>> StepReport(step=5, outer_step=1, minibatch=1, metrics={"loss": -0.25}).as_record()
    {'step': 5, 'outer_step': 1, 'minibatch': 1, 'loss': -0.25}
    """

    step: int
    """Optimizer steps taken before this one, from 0."""
    outer_step: int
    minibatch: int
    """Position in the outer step, from 0; the first one's ratios are exactly 1."""
    metrics: dict[str, float]
    """Metric name (docs/metrics.md) -> value."""

    def as_record(self) -> dict[str, float]:
        """A line of ``metrics.jsonl``."""
        return {"step": self.step, "outer_step": self.outer_step, "minibatch": self.minibatch, **self.metrics}


@dataclass(frozen=True)
class RolloutRecord:
    """One response to read, as the trainer saw it; a line of ``rollouts/outer_*.jsonl``.

    >>> record = RolloutRecord("line-1", 0, "7+5=", "12", ("1", "2"), 1.0, 0.5, "stop", old_logprobs=(-0.25, -0.5))
    >>> record.as_record()["old_logprobs"]
    [-0.25, -0.5]
    """

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
    components: dict[str, float] | None = None
    """What the reward is made of, by name."""

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
