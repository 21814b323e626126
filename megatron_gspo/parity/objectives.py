"""Every loss and every correction over one forward pass: what each makes of a mini-batch's logprobs.

The gradient of a loss in the logprobs is all that the model's backward takes from it, and that backward is compared
for one loss; so a layout that holds here, holds for every loss, at the cost of one.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch

from megatron_gspo.algorithm.correction import Correction
from megatron_gspo.algorithm.covariance import ClipCov, Covariance
from megatron_gspo.algorithm.importance import correct
from megatron_gspo.algorithm.objective import objective
from megatron_gspo.megatron.groups import device
from megatron_gspo.parallel.sums import StageTotals
from megatron_gspo.parity import shards
from megatron_gspo.parity.case import KL_COEF, Case, Key
from megatron_gspo.parity.naive import FORMULAS, Response, naive_term, naive_weights
from megatron_gspo.parity.parts import Values
from megatron_gspo.train.batch import Minibatch
from megatron_gspo.train.learner import Learner

WIDE = {"clip-cov": {"low": 0.1, "high": 3.0}}
BAND = {"low": 0.4, "high": 2.5}
CORRECTIONS = {
    **{
        f"{rule} by {level}": Correction(rule=rule, level=level, **BAND)  # type: ignore[arg-type]
        for rule in ("truncate", "clip", "mask", "drop")
        for level in ("token", "sequence", "geometric")
    },
    "reject by k1": Correction(reject="k1", reject_above=0.8),
    "reject by k2 of a token": Correction(reject="k2", reject_level="token", reject_above=0.5),
    "reject by k3": Correction(reject="k3", reject_above=0.5),
    "veto": Correction(veto=0.1),
}


@dataclass(frozen=True)
class Expected:
    """The same by the naive formulas."""

    of_tokens: np.ndarray
    """[tokens] float64; NaN where a token predicts no trained token of this mini-batch."""
    of_responses: Mapping[Key, float]


def algorithms(case: Case) -> Iterator[tuple[str, Case]]:
    """Every algorithm of the catalog, as the loss of this case."""
    for name in FORMULAS:
        other = replace(case, loss=name)
        if "share" in type(other.algorithm).model_fields:  # of so few tokens
            other.__dict__["algorithm"] = other.algorithm.model_copy(update={"share": 0.1, **WIDE.get(name, {})})
        yield name, other


def every_objective(
    case: Case,
    learner: Learner,
    minibatch: Minibatch,
    number: int,
) -> dict[str, Values]:
    """What every loss and correction makes of this rank's tokens of a mini-batch, by name. Collective over the last
    stage; empty elsewhere."""
    found: dict[str, Values] = {}
    owns = [
        (shard.mask_T.cpu().numpy(), shards.own_numbers(case, batch, learner.groups))
        for batch, shard in zip(minibatch.batches, minibatch.shards, strict=bool(minibatch.shards))
    ]

    def note(name: str, micro_batch: int, values_T: torch.Tensor) -> Values:
        values, (own, numbers) = found.setdefault(name, Values()), owns[micro_batch]
        values.numbers.append(numbers[own])
        values.of_tokens.append(values_T.double().cpu().numpy()[own])
        return values

    for name, other in algorithms(case) if minibatch.shards else ():
        config = learner.config.model_copy(update={"algorithm": other.algorithm})
        weighed = shards.weighed_as(case, minibatch, number, config)
        prepared = other.algorithm.prepare(weighed, StageTotals(learner.groups.tensor_data, device()))
        for index, (shard, trained) in enumerate(zip(prepared, minibatch.trained, strict=True)):
            logprobs_T = trained.new_logprobs_T.detach().clone().requires_grad_()
            output = objective(other.algorithm, shard, logprobs_T, learner.sequence_sum)
            (gradient_T,) = torch.autograd.grad(output.loss, logprobs_T)
            note(name, index, gradient_T).of_responses.update(zip(shard.samples, output.loss_S.tolist(), strict=True))
    for name, settings in CORRECTIONS.items():
        for index, shard in enumerate(minibatch.shards):
            note(name, index, correct(shard, settings, learner.sequence_sum).weights_T)
    for values in found.values():
        values.of_responses.pop((-1, -1), None)  # dummies
    return found


def naive_objectives(case: Case, logprobs: np.ndarray, number: int) -> dict[str, Expected]:
    """The same of the reference's logprobs ([tokens] float64), a response at a time."""
    members = case.minibatches[number]
    expected = {}
    longest = max(sample.length for sample in case.samples) - 1
    for name, other in algorithms(case):
        weights = naive_weights(
            [case.samples[index].group for index in members],
            [case.samples[index].num_trained for index in members],
            other.algorithm.weighting,
            longest,
        )
        gradients, parts = {}, {}
        chosen = naive_choice(other, members)
        for index, weight in zip(members, weights, strict=True):
            new = [torch.tensor(x, dtype=torch.float64, requires_grad=True) for x in logprobs[case.predicting(index)]]
            coef = KL_COEF if other.algorithm.uses_reference else 0.0
            term = naive_term(name, response_of(other, index, new, chosen), other.algorithm.model_dump(), weight, coef)
            found = torch.autograd.grad(term.loss, new, allow_unused=True)
            gradients[index] = np.array([0.0 if each is None else float(each) for each in found])
            parts[case.keys[index]] = float(term.loss.detach())
        expected[name] = Expected(shards.scattered(case, gradients, np.nan), parts)
    for name, settings in CORRECTIONS.items():
        rows = {
            index: np.array(
                naive_correction(case.old[index].tolist(), case.samples[index].rollout_logprobs.tolist(), settings)
            )
            for index in members
        }
        expected[name] = Expected(shards.scattered(case, rows, np.nan), {})
    return expected


