"""Scores responses: bounded in flight, timed, and checked on return."""

from __future__ import annotations

import asyncio
import concurrent.futures
import contextlib
import inspect
import os
import threading
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from megatron_gspo.errors import RewardError
from megatron_gspo.rewards.guard import GUARD, end_a_forked_child, read_only
from megatron_gspo.rewards.interface import RewardResult, Stopped, TokenRewards
from megatron_gspo.rewards.registry import Reward
from megatron_gspo.supervise import was_interrupted
from megatron_gspo.types import Rollout

SYNC_THREADS = 8
"""Plain functions running at a time. They share the interpreter lock, so more of them would not grade faster, but each
would seem to take longer and run into its timeout."""


@dataclass(frozen=True)
class GroupRewards:
    """The rewards of one group's responses, in their order."""

    rewards_G: np.ndarray
    """[G] float64 in [0, 1]; the mean of a response's token rewards where it has them."""
    token_rewards_G: tuple[np.ndarray, ...] | None
    """G arrays, each [R] float64 in [0, 1]; None when the function gave one number per response throughout."""
    stopped: int = 0
    """Responses whose grading took too long and was stopped; their rewards are 0."""


def score_now(reward: Reward, groups: Sequence[Sequence[Rollout]]) -> list[GroupRewards]:
    """``score_groups`` in an event loop of its own."""
    with guarded(reward):
        return asyncio.run(score_groups(reward, groups))


def guarded(reward: Reward) -> contextlib.AbstractContextManager[None]:
    """Around an event loop that scores: what a user's function did to the process, its loop included, is noticed."""
    return contextlib.nullcontext() if reward.built_in else GUARD.around(reward.name)


async def score_groups(reward: Reward, groups: Sequence[Sequence[Rollout]]) -> list[GroupRewards]:
    """Scores every response of every group, each for its own ``rollout.prompt``.

    An ``async def`` function has up to ``reward.concurrency`` calls in flight; a plain one runs in up to
    ``SYNC_THREADS`` threads. The first response that raises, takes over ``reward.timeout_s`` seconds, or gets anything
    but numbers in [0, 1] stops the scoring with a RewardError that names prompt, sample and value. A built-in function
    that takes too long does not: the response gets 0 and is counted in ``GroupRewards.stopped``.

    What a user's function may do to the process, ``rewards.guard`` undoes or refuses; it cannot write into the arrays
    that it is shown.

    What a timeout cannot do: a thread is never killed. After a timeout the function goes on in a daemon thread until it
    returns or the process ends; and one that keeps the interpreter lock (a runaway regular expression, a huge power)
    stops the event loop with it, timeouts included. Such work belongs in a process of its own.
    """
    is_async = _is_async(reward.function)
    limit = asyncio.Semaphore(reward.concurrency if is_async else min(reward.concurrency, SYNC_THREADS))
    shown = [array for rollouts in groups for r in rollouts for array in (r.response_ids, r.rollout_logprobs)]
    with guarded(reward), read_only(shown):
        results = await _score_all(reward, is_async, groups, limit)
    return [_group(rollouts, found) for rollouts, found in zip(groups, results, strict=True)]


async def _score_all(
    reward: Reward, is_async: bool, groups: Sequence[Sequence[Rollout]], limit: asyncio.Semaphore
) -> list[list[RewardResult]]:
    tasks = [
        [asyncio.create_task(_score(reward, is_async, rollout, limit)) for rollout in rollouts] for rollouts in groups
    ]
    flat = [task for group in tasks for task in group]
    try:
        await asyncio.gather(*flat)
    finally:
        for task in flat:
            task.cancel()  # after a failure: nothing runs on behind the caller's back
    return [[task.result() for task in group] for group in tasks]


async def _score(reward: Reward, is_async: bool, rollout: Rollout, limit: asyncio.Semaphore) -> RewardResult:
    async with limit:
        try:
            result = await asyncio.wait_for(_call(reward, is_async, rollout), reward.timeout_s)
        except TimeoutError:
            if reward.built_in:
                return Stopped()
            raise _error(reward, rollout, f"gave no answer within {reward.timeout_s:g} s (reward.timeout_s)") from None
        except Exception as error:  # a user's function may raise anything; what it raised stays attached
            raise _error(reward, rollout, f"raised {type(error).__name__}: {_text(error)}") from error
    return _checked(reward, rollout, result)


