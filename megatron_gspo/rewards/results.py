"""What a reward returned, checked: numbers in its range, named components, or why there is none."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from megatron_gspo.errors import RewardError
from megatron_gspo.rewards.interface import Score, Stopped, TokenRewards, Ungraded
from megatron_gspo.rewards.registry import Reward
from megatron_gspo.supervise import was_interrupted
from megatron_gspo.types import Rollout

COMPONENT = re.compile(r"[a-z0-9_]{1,64}")
MOST_COMPONENTS = 64
"""Of one response: each is a metric."""
MOST_REASON = 500
"""Characters of a reason that are kept."""


@dataclass(frozen=True)
class Result:
    """What one response got."""

    reward: float | TokenRewards = 0.0
    """float64; a ``Stopped`` is one."""
    components: dict[str, float] = field(default_factory=dict)
    ungraded: str = ""
    """Why it has no reward."""


def checked(reward: Reward, rollout: Rollout, result: object) -> Result:
    """The result, with float64 numbers. Raises RewardError unless all of it lies in the reward's range."""
    if isinstance(result, Result):
        return result
    if isinstance(result, Ungraded):
        return Result(ungraded=one_line(result.reason)[:MOST_REASON] or "no reason was given")
    if isinstance(result, Score):
        return Result(_numbers(reward, rollout, result.reward), _components(reward, rollout, result.components))
    return Result(_numbers(reward, rollout, result))


def _components(reward: Reward, rollout: Rollout, components: Mapping[str, Any]) -> dict[str, float]:
    found: dict[str, float] = {}
    if not isinstance(components, Mapping) or len(components) > MOST_COMPONENTS:
        what = f"{len(components)} of them" if isinstance(components, Mapping) else shown(components)
        raise reward_error(reward, rollout, f"returned components that are no table of {MOST_COMPONENTS} ({what})")
    for name, value in components.items():
        if not isinstance(name, str) or not COMPONENT.fullmatch(name):
            raise reward_error(reward, rollout, f"returned a component called {shown(name)}, not [a-z0-9_]+")
        array = _array(value)
        if array is None or array.ndim or not np.isfinite(array):
            raise reward_error(reward, rollout, f"returned {shown(value)} for the component {name!r}, no finite number")
        found[name] = float(array)
    return found


def _numbers(reward: Reward, rollout: Rollout, result: object) -> float | TokenRewards:
    low, high = reward.range
    if isinstance(result, Stopped) and low <= result <= high:
        return result
    per_token = isinstance(result, TokenRewards)
    array = _array(result.values if isinstance(result, TokenRewards) else result)
    if array is None or (not per_token and array.ndim):
        hint = "for one value a token, wrap them in TokenRewards"
        raise reward_error(reward, rollout, f"returned {shown(result)}, not a number in {interval(reward)} ({hint})")
    if per_token and array.shape != rollout.response_ids.shape:
        raise reward_error(reward, rollout, f"returned token rewards of shape {list(array.shape)}, not one a token")
    inside = (array >= low) & (array <= high) & np.isfinite(array)  # False for NaN too
    if not inside.all():
        raise reward_error(reward, rollout, f"returned {array[~inside].flat[0]}, outside {interval(reward)}")
    return TokenRewards(array) if per_token else float(array)


def interval(reward: Reward) -> str:
    """Its range, as errors show it: "[0, 1]"."""
    low, high = reward.range
    return f"{'[' if np.isfinite(low) else '('}{low:g}, {high:g}{']' if np.isfinite(high) else ')'}"


def _array(values: Any) -> np.ndarray | None:
    try:
        return _as_float64(values)
    except Exception:  # whatever a class of the user's raises when it is asked for a number
        return None


def _as_float64(values: Any) -> np.ndarray | None:
    """A number of any kind, or an array of numbers, on any device; None for text, dates and complex numbers, of which
    numpy makes numbers too."""
    if hasattr(values, "detach"):  # a tensor
        values = values.detach().cpu().double().numpy()
    array = np.asarray(values)
    if isinstance(values, np.ma.MaskedArray):  # what is masked would count as what lies under the mask
        return None
    if array.dtype.kind == "O":  # Decimal, Fraction, a class of the user's: what has a value as a number
        numbers = all(hasattr(value, "__float__") and not isinstance(value, str) for value in array.flat)
        return np.asarray(array, dtype=np.float64) if numbers else None
    return array.astype(np.float64) if array.dtype.kind in "biuf" else None


def shown(value: object) -> str:
    try:
        return f"{value!r:.100}"
    except BaseException as error:
        if was_interrupted():
            raise
        return f"a {type(value).__name__} whose repr() raises {type(error).__name__}"


def error_text(error: BaseException) -> str:
    try:
        return str(error)[:1000]
    except BaseException as raised:
        if was_interrupted():
            raise
        return f"(its str() raises {type(raised).__name__})"


def one_line(value: object) -> str:
    """A reason as a line for the terminal, whatever it is and whoever wrote it."""
    text = " ".join((value if isinstance(value, str) else shown(value)).split())
    return "".join(character if character.isprintable() else "?" for character in text)


def reward_error(reward: Reward, rollout: Rollout, what: str) -> RewardError:
    """An error that names the response."""
    return RewardError(
        f"reward {reward.name!r} {what} (prompt {rollout.prompt.id!r}, sample {rollout.sample}, "
        f"{len(rollout.response_ids)} tokens, response {rollout.text[-80:]!r})"
    )
