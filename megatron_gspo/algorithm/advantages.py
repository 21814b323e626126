"""Group-relative advantages: how much better a response did than its siblings, in standard deviations.

Statistics are float64 with the population standard deviation and no epsilon (arXiv 2507.18071, section 4.2). A group
whose rewards are all equal carries no signal and gets exactly zero: that is tested on the rewards before anything is
divided, because eight fp32 rewards of 0.1 have a computed deviation of 1e-8, and dividing by it gives +-1.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import numpy as np

from megatron_gspo.algorithm.base import Credit
from megatron_gspo.errors import BatchError


def is_zero_variance(rewards: np.ndarray) -> bool:
    """True when every reward equals every other one, so that the group teaches nothing."""
    return bool(np.max(rewards) == np.min(rewards))


def group_advantages(rewards_G: np.ndarray) -> np.ndarray:
    """A_i = (r_i - mean r) / std r over the G responses of one prompt.

    Args:
        rewards_G: [G], any real dtype, G >= 2.
    Returns:
        [G] float64; all zero for a group without variance.
    Raises:
        BatchError: fewer than two rewards, or one that is not finite.
    """
    rewards_G = np.asarray(rewards_G)
    _check_group(rewards_G.size, rewards_G)
    zero_variance = is_zero_variance(rewards_G)
    rewards_G = rewards_G.astype(np.float64)
    if zero_variance:
        return np.zeros_like(rewards_G)
    centred_G = rewards_G - rewards_G.mean()
    return centred_G / np.sqrt(np.mean(centred_G**2))


def centred_advantages(rewards_G: np.ndarray) -> np.ndarray:
    """A_i = r_i - mean r (arXiv 2503.20783): [G] float64; exactly zero for a group without variance."""
    rewards_G = np.asarray(rewards_G)
    _check_group(rewards_G.size, rewards_G)
    rewards_G = rewards_G.astype(np.float64)
    return np.zeros_like(rewards_G) if is_zero_variance(rewards_G) else rewards_G - rewards_G.mean()


def leave_one_out_advantages(rewards_G: np.ndarray) -> np.ndarray:
    """A_i = r_i - mean of the others = (r_i - mean r) G / (G - 1) (arXiv 2402.14740): [G] float64."""
    centred_G = centred_advantages(rewards_G)
    return centred_G * (centred_G.size / (centred_G.size - 1))


def batch_advantages(
    rewards_P: Sequence[np.ndarray], lengths_P: Sequence[np.ndarray], *, baseline: bool
) -> tuple[np.ndarray, ...]:
    """A_i = (r_i - mean) / std over the tokens of all responses, each of which counts with its length |y_i|
    (arXiv 2501.03262, section 3); ``baseline``: after the mean of its group was taken off each reward.

    Args:
        rewards_P: by group, [G_p] rewards.
        lengths_P: by group, [G_p] trained tokens.
    Returns:
        By group, [G_p] float64; all zero where no reward differs from another.
    """
    values_P = [centred_advantages(r) if baseline else np.asarray(r, dtype=np.float64) for r in rewards_P]
    flat, lengths = np.concatenate(values_P), np.concatenate(lengths_P).astype(np.float64)
    if not np.isfinite(flat).all():
        raise BatchError(f"rewards are not finite: {flat[~np.isfinite(flat)][:4].tolist()}")
    if is_zero_variance(flat):
        return tuple(np.zeros_like(values_G) for values_G in values_P)
    mean = np.average(flat, weights=lengths)
    std = np.sqrt(np.average((flat - mean) ** 2, weights=lengths))
    return tuple((values_G - mean) / std for values_G in values_P)


BY_GROUP: dict[str, Callable[[np.ndarray], np.ndarray]] = {
    "group": group_advantages,
    "centred": centred_advantages,
    "leave-one-out": leave_one_out_advantages,
}
"""``algorithm.credit`` that looks at one group at a time."""


def credit_by_response(
    credit: Credit, rewards: Mapping[int, np.ndarray], lengths: Mapping[int, np.ndarray]
) -> dict[int, np.ndarray]:
    """Advantages of responses, [G_p] float64 by group, from the rewards and lengths [G_p] of an outer step's groups.

    "gae" has no advantage of a response: it stands here with what "batch" gives, until the values are known.
    """
    if credit in BY_GROUP:
        return {position: BY_GROUP[credit](rewards_G) for position, rewards_G in rewards.items()}
    positions = sorted(rewards)
    if not positions:
        return {}
    every = [rewards[position] for position in positions], [lengths[position] for position in positions]
    return dict(zip(positions, batch_advantages(*every, baseline=credit == "group-then-batch"), strict=True))


def token_group_advantages(token_rewards_G: Sequence[np.ndarray]) -> tuple[np.ndarray, ...]:
    """A_{i,t} = (r_{i,t} - mean r) / std r for per-token or per-turn rewards, as GSPO-token takes them.

    Mean and variance weight each token by 1 / (G |y_i|), so that a long response counts no more than a short one and
    rewards that are constant within each response give exactly ``group_advantages``.

    Args:
        token_rewards_G: G arrays, each [R_i] with R_i >= 1; G >= 2.
    Returns:
        G arrays, each [R_i] float64.
    Raises:
        BatchError: fewer than two responses, an empty one, or a reward that is not finite.
    """
    rewards_G = [np.asarray(rewards_R) for rewards_R in token_rewards_G]
    if empty := [i for i, rewards_R in enumerate(rewards_G) if rewards_R.size == 0]:
        raise BatchError(f"responses {empty} of the group have no token rewards: drop empty responses first")
    flat = np.concatenate(rewards_G) if rewards_G else np.empty(0)
    _check_group(len(rewards_G), flat)
    if is_zero_variance(flat):
        return tuple(np.zeros(rewards_R.shape) for rewards_R in rewards_G)
    rewards_G = [rewards_R.astype(np.float64) for rewards_R in rewards_G]
    mean = np.mean([_response_mean(rewards_R) for rewards_R in rewards_G])
    centred_G = [rewards_R - mean for rewards_R in rewards_G]
    std = np.sqrt(np.mean([_response_mean(centred_R**2) for centred_R in centred_G]))
    return tuple(centred_R / std for centred_R in centred_G)


def _response_mean(values_R: np.ndarray) -> float:
    """Mean over a response; of n equal numbers it is that number to the last bit, which a plain mean is not."""
    return float(values_R[0] + np.mean(values_R - values_R[0]))


def _check_group(size: int, rewards: np.ndarray) -> None:
    if size < 2:
        raise BatchError(f"a group of {size} has no relative advantage: drop groups with fewer than two survivors")
    if not np.isfinite(rewards).all():
        raise BatchError(f"rewards are not finite: {rewards[~np.isfinite(rewards)][:4].tolist()}")
