"""What an algorithm is: its settings, the columns that it needs, how it gives credit, and its loss.

Each algorithm is a class in a file of its own, with an entry in ``algorithm.catalog``. Reading its settings imports no
torch: a loss imports what it computes with when it is called.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, ClassVar, Literal, Protocol

from pydantic import ConfigDict, model_validator
from pydantic.functional_validators import ModelWrapValidatorHandler

from megatron_gspo.algorithm.catalog import find
from megatron_gspo.errors import ConfigError
from megatron_gspo.section import NonNegativeFloat, Section

if TYPE_CHECKING:
    import torch

    from megatron_gspo.types import LossOutput, SequenceSum, TokenShard

Aggregation = Literal["paper", "token-mean", "group-token-mean", "token-sum"]
Credit = Literal["group", "centred", "leave-one-out", "batch", "group-then-batch", "gae"]
ALONE = ("batch", "gae")
"""Ways to give credit that need no other response to the same prompt."""
FORMER = {"allow_wide_clip": False}
"""Settings that every algorithm had once, with their defaults, which ``config.toml`` of earlier runs still has."""
RANGE = frozenset({"clip_low", "clip_high", "allow_wide_clip"})
"""Settings of a ratio, which configurations of fine-tuning may still have: without effect, since there is none."""


class Totals(Protocol):
    """Numbers of a whole mini-batch, the same on every rank. Collective over the ranks that hold its tokens."""

    def sum(self, values: torch.Tensor) -> torch.Tensor:
        """[n] float64 sums over all ranks."""
        ...

    def nth_largest(self, values: torch.Tensor, n: int) -> float:
        """The n-th largest of all ranks' values, [any] float64; minus infinity where there are fewer."""
        ...


