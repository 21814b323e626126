"""From the parts of a layout's ranks to a row of the table: errors by column, and whether the layout holds."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np

from megatron_gspo.parity.case import Case, Key
from megatron_gspo.parity.naive import distance_to_clipping
from megatron_gspo.parity.reference import Reference
from megatron_gspo.parity.step import Difference, Part, TokenValues

COLUMNS = ("logprobs", "entropy", "ratio", "loss", "gradients", "norm", "parameters")
"""What is compared, in the order of the table. ratio is s_i; loss is the total and each response's part."""


@dataclass
class Worst:
    """The worst relative error of a column, and where it is."""

    error: float = 0.0
    where: str = ""
    """A response or a Hugging Face name."""
    tolerance: float = 0.0

    def take(self, error: float, where: str) -> None:
        if error > self.error or not self.where:
            self.error, self.where = error, where


@dataclass
class Row:
    """A layout in the table."""

    layout: str
    ranks: int
    verdict: Literal["held", "failed", "refused"] = "held"
    columns: dict[str, Worst] = field(default_factory=dict)
    clip_flips: list[str] = field(default_factory=list)
    """Responses clipped otherwise than in the reference, without a near-tie: they fail a layout."""
    route_flips: list[str] = field(default_factory=list)
    """Responses routed otherwise, without a near-tie."""
    near_ties: list[str] = field(default_factory=list)
    """Responses that fell to the other side of a near-tie; named, not counted."""
    straddling: int = 0
    """Responses that count, are not clipped, and whose tokens lie on several ranks: gradients through sharded sums."""
    reason: str = ""
    """Why it failed or was refused."""
    seconds: float = 0.0

    def as_record(self) -> dict[str, Any]:
        """For ``--json``; the keys are the fields', and a column is {error, where, tolerance}."""
        return vars(self) | {"columns": {name: vars(worst) for name, worst in self.columns.items()}}


def fallen(parts: Sequence[Part], reference: Reference) -> list[int]:
    """Samples that count in the loss, and whose routes fell on the other side of a near-tie."""
    excused = _routes(Row("", 0), parts, reference)
    return sorted(index for index in excused if reference.case.samples[index].weight)


def judge(row: Row, parts: Sequence[Part], reference: Reference, tolerance: float, norm_tolerance: float) -> Row:
    """Fills in a row from what its ranks gave."""
    last_stage = max(part.stage for part in parts)
    last = [part for part in parts if part.stage == last_stage]
    row.columns = {name: Worst(tolerance=tolerance) for name in COLUMNS}
    row.columns["norm"].tolerance = norm_tolerance
    excused = _routes(row, parts, reference)
    for values in ([part.old_pass for part in last], [part.training for part in last]):
        _tokens(row, values, reference, excused)
    _clips(row, [part.training for part in last], reference, excused)
    _sequences(row, last, reference, excused)
    floor = reference.case.precision.floor
    gradients = [part.gradients for part in parts]
    _tensors(row.columns["gradients"], gradients, reference.names, floor * reference.gradient_scale)
    stepped = [part.parameters for part in parts if part.parameters is not None]
    if stepped:
        _tensors(row.columns["parameters"], stepped, reference.weights, floor * reference.parameter_scale)
    else:
        del row.columns["parameters"]
    for part in parts:
        row.columns["norm"].take(_relative(abs(part.norm - reference.norm), reference.norm), "gradient norm")
    row.straddling = _straddling(reference, last)
    sharded = len({part.token_rank for part in last}) > 1
    _conclude(row, nothing_sharded=sharded and row.straddling == 0)
    return row


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


def _tokens(row: Row, parts: Sequence[TokenValues], reference: Reference, excused: set[int]) -> None:
    """Logprobs and entropies, a response at a time; each token must have come exactly once."""
    numbers = np.concatenate([each for part in parts for each in part.numbers])
    seen = np.bincount(numbers, minlength=len(reference.logprobs))
    for name in ("logprobs", "entropy"):
        expected = getattr(reference, name)
        values = np.full(len(expected), np.nan)
        values[numbers] = np.concatenate([each for part in parts for each in getattr(part, name)])
        floor = reference.case.precision.floor * np.nanmax(np.abs(expected))
        for index, own in _responses(reference.case):
            if index in excused:
                continue
            complete = (seen[own] == 1).all()
            error = np.abs(values[own] - expected[own]).max() if complete else np.inf
            scale = max(np.abs(expected[own]).max(), floor)
            row.columns[name].take(_relative(error, scale), _label(reference.case.keys[index]))


