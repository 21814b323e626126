"""From the parts of a layout's ranks to a row of the table: errors by column, and whether the layout holds."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np

from megatron_gspo.parity.case import Case, Key
from megatron_gspo.parity.naive import distance_to_clipping
from megatron_gspo.parity.parts import Choices, Difference, Part, StepPart, TokenValues
from megatron_gspo.parity.reference import Reference, Routing, StepReference

COLUMNS = ("logprobs", "entropy", "ratio", "loss", "metrics", "gradients", "norm", "parameters", "objectives", "critic")
"""What is compared, in the order of the table. ratio is s_i; loss is the total and each response's part; "objectives"
every algorithm's and every correction, over the same passes."""


@dataclass
class Worst:
    """The worst relative error of a column, and where it is."""

    error: float = 0.0
    where: str = ""
    """A response, a metric or a Hugging Face name, with its step and rank."""
    tolerance: float = 0.0

    def take(self, error: float, where: str) -> None:
        """Keeps the larger error."""
        if error > self.error or not self.where:
            self.error, self.where = error, where


@dataclass
class Row:
    """A layout in the table."""

    layout: str
    ranks: int
    verdict: Literal["held", "failed", "refused"] = "held"
    columns: dict[str, Worst] = field(default_factory=dict)
    """Of the first step, and of the second where the first holds: what follows from a fault says nothing of its
    place."""
    clip_flips: list[str] = field(default_factory=list)
    """Responses clipped otherwise than in the reference, without a near-tie: they fail a layout."""
    route_flips: list[str] = field(default_factory=list)
    """Responses routed otherwise, without a near-tie."""
    near_ties: list[str] = field(default_factory=list)
    """Responses that fell to the other side of a near-tie; named, not counted."""
    straddling: int = 0
    """Responses that are not clipped, and whose tokens lie on several ranks: gradients through sharded sums."""
    reason: str = ""
    """Why it failed or was refused."""
    seconds: float = 0.0

    @property
    def fails(self) -> bool:
        """Whether a column is beyond its tolerance, or a decision fell otherwise."""
        too_far = any(not worst.error <= worst.tolerance for worst in self.columns.values())
        return too_far or bool(self.clip_flips or self.route_flips)

    def as_record(self) -> dict[str, Any]:
        """For ``--json``; the keys are the fields', and a column is {error, where, tolerance}."""
        return vars(self) | {"columns": {name: vars(worst) for name, worst in self.columns.items()}}


def fallen(parts: Sequence[Part], reference: Reference) -> tuple[set[int], list[str]]:
    """Samples whose routes fell on the other side of a near-tie, and their names."""
    row = Row("", 0)
    return _routes(row, parts, reference), row.near_ties


def judge(row: Row, parts: Sequence[Part], reference: Reference, tolerance: float, norm_tolerance: float) -> Row:
    """Fills in a row from what its ranks gave."""
    last = [part for part in parts if part.stage == max(part.stage for part in parts)]
    row.columns = {name: Worst(tolerance=tolerance) for name in COLUMNS}
    row.columns["norm"].tolerance = norm_tolerance
    excused = _routes(row, parts, reference)
    case = reference.case
    indices = [index for index in range(len(case.samples)) if index not in excused]
    _tokens(row, "logprobs", [part.old_pass for part in last], reference.logprobs, case, indices)
    if any(part.ref_pass.numbers for part in parts):
        values = [part.ref_pass for part in last]
        _tokens(row, "logprobs", values, reference.ref_logprobs, case, indices, " of the reference policy")
    for number in range(min(len(part.steps) for part in parts)):
        if number == 0 or not row.fails:
            _Step(row, parts, last, reference, number, excused).judge()
    if reference.critic is not None and not row.fails:
        _judge_critic(row, parts, last, reference, indices)
    row.columns = {name: worst for name, worst in row.columns.items() if worst.where}
    row.straddling = _straddling(reference, last)
    sharded = len({part.token_rank for part in last}) > 1
    _conclude(row, nothing_sharded=sharded and row.straddling == 0)
    return row


