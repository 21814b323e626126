"""Values per token and per sequence: declared once, and packed, cut, checked and moved by their declaration."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from enum import Enum
from typing import Any, Self, overload

import torch

from megatron_gspo.errors import BatchError


class Axis(Enum):
    """Of what a column has a value, and where in a micro-batch it stands."""

    PREDICTION = "a trained token, at the position that predicts it: one before its own"
    INPUT = "a token of the sequence, at its own position"
    SEQUENCE = "a sequence"

    @property
    def per_token(self) -> bool:
        """Whether there is a value for each token."""
        return self is not Axis.SEQUENCE


@dataclass(frozen=True, eq=False)
class Column:
    """One value per token, or per sequence, of a micro-batch.

    An attribute of ``Columns``, or of any module: ``batch.advantages_T`` and ``batch[MY_COLUMN]`` are tensors, and a
    name that nobody has declared is an AttributeError or an ImportError, and a type error before that.

    >>> AGES = Column("ages_T", Axis.INPUT, torch.int64, says="outer steps since a token was drawn")
    >>> AGES.shape_suffix
    'T'
    """

    name: str
    """Ends with the suffix of its shape: ``_T`` or ``_S``."""
    axis: Axis
    dtype: torch.dtype | None
    """None: the loss dtype of the run (float32; float64 in a float64 run)."""
    says: str
    """What it is, for messages and the documentation."""
    of: Callable[[Any], Any] | None = None
    """Sample -> its values: [R] trained tokens, [L] tokens, or a number, as the axis says. None: a pass makes it."""
    made_by: str = "pack"
    """What has to come first, for whoever asks for it too early."""
    fill: float = 0
    """In padding, in a dummy, and, of a prediction, where nothing is trained."""

    @property
    def shape_suffix(self) -> str:
        """``T`` or ``S``: the end of its name."""
        return self.name.rpartition("_")[2]

    def __post_init__(self) -> None:
        if self.shape_suffix != ("T" if self.axis.per_token else "S"):
            raise BatchError(
                f"column {self.name}: {self.axis.value} has the suffix {'_T' if self.axis.per_token else '_S'}"
            )

    @overload
    def __get__(self, batch: None, owner: type) -> Column: ...
    @overload
    def __get__(self, batch: Columns, owner: type) -> torch.Tensor: ...
    def __get__(self, batch: Columns | None, owner: type) -> Column | torch.Tensor:
        return self if batch is None else batch[self]

    def __set__(self, batch: Columns, value: torch.Tensor) -> None:
        raise AttributeError(
            f"{self.name}: columns do not change; batch.replace({self.name}=...) is a batch with another"
        )

    def __repr__(self) -> str:
        return f"<column {self.name}>"


class Columns:
    """The columns of a micro-batch, or of one rank's part of it; immutable.

    >>> batch = Columns({Columns.weights_S: torch.tensor([0.5, 0.5])}, samples=((0, 0), (0, 1)))
    >>> batch.weights_S.tolist(), batch.num_sequences
    ([0.5, 0.5], 2)
    >>> batch.old_logprobs_T
    Traceback (most recent call last):
    megatron_gspo.errors.BatchError: the batch has no old_logprobs_T (log pi_old): run the pi_old pass first
    """

    tokens_T = Column("tokens_T", Axis.INPUT, torch.int64, "token ids", of=lambda sample: sample.token_ids)
    labels_T = Column("labels_T", Axis.INPUT, torch.int64, "the next token of the sequence; 0 behind its last")
    mask_T = Column("mask_T", Axis.PREDICTION, torch.bool, "whether the label is a trained token")
    sequence_T = Column("sequence_T", Axis.INPUT, torch.int64, "the sequence in [0, S]; S marks padding")
    rollout_logprobs_T = Column(
        "rollout_logprobs_T",
        Axis.PREDICTION,
        torch.float32,
        "log mu, the engine's",
        of=lambda sample: sample.rollout_logprobs,
    )
    advantages_T = Column(
        "advantages_T", Axis.PREDICTION, None, "A_t of a token", of=lambda sample: sample.token_advantages
    )
    advantages_S = Column("advantages_S", Axis.SEQUENCE, None, "A_i of a response", of=lambda sample: sample.advantage)
    places_T = Column(
        "places_T",
        Axis.PREDICTION,
        torch.int64,
        "the token's place in its sequence",
        of=lambda sample: sample.predicting,
    )
    rewards_T = Column(
        "rewards_T", Axis.PREDICTION, torch.float64, "the reward of a token", of=lambda sample: sample.rewards
    )
    rewards_S = Column(
        "rewards_S", Axis.SEQUENCE, torch.float64, "the reward of a response", of=lambda sample: sample.reward
    )
    weights_S = Column(
        "weights_S", Axis.SEQUENCE, None, "a response's share of the mini-batch", of=lambda sample: sample.weight
    )
    lengths_S = Column(
        "lengths_S",
        Axis.SEQUENCE,
        torch.int64,
        "trained tokens |y_i| of the whole sequence, over all ranks",
        of=lambda sample: sample.num_trained,
    )
    old_logprobs_T = Column("old_logprobs_T", Axis.PREDICTION, None, "log pi_old", made_by="the pi_old pass")
    trainer_logprobs_T = Column(
        "trainer_logprobs_T",
        Axis.PREDICTION,
        None,
        "log pi_old of the trainer, where old_logprobs_T is the engine's; log pi_theta where there was no pass of it",
        made_by="the pi_old pass, or training, with correction.bypass",
    )
    ref_logprobs_T = Column(
        "ref_logprobs_T", Axis.PREDICTION, None, "log pi_ref", made_by="the pass of the reference policy"
    )
    values_T = Column("values_T", Axis.PREDICTION, None, "the critic's V before the update", made_by="the value pass")
    returns_T = Column(
        "returns_T", Axis.PREDICTION, None, "what the critic is trained towards", made_by="credit, after the value pass"
    )

    chosen_T = Column(
        "chosen_T", Axis.PREDICTION, torch.bool, "tokens that the algorithm treats apart", made_by="its prepare"
    )
    corrections_T = Column(
        "corrections_T", Axis.PREDICTION, None, "the weight of a token for the engine gap", made_by="the corrections"
    )
    corrections_S = Column(
        "corrections_S", Axis.SEQUENCE, None, "the mean of a response's corrections_T", made_by="the corrections"
    )

    def __init__(self, columns: Mapping[Column, torch.Tensor], *, samples: tuple[tuple[int, int], ...]) -> None:
        self._columns = dict(columns)
        self.samples = samples
        """[S] which response each sequence is, as (group, sample); (-1, -1) in a dummy micro-batch."""

    def __getitem__(self, column: Column) -> torch.Tensor:
        if column not in self._columns:
            raise BatchError(f"the batch has no {column.name} ({column.says}): run {column.made_by} first")
        return self._columns[column]

    def __contains__(self, column: Column) -> bool:
        return column in self._columns

    def __iter__(self) -> Iterator[tuple[Column, torch.Tensor]]:
        return iter(self._columns.items())

    def __or__(self, made: Mapping[Column, torch.Tensor]) -> Self:
        """With more columns, or others in their place."""
        return self._with({**self._columns, **made})

    def replace(self, **columns: torch.Tensor | None) -> Self:
        """With other values of some columns of ``Columns``, by attribute; None takes one away."""
        named = {getattr(type(self), name): values for name, values in columns.items()}
        kept = {**self._columns, **named}
        return self._with({column: values for column, values in kept.items() if values is not None})

    def map(self, change: Callable[[torch.Tensor], torch.Tensor]) -> Self:
        """Every column changed: ``batch.map(lambda values: values.to("cuda"))``."""
        return self._with({column: change(values) for column, values in self})

    @property
    def num_sequences(self) -> int:
        """S."""
        return len(self.samples)

    @property
    def num_tokens(self) -> int:
        """Of this batch, or of this rank's part."""
        return self.sequence_T.numel()

    def _with(self, columns: Mapping[Column, torch.Tensor]) -> Self:
        return type(self)(columns, samples=self.samples)


def packed_columns() -> tuple[Column, ...]:
    """The declared columns that samples themselves hold, but for the tokens, which ``pack`` lays out first."""
    declared = (value for value in vars(Columns).values() if isinstance(value, Column))
    return tuple(column for column in declared if column.of is not None and column is not Columns.tokens_T)