def _sequences(row: Row, parts: Sequence[Part], reference: Reference, excused: set[int]) -> None:
    """s_i and the loss: every rank of the last stage must know those of its own micro-batches, whole."""
    ratio, loss = row.columns["ratio"], row.columns["loss"]
    scale = max(abs(part_of_loss) for _, part_of_loss in reference.sequences.values())
    sum_scale = sum(abs(part_of_loss) for _, part_of_loss in reference.sequences.values())
    for token_rank in {part.token_rank for part in parts}:
        column = [part for part in parts if part.token_rank == token_rank]
        found = {key: value for part in column for key, value in part.sequences.items()}
        for index, key in enumerate(reference.case.keys):
            if index in excused:
                continue
            expected_log, expected_loss = reference.sequences[key]
            log_ratio, part_of_loss = found.get(key, (np.inf, np.inf))
            ratio.take(_relative(abs(np.exp(log_ratio) - np.exp(expected_log)), np.exp(expected_log)), _label(key))
            loss.take(_relative(abs(part_of_loss - expected_loss), scale), _label(key))
        total = sum(part.loss for part in column)
        loss.take(_relative(abs(total - reference.loss), sum_scale), "total")


def _tensors(worst: Worst, parts: Sequence[dict[str, Difference]], expected: set[str], floor: float) -> None:
    """Gradients or parameters: every name of the reference's, each on the one rank that owns it."""
    names = [name for part in parts for name in part]
    for name in sorted(expected ^ set(names)):
        worst.take(float("inf"), f"{name} (on one side only)")
    for name in sorted({name for name in names if names.count(name) > 1}) if len(names) != len(set(names)) else ():
        worst.take(float("inf"), f"{name} (owned by two ranks)")
    for part in parts:
        for name, difference in part.items():
            worst.take(_relative(difference.error, max(difference.scale, floor)), name)


def _routes(row: Row, parts: Sequence[Part], reference: Reference) -> set[int]:
    """Responses routed otherwise; returns those whose first difference is a near-tie, and all after it its consequence.

    What is routed otherwise in one layer reaches every layer above it, so the lowest one decides.
    """
    case, first = reference.case, dict[int, tuple[int, bool]]()
    owner = np.repeat(np.arange(len(case.samples)), np.diff(case.starts))
    for part in parts:
        for layer, (numbers, experts) in part.routes.items():
            other = (experts != reference.routes[layer][numbers]).any(axis=1)
            for number in numbers[other].tolist():
                near = bool(reference.margins[layer][number] < case.precision.near_tie)
                index = int(owner[number])
                lowest, so_far = first.get(index, (layer, True))
                if layer <= lowest:
                    first[index] = (layer, near and (so_far if layer == lowest else True))
    for index, (layer, near) in sorted(first.items()):
        (row.near_ties if near else row.route_flips).append(f"{_label(case.keys[index])} layer {layer}")
    return {index for index, (_, near) in first.items() if near}


def _clips(row: Row, parts: Sequence[TokenValues], reference: Reference, excused: set[int]) -> None:
    case = reference.case
    numbers = np.concatenate([each for part in parts for each in part.numbers])
    clipped = np.zeros(len(reference.clipped), dtype=bool)
    clipped[numbers] = np.concatenate([each for part in parts for each in part.clipped])
    for index, own in _responses(case):
        other = np.flatnonzero(clipped[own] != reference.clipped[own])
        if not other.size or index in excused:  # what was routed otherwise is named already
            continue
        log_ratios = reference.logprobs[own] - case.old[index]
        if case.loss in ("gspo", "gspo-token"):
            log_ratios = np.full(len(log_ratios), reference.sequences[case.keys[index]][0])
        near = all(distance_to_clipping(log_ratios[t], case.clip, case.clip) < case.precision.near_clip for t in other)
        (row.near_ties if near else row.clip_flips).append(f"{_label(case.keys[index])}")


def _straddling(reference: Reference, parts: Sequence[Part]) -> int:
    case, ranks_of = reference.case, dict[int, set[int]]()
    for part in parts:
        for numbers in part.old_pass.numbers:
            for index, own in _responses(case):
                if ((numbers >= own.start) & (numbers < own.stop)).any():
                    ranks_of.setdefault(index, set()).add(part.token_rank)
    alive = (i for i, own in _responses(case) if case.samples[i].weight and not reference.clipped[own].all())
    return sum(len(ranks_of.get(index, ())) > 1 for index in alive)


def _responses(case: Case) -> Iterator[tuple[int, slice]]:
    return ((index, case.predicting(index)) for index in range(len(case.samples)))


def _relative(error: float, scale: float) -> float:
    """error / scale; 0 / 0 is 0, and a NaN is infinitely wrong."""
    if error == 0:
        return 0.0
    return float(error / scale) if scale and error == error else float("inf")


def _label(key: Key) -> str:
    return f"response {key[0]}/{key[1]}"