class _Step:
    """One optimizer step of a layout against the reference's."""

    def __init__(
        self,
        row: Row,
        parts: Sequence[Part],
        last: Sequence[Part],
        reference: Reference,
        number: int,
        excused: set[int],
    ) -> None:
        self.row, self.case, self.parts, self.last = row, reference.case, parts, last
        self.expected: StepReference = reference.steps[number]
        self.mine: list[StepPart] = [part.steps[number] for part in parts]
        self.name = f"step {number + 1}"
        self.number = number
        self.indices = [index for index in self.case.minibatches[number] if index not in excused]

    def judge(self) -> None:
        training = [part.steps[self.number].training for part in self.last]
        _tokens(self.row, "logprobs", training, self.expected.logprobs, self.case, self.indices)
        _tokens(self.row, "entropy", training, self.expected.entropy, self.case, self.indices)
        ties = len(self.row.near_ties)
        self._clips(training)
        self._sequences()
        self._objectives()
        self._tensors("gradients", [step.gradients for step in self.mine], self.expected.names)
        self._metrics(clipping=len(self.row.near_ties) == ties)
        if all(step.parameters is not None for step in self.mine):
            self._tensors("parameters", [step.parameters or {} for step in self.mine], self.expected.trained)
            self._sent()

    def _sequences(self) -> None:
        """s_i and the loss: every rank of the last stage must know those of its own micro-batches, whole."""
        ratio, loss = self.row.columns["ratio"], self.row.columns["loss"]
        scale = max(abs(part_of_loss) for _, part_of_loss in self.expected.sequences.values())
        sum_scale = sum(abs(part_of_loss) for _, part_of_loss in self.expected.sequences.values())
        for token_rank in {part.token_rank for part in self.last}:
            column = [part.steps[self.number] for part in self.last if part.token_rank == token_rank]
            found = {key: value for step in column for key, value in step.sequences.items()}
            for key in (self.case.keys[index] for index in self.indices):
                expected_log, expected_loss = self.expected.sequences[key]
                log_ratio, part_of_loss = found.get(key, (np.inf, np.inf))
                ratio.take(_relative(abs(np.exp(log_ratio) - np.exp(expected_log)), np.exp(expected_log)), _label(key))
                loss.take(_relative(abs(part_of_loss - expected_loss), scale), _label(key))
            total = sum(step.loss for step in column)
            loss.take(_relative(abs(total - self.expected.loss), sum_scale), f"total, {self.name}")

    def _objectives(self) -> None:
        """Of every loss: its gradient in each logprob, and each response's part; of every correction: its weights."""
        column = self.row.columns["objectives"]
        steps = [part.steps[self.number] for part in self.last]
        if not any(step.objectives for step in steps):  # transformers' row
            return
        for name, expected in self.expected.objectives.items():
            parts = [step.objectives[name] for step in steps if name in step.objectives]
            scale = float(np.nanmax(np.abs(expected.of_tokens)))
            for index, error in _token_errors(parts, "of_tokens", expected.of_tokens, self.case, self.indices):
                column.take(_relative(error, scale), f"{name}, {_label(self.case.keys[index])}, {self.name}")
            scale = max(map(abs, expected.of_responses.values()), default=0.0)
            found = {key: value for part in parts for key, value in part.of_responses.items()}
            for key, value in expected.of_responses.items():
                error = abs(found.get(key, np.inf) - value)
                column.take(_relative(error, scale), f"{name}'s loss, {_label(key)}, {self.name}")

    def _metrics(self, *, clipping: bool) -> None:
        """On every rank; those of ``clip/`` are not compared where a decision was a near-tie."""
        column = self.row.columns["metrics"]
        for rank, step in enumerate(self.mine):
            found = step.metrics or {"grad_norm": float("nan")}
            norm = abs(found["grad_norm"] - self.expected.norm)
            self.row.columns["norm"].take(_relative(norm, self.expected.norm), f"gradient norm, {self.name}")
            if len(found) == 1:  # transformers has no others, nor has a step that was not taken
                continue
            for name in sorted((set(found) ^ set(self.expected.metrics)) - {"grad_norm"}):
                column.take(float("inf"), f"{name} (on one side only), {self.name}, rank {rank}")
            for name in sorted(set(found) & set(self.expected.metrics)):
                metric = self.expected.metrics[name]
                if clipping or not name.startswith("clip/"):
                    error = _relative(abs(found[name] - metric.value), metric.scale)
                    column.take(error, f"{name}, {self.name}, rank {rank}")

    def _tensors(self, column: str, parts: Sequence[dict[str, Difference]], names: set[str]) -> None:
        """Every rank's own copy or piece of gradients or parameters; every name must be somewhere."""
        worst, floor = self.row.columns[column], self._floor(column)
        for name in sorted(names ^ {name for part in parts for name in part}):
            worst.take(float("inf"), f"{name} (on one side only), {self.name}")
        for rank, part in enumerate(parts):
            for name, difference in part.items():
                error = _relative(difference.error, max(difference.scale, floor))
                worst.take(error, f"{name}, {self.name}, rank {rank}")

    def _sent(self) -> None:
        """What a weight sync would send: every tensor, whole, from the one rank that owns it."""
        worst, floor = self.row.columns["parameters"], self._floor("parameters")
        names = [name for step in self.mine for name in step.sent]
        for name in sorted(self.expected.weights ^ set(names)):
            worst.take(float("inf"), f"{name} (sent on one side only), {self.name}")
        for name in sorted({name for name in names if names.count(name) > 1}):
            worst.take(float("inf"), f"{name} (sent by two ranks), {self.name}")
        for step in self.mine:
            for name, difference in step.sent.items():
                worst.take(_relative(difference.error, max(difference.scale, floor)), f"{name} as sent, {self.name}")

    def _floor(self, column: str) -> float:
        """What a tensor's largest entry is taken for, where it is smaller."""
        precision = self.case.precision
        if column == "gradients":
            return precision.floor * self.expected.gradient_scale
        rounding = 2 * precision.lr * precision.norm / precision.tolerance  # of the norm, in a step of size lr
        return max(precision.floor * self.expected.parameter_scale, rounding)

    def _clips(self, parts: Sequence[TokenValues]) -> None:
        case = self.case
        clipped = np.zeros(case.tokens, dtype=bool)
        clipped[_together(parts, "numbers", int)] = _together(parts, "clipped", bool)
        for index in self.indices:
            own = case.predicting(index)
            other = np.flatnonzero(clipped[own] != self.expected.clipped[own])
            if not other.size:
                continue
            log_ratios = self.expected.logprobs[own] - case.old[index]
            if case.algorithm.clips == "responses":
                log_ratios = np.full(len(log_ratios), self.expected.sequences[case.keys[index]][0])
            near = all(distance_to_clipping(log_ratios[t], case.clip) < case.precision.near_clip for t in other)
            (self.row.near_ties if near else self.row.clip_flips).append(_label(case.keys[index]))