def response_of(
    case: Case, index: int, new: list[torch.Tensor], chosen: Mapping[int, list[bool]] | None = None
) -> Response:
    """A sample as the naive formulas take it; ``new`` are scalars, by trained token."""
    return Response(
        new=new,
        old=case.old[index].tolist(),
        ref=case.ref[index].tolist(),
        rollout=case.samples[index].rollout_logprobs.astype(np.float64).tolist(),
        advantages=case.advantages(index),
        chosen=(chosen or {}).get(index, []),
    )


def naive_choice(case: Case, members: Sequence[int]) -> dict[int, list[bool]]:
    """Of Clip-Cov and KL-Cov, which tokens of a mini-batch are chosen, by sorting all of them; {} for others."""
    if not isinstance(case.algorithm, Covariance):
        return {}
    tokens = [
        (index, place, old, advantage)
        for index in members
        for place, old, advantage in zip(
            case.samples[index].predicting, case.old[index], case.advantages(index), strict=True
        )
    ]
    log_mean, mean = (float(np.mean([token[which] for token in tokens])) for which in (2, 3))
    ranked = {}
    for index, place, old, advantage in tokens:
        covariance = (old - log_mean) * (advantage - mean)
        if not isinstance(case.algorithm, ClipCov):
            ranked[index, place] = covariance
        elif case.algorithm.low < covariance < case.algorithm.high:
            ranked[index, place] = naive_draw(*case.keys[index], int(place))
    best = sorted(ranked, key=ranked.__getitem__, reverse=True)[: max(int(case.algorithm.share * len(tokens)), 1)]
    return {index: [(index, place) in best for place in case.samples[index].predicting] for index in members}


def naive_draw(group: int, sample: int, place: int) -> float:
    """splitmix64's finaliser (Steele, Lea and Flood, 2014) of a token's place, in Python's own integers."""
    bits = ((group * 1_000_003 + sample) % 2**62 * 1_000_033 + place) % 2**64
    bits = (bits ^ (bits >> 30)) * 0xBF58476D1CE4E5B9 % 2**64
    bits = (bits ^ (bits >> 27)) * 0x94D049BB133111EB % 2**64
    return ((bits ^ (bits >> 31)) >> 11) / 2**53


def naive_correction(old: Sequence[float], rollout: Sequence[float], settings: Correction) -> list[float]:
    """The weight of each token of a response, with ratios multiplied out as the rules are written."""
    rho = [math.exp(a - b) for a, b in zip(old, rollout, strict=True)]
    levels = {
        "token": rho,
        "sequence": [math.exp(min(max(sum(map(math.log, rho)), -20.0), 20.0))] * len(rho),
        "geometric": [math.prod(each ** (1 / len(rho)) for each in rho)] * len(rho),
    }
    estimates = {
        "k1": [abs(math.log(each)) for each in rho],
        "k2": [math.log(each) ** 2 / 2 for each in rho],
        "k3": [each - 1 - math.log(each) for each in rho],
    }
    low, high = settings.low, settings.high
    formulas = {
        "off": lambda each: 1.0,
        "truncate": lambda each: min(each, high),
        "clip": lambda each: min(max(each, low), high),
        "mask": lambda each: each if low <= each <= high else 0.0,
        "drop": lambda each: 1.0 if low <= each <= high else 0.0,
    }
    weights = [formulas[settings.rule](each) for each in levels[settings.level]]
    if settings.reject != "off":
        values = estimates[settings.reject]
        if settings.reject_level == "sequence":
            values = [sum(values) / len(values)] * len(values)
        weights = [0.0 if far > settings.reject_above else w for w, far in zip(weights, values, strict=True)]
    return [0.0] * len(rho) if any(each < settings.veto for each in rho) else weights
