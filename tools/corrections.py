"""Bias and variance of each correction for the engine gap, exactly, on a problem small enough to enumerate.

    python tools/corrections.py

A policy over 5 tokens draws responses of 4, each token's distribution depending on all before it; the engine's differs
from it by noise on the logits. All 625 responses are scored by a random reward, and the gradient of the expected reward
on the policy's own distribution is known exactly. A trainer sees responses that the engine drew: by the product's own
loss and corrections, the mean of its gradient estimate is what it learns towards, and the spread of one response's
estimate is its noise. Printed is the table of docs/corrections.md; both columns are relative to the exact gradient.
"""

from __future__ import annotations

import argparse
import itertools
from dataclasses import dataclass

import numpy as np
import torch

from megatron_gspo.algorithm.base import make_algorithm
from megatron_gspo.algorithm.correction import Correction
from megatron_gspo.algorithm.importance import correct
from megatron_gspo.algorithm.objective import objective
from megatron_gspo.algorithm.ratios import segment_sum
from megatron_gspo.batching.packing import pack, shard_tokens
from megatron_gspo.types import PlacedSample, Shard

VOCABULARY, LENGTH = 5, 4
GAPS = (0.05, 0.3, 1.0)
"""Standard deviation of the noise on the engine's logits."""
RULES: dict[str, dict[str, object]] = {
    "none": {},
    "truncate, token, 2": {"rule": "truncate", "high": 2.0},
    "mask, token, 0.5 to 5 (IcePop)": {"rule": "mask", "low": 0.5, "high": 5.0},
    "drop, token, 0.5 to 2": {"rule": "drop", "low": 0.5, "high": 2.0},
    "truncate, sequence, 2": {"rule": "truncate", "level": "sequence", "high": 2.0},
    "truncate, sequence, no bound": {"rule": "truncate", "level": "sequence", "high": 1e9},
    "mask, sequence, 0.5 to 2": {"rule": "mask", "level": "sequence", "low": 0.5, "high": 2.0},
    "truncate, geometric, 2": {"rule": "truncate", "level": "geometric", "high": 2.0},
    "drop, geometric, 0.8 to 1.25": {"rule": "drop", "level": "geometric", "low": 0.8, "high": 1.25},
    "reject k3 above 0.01, sequence": {"reject": "k3", "reject_above": 0.01},
}


@dataclass(frozen=True)
class Problem:
    """All responses, and a table of logits for each prefix."""

    logits: torch.Tensor
    """[prefixes, V] float64, the policy's; a leaf."""
    engine: torch.Tensor
    """The engine's."""
    responses: list[tuple[int, ...]]
    rewards: np.ndarray

    def logprobs(self, logits: torch.Tensor, response: tuple[int, ...]) -> torch.Tensor:
        """[T] of each token given those before it."""
        rows = [prefix_index(response[:t]) for t in range(LENGTH)]
        return torch.log_softmax(logits[rows], dim=-1)[range(LENGTH), list(response)]


def prefix_index(prefix: tuple[int, ...]) -> int:
    index = 0
    for token in prefix:
        index = index * VOCABULARY + token + 1
    return index


def problem(gap: float, seed: int = 0) -> Problem:
    rng = np.random.default_rng(seed)
    count = prefix_index((VOCABULARY - 1,) * (LENGTH - 1)) + 1
    logits = rng.normal(0, 1.0, (count, VOCABULARY))
    engine = logits + rng.normal(0, gap, logits.shape)
    responses = list(itertools.product(range(VOCABULARY), repeat=LENGTH))
    rewards = rng.random(len(responses))
    return Problem(torch.tensor(logits, requires_grad=True), torch.tensor(engine), responses, rewards)


def estimates(case: Problem, settings: Correction) -> torch.Tensor:
    """[responses, parameters] what one response's gradient estimate is, by the product's loss and corrections."""
    baseline = float(sum(np.exp(log_total(case, case.logits)) * case.rewards))
    rows = []
    for response, reward in zip(case.responses, case.rewards, strict=True):
        new_R = case.logprobs(case.logits, response)
        mu_R = case.logprobs(case.engine, response)
        advantage = float(reward - baseline)
        sample = PlacedSample.of_response(
            np.zeros(1),
            np.array(response),
            group=0,
            sample=0,
            rollout_logprobs=mu_R.detach().numpy(),
            advantage=advantage,
            token_advantages=np.full(LENGTH, advantage),
            weight=float(LENGTH),  # a sum over tokens
        )
        shard = shard_tokens(pack([sample], loss_dtype=torch.float64), Shard())
        new_T = torch.zeros(LENGTH + 1, dtype=torch.float64).masked_scatter(shard.mask_T, new_R)
        mu_T = torch.zeros(LENGTH + 1, dtype=torch.float64).masked_scatter(shard.mask_T, mu_R)
        shard = shard.replace(old_logprobs_T=new_T.detach(), rollout_logprobs_T=mu_T)
        weights_T = correct(shard, settings, segment_sum).weights_T
        shard = shard.replace(corrections_T=weights_T, corrections_S=weights_T[:LENGTH].mean().reshape(1))
        loss = objective(make_algorithm("ppo"), shard, new_T, segment_sum).loss
        rows.append(-torch.autograd.grad(loss, case.logits)[0].flatten())
    return torch.stack(rows)


def log_total(case: Problem, logits: torch.Tensor) -> np.ndarray:
    """[responses] log-probability of each whole response."""
    return np.array([float(case.logprobs(logits, response).sum().detach()) for response in case.responses])


def measure(gap: float) -> dict[str, tuple[float, float]]:
    """Rule -> (bias, spread), each relative to the norm of the exact gradient."""
    case = problem(gap)
    plain = estimates(case, Correction())
    exact = (torch.from_numpy(np.exp(log_total(case, case.logits)))[:, None] * plain).sum(0)
    drawn = torch.from_numpy(np.exp(log_total(case, case.engine)))[:, None]
    found = {}
    for name, settings in RULES.items():
        rows = plain if not settings else estimates(case, Correction(**settings))  # type: ignore[arg-type]
        mean = (drawn * rows).sum(0)
        spread = (drawn * (rows - mean).square()).sum().sqrt()
        found[name] = (float((mean - exact).norm() / exact.norm()), float(spread / exact.norm()))
    return found


def main() -> None:
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()
    measured = {gap: measure(gap) for gap in GAPS}
    print("| rule | " + " | ".join(f"bias, noise {gap:g} | spread" for gap in GAPS) + " |")
    print("|---|" + "---|---|" * len(GAPS))
    for name in RULES:
        print(
            f"| {name} | " + " | ".join(f"{measured[g][name][0]:.3f} | {measured[g][name][1]:.2f}" for g in GAPS) + " |"
        )


if __name__ == "__main__":
    main()