def _conclude(row: Row, *, nothing_sharded: bool) -> None:
    reasons = [
        f"{name} {worst.error:.1e} at {worst.where} (tolerance {worst.tolerance:g})"
        for name, worst in row.columns.items()
        if not worst.error <= worst.tolerance
    ]
    reasons += [f"clipped otherwise: {', '.join(row.clip_flips)}"] if row.clip_flips else []
    reasons += [f"routed otherwise: {', '.join(row.route_flips)}"] if row.route_flips else []
    if nothing_sharded:
        reasons.append(
            "no unclipped response lies on several ranks, so nothing is shown of sums over them: another --seed"
        )
    row.verdict, row.reason = ("failed", "; ".join(reasons)) if reasons else ("held", "")


def _tokens(
    row: Row,
    name: str,
    parts: Sequence[TokenValues],
    expected: np.ndarray,
    case: Case,
    indices: Sequence[int],
    suffix: str = "",
) -> None:
    """Logprobs or entropies, a response at a time; each token must have come exactly once."""
    floor = case.precision.floor * np.nanmax(np.abs(expected))
    for index, error in _token_errors(parts, name, expected, case, indices):
        scale = max(np.abs(expected[case.predicting(index)]).max(), floor)
        row.columns[name].take(_relative(error, scale), _label(case.keys[index]) + suffix)


def _token_errors(
    parts: Sequence[Any], name: str, expected: np.ndarray, case: Case, indices: Sequence[int]
) -> Iterator[tuple[int, float]]:
    """By sample, how far its tokens' values are off; infinity where a token has not come exactly once."""
    numbers = _together(parts, "numbers", int)
    seen = np.bincount(numbers, minlength=len(expected))
    values = np.full(len(expected), np.nan)
    values[numbers] = _together(parts, name, float)
    for index in indices:
        own = case.predicting(index)
        yield index, float(np.abs(values[own] - expected[own]).max()) if (seen[own] == 1).all() else np.inf