class Algorithm(Section):
    """The objective."""

    source: ClassVar[str]
    """Where the formula and the defaults come from."""
    clips: ClassVar[Literal["responses", "tokens", "nothing"]] = "nothing"
    """What the clip range applies to: s_i of a response, whose natural spread is far narrower, or w_t of a token."""
    draws_responses: ClassVar[bool] = True
    """Whether it learns from responses that an engine draws; otherwise from the completions of its data."""
    clip_settings: ClassVar[tuple[str, str]] = ("clip_low", "clip_high")
    """Names of the settings of its range, where it clips."""
    needs_reference: ClassVar[bool] = False
    """Whether ``reference`` must be named: the policy itself would be none."""
    per_token: ClassVar[bool] = True
    """Whether its loss has a term for each token, with an advantage of its own."""

    name: str = "gspo"
    """One of ``algorithm/catalog.py``, or a class of your own: ``package.module:Class``, ``path/to/file.py:Class``."""
    aggregation: Aggregation = "paper"
    """How a mini-batch's tokens are weighted. "paper": prompt 1/P, response 1/G, token 1/|y|. "token-mean": every
    response token has the same weight. "group-token-mean": prompt 1/P, and every token of its responses the same
    weight (DAPO, CISPO). "token-sum": 1/P, 1/G, token 1/max_response_tokens (Dr.GRPO). A loss
    with one term for a response (gspo) takes only "paper"."""
    credit: Credit = "group"
    """How rewards become advantages. "group": (R - mean) / std of its group; "centred": R - mean; "leave-one-out": R
    minus the mean of the others; "batch": (R - mean) / std over the tokens of the outer step; "group-then-batch": R
    minus its group's mean, and then so. "gae": by the values of a critic (``[critic]``), token by token."""
    kl_loss_coef: NonNegativeFloat = 0.0
    """Weight of the k3 estimate of KL(new || reference) in the loss."""
    kl_reward_coef: NonNegativeFloat = 0.0
    """Weight of log(old / reference) of a token, taken off its reward before credit is given (the k1 estimate); of a
    response's tokens together, where credit is by response."""
    reference: str = ""
    """Hugging Face directory of the reference policy; ``model.path`` when empty."""

    @property
    def uses_reference(self) -> bool:
        """Whether the reference policy's logprobs are needed."""
        return self.kl_loss_coef > 0 or self.kl_reward_coef > 0

    @property
    def uses_critic(self) -> bool:
        """Whether advantages are made of a critic's values."""
        return self.credit == "gae"

    @property
    def credit_waits(self) -> bool:
        """Whether advantages need what the passes make."""
        return self.uses_critic or self.kl_reward_coef > 0

    @property
    def passes(self) -> tuple[str, ...]:
        """The forward passes that it needs beside pi_old's: names of ``train/passes.py``, or ``module:function``."""
        needed = {"reference": self.uses_reference, "values": self.uses_critic}
        return tuple(name for name, needs in needed.items() if needs)

    @property
    def weighting(self) -> str:
        """How ``algorithm.weights`` weighs responses."""
        return self.aggregation

    def clip_range(self) -> tuple[float, float] | None:
        """(clip_low, clip_high): the ratio is kept in [1 - clip_low, 1 + clip_high]; None without one."""
        return None

    def prepare(self, shards: Sequence[TokenShard], totals: Totals) -> list[TokenShard]:
        """Columns that only a whole mini-batch can give, of its micro-batches on this rank; after credit and
        corrections, before training. Collective over the last stage."""
        return list(shards)

    def loss(self, shard: TokenShard, new_logprobs_T: torch.Tensor, sequence_sum: SequenceSum) -> LossOutput:
        """The loss of one micro-batch: a sum over its responses, complete on every rank (see ``LossOutput``).

        Args:
            shard: this rank's part of the micro-batch, with the columns that the passes have made.
            new_logprobs_T: [T_local] float32 or float64, log pi_theta, differentiable.
            sequence_sum: sums over each sequence's tokens on all ranks; its backward is the identity on [S].
        """
        raise NotImplementedError(f"{type(self).__name__} has no loss")

    @model_validator(mode="wrap")
    @classmethod
    def _of_its_class(cls, value: Any, handler: ModelWrapValidatorHandler[Algorithm]) -> Algorithm:
        """A tree of settings becomes an algorithm of the class that its name stands for."""
        if not isinstance(value, dict):
            return handler(value)
        if cls is Algorithm:
            return algorithm_class(value.get("name", "gspo")).model_validate(value)
        if not cls.draws_responses:
            value = {name: setting for name, setting in value.items() if name not in RANGE}
        former = {name for name, default in FORMER.items() if value.get(name) == default} - cls.model_fields.keys()
        return handler({name: setting for name, setting in value.items() if name not in former})

    @model_validator(mode="after")
    def _takes_its_credit(self) -> Algorithm:
        if self.uses_critic and not self.per_token:
            raise ValueError(
                f'credit = "gae" gives each token an advantage, and {self.name} has one term per sequence: use a loss '
                f'with a term for each token (name = "ppo", name = "gspo-token")'
            )
        return self

    @model_validator(mode="after")
    def _takes_its_aggregation(self) -> Algorithm:
        if not self.per_token and self.aggregation != "paper":
            raise ValueError(
                f'aggregation = "{self.aggregation}" weights tokens, and {self.name} has one term per sequence: use '
                f'"paper", or a loss with a term for each token (name = "gspo-token")'
            )
        return self


class Unread(Algorithm):
    """An algorithm of somebody's own in a run that is only read about: its code is not imported, nor its settings."""

    model_config = ConfigDict(extra="ignore")

    source: ClassVar = "a class outside of this package"

    @classmethod
    def in_place_of_own(cls, settings: Any) -> Any:
        """A tree of settings as it is, or an ``Unread`` where it names a class outside of the catalog."""
        name = settings.get("name") if isinstance(settings, dict) else None
        own = isinstance(name, str) and ":" in name
        return cls.model_validate(settings) if own else settings


def algorithm_class(name: object) -> type[Algorithm]:
    """The class that ``algorithm.name`` stands for. Raises ConfigError for what is no algorithm."""
    found = find(name)
    if not (isinstance(found, type) and issubclass(found, Algorithm)):
        raise ConfigError(f'name = "{name}" is no subclass of megatron_gspo.algorithm.base.Algorithm')
    return found


def make_algorithm(name: str = "gspo", **settings: Any) -> Algorithm:
    """An algorithm by name, with settings of its own; the others at their defaults."""
    return algorithm_class(name).model_validate({"name": name, **settings})