async def _call(reward: Reward, is_async: bool, rollout: Rollout) -> Any:
    owner = os.getpid()
    try:
        result = reward.function(rollout.prompt, rollout) if is_async else await _in_thread(reward, rollout)
        return await result if inspect.isawaitable(result) else result
    except BaseException as error:
        if isinstance(error, Exception) or was_interrupted() or _is_cancelled(error):
            raise
        # Past this coroutine it would end the process as if the run were done, or leave the other ranks waiting.
        code = f"({error.code!r})" if isinstance(error, SystemExit) else ""
        raise RuntimeError(f"{'sys.exit' if code else type(error).__name__}{code}") from error
    finally:
        end_a_forked_child(owner, reward.name)


def _is_cancelled(error: BaseException) -> bool:
    """Whether a CancelledError is ours, and not one that the function raised."""
    task = asyncio.current_task()
    return isinstance(error, asyncio.CancelledError) and task is not None and task.cancelling() > 0


async def _in_thread(reward: Reward, rollout: Rollout) -> Any:
    """Runs a plain function in a daemon thread: an executor's threads would be joined at exit, a stuck one for ever."""
    future: concurrent.futures.Future[tuple[Any, BaseException | None]] = concurrent.futures.Future()
    future.set_running_or_notify_cancel()
    owner = os.getpid()

    def run() -> None:
        result, raised = None, None
        try:
            result = reward.function(rollout.prompt, rollout)
        except BaseException as error:  # carried over to the awaiting side, whatever it is
            raised = error
        finally:
            end_a_forked_child(owner, reward.name)
        future.set_result((result, raised))

    threading.Thread(target=run, name=f"reward-{rollout.prompt.id}-{rollout.sample}", daemon=True).start()
    result, raised = await asyncio.wrap_future(future)
    if raised is not None:
        raise raised
    return result


def _checked(reward: Reward, rollout: Rollout, result: object) -> RewardResult:
    """The result as a float or as float64 token rewards. Raises RewardError unless all of it lies in [0, 1]."""
    if isinstance(result, Stopped):
        return result
    per_token = isinstance(result, TokenRewards)
    try:
        array = _as_float64(result.values if isinstance(result, TokenRewards) else result)
    except Exception:
        array = None
    if array is None or (not per_token and array.ndim):
        hint = "for one value a token, wrap them in TokenRewards"
        raise _error(reward, rollout, f"returned {_shown(result)}, not a number in [0, 1] ({hint})")
    if per_token and array.shape != rollout.response_ids.shape:
        raise _error(reward, rollout, f"returned token rewards of shape {list(array.shape)}, not one a token")
    inside = (array >= 0) & (array <= 1)  # False for NaN too
    if not inside.all():
        raise _error(reward, rollout, f"returned {array[~inside].flat[0]}, outside [0, 1]")
    return TokenRewards(array) if per_token else float(array)


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


def _shown(value: object) -> str:
    try:
        return f"{value!r:.100}"
    except Exception as error:
        return f"a {type(value).__name__} whose repr() raises {type(error).__name__}"


def _text(error: BaseException) -> str:
    try:
        return str(error)[:1000]
    except Exception as raised:
        return f"(its str() raises {type(raised).__name__})"


def _group(rollouts: Sequence[Rollout], results: Sequence[RewardResult]) -> GroupRewards:
    per_token = any(isinstance(result, TokenRewards) for result in results)
    scalars = [float(r.values.mean()) if isinstance(r, TokenRewards) else r for r in results]
    rewards_G = np.asarray(scalars, dtype=np.float64)
    stopped = sum(isinstance(result, Stopped) for result in results)
    if not per_token:
        return GroupRewards(rewards_G, None, stopped)
    tokens = tuple(
        result.values if isinstance(result, TokenRewards) else np.full(len(rollout.response_ids), result)
        for rollout, result in zip(rollouts, results, strict=True)
    )
    return GroupRewards(rewards_G, tokens, stopped)


def _is_async(function: Any) -> bool:
    """Whether calling it makes a coroutine: functions, partials of them, and objects with an async ``__call__``."""
    return inspect.iscoroutinefunction(function) or inspect.iscoroutinefunction(
        getattr(getattr(function, "func", function), "__call__", None)  # noqa: B004  the method itself is wanted
    )


def _error(reward: Reward, rollout: Rollout, what: str) -> RewardError:
    return RewardError(
        f"reward {reward.name!r} {what} (prompt {rollout.prompt.id!r}, sample {rollout.sample}, "
        f"{len(rollout.response_ids)} tokens, response {rollout.text[-80:]!r})"
    )