def _judge_critic(
    row: Row, parts: Sequence[Part], last: Sequence[Part], reference: Reference, indices: Sequence[int]
) -> None:
    """Values, advantages and returns of every token; where they hold, gradients and metrics of every rank, which follow
    from them."""
    expected, case, column = reference.critic, reference.case, row.columns["critic"]
    mine = [part.critic for part in parts if part.critic is not None]
    if expected is None or not mine:
        return
    for not_finite in filter(None, (part.not_finite for part in mine)):
        column.take(float("inf"), not_finite)
        return
    own = [part.critic for part in last]
    for name in ("values", "advantages", "returns"):
        array = getattr(expected, name)
        if any(getattr(part, name) for part in mine):  # transformers has values alone
            for index, error in _token_errors(own, name, array, case, indices):
                column.take(_relative(error, float(np.nanmax(np.abs(array)))), f"{name}, {_label(case.keys[index])}")
    if not column.error <= column.tolerance:
        return
    floor = case.precision.floor * expected.gradient_scale
    for name in sorted(expected.names ^ {name for part in mine for name in part.gradients}):
        column.take(float("inf"), f"gradient of {name} (on one side only)")
    for rank, part in enumerate(mine):
        for name, difference in part.gradients.items():
            error = _relative(difference.error, max(difference.scale, floor))
            column.take(error, f"gradient of {name}, rank {rank}")
        for name in part.metrics:
            scale = max(abs(expected.metrics[name]), 1e-3)
            column.take(_relative(abs(part.metrics[name] - expected.metrics[name]), scale), f"{name}, rank {rank}")


def _together(parts: Sequence[Any], name: str, kind: type) -> np.ndarray:
    pieces = [each for part in parts for each in getattr(part, name)]
    return np.concatenate(pieces) if pieces else np.zeros(0, dtype=kind)


def _routes(row: Row, parts: Sequence[Part], reference: Reference) -> set[int]:
    """Responses routed otherwise in the pi_old pass or in training; returns those that are so by a near-tie alone."""
    case = reference.case
    first = _first_flips([part.choices for part in parts], reference.routing, case)
    for number, step in enumerate(reference.steps):
        own = [part.steps[number].choices for part in parts if number < len(part.steps)]
        for index, (layer, near) in _first_flips(own, step.routing, case).items():
            first.setdefault(index, (layer, near))
            if not near and first[index][1]:
                first[index] = (layer, near)
    for index, (layer, near) in sorted(first.items()):
        (row.near_ties if near else row.route_flips).append(f"{_label(case.keys[index])} layer {layer}")
    return {index for index, (_, near) in first.items() if near}


def _first_flips(parts: Sequence[Choices], expected: Routing, case: Case) -> dict[int, tuple[int, bool]]:
    """Sample -> (lowest layer that chose otherwise, whether it was at a near-tie wherever it did).

    What is routed otherwise in one layer reaches every layer above it, so the lowest one decides.
    """
    first: dict[int, tuple[int, bool]] = {}
    owner = np.repeat(np.arange(len(case.samples)), np.diff(case.starts))
    for part in parts:
        for layer, (numbers, experts) in part.experts.items():
            other = (experts != expected.experts[layer][numbers]).any(axis=1)
            for number in numbers[other].tolist():
                near = bool(expected.margins[layer][number] < case.precision.near_tie)
                index = int(owner[number])
                lowest, so_far = first.get(index, (layer, True))
                if layer <= lowest:
                    first[index] = (layer, near and (so_far if layer == lowest else True))
    return first


def _straddling(reference: Reference, parts: Sequence[Part]) -> int:
    case, clipped, ranks_of = reference.case, reference.clipped, dict[int, set[int]]()
    for part in parts:
        for numbers in part.old_pass.numbers:
            for index, own in _responses(case):
                if np.isin(own, numbers).any():
                    ranks_of.setdefault(index, set()).add(part.token_rank)
    return sum(len(ranks_of.get(index, ())) > 1 for index, own in _responses(case) if not clipped[own].all())


def _responses(case: Case) -> Iterator[tuple[int, np.ndarray]]:
    return ((index, case.predicting(index)) for index in range(len(case.samples)))


def _relative(error: float, scale: float) -> float:
    """error / scale; 0 / 0 is 0, and a NaN is infinitely wrong."""
    if error == 0:
        return 0.0
    return float(error / scale) if scale and error == error else float("inf")


def _label(key: Key) -> str:
    return f"response {key[0]}/{key[1]}"
