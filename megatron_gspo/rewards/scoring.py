"""Scores responses: bounded in flight, timed, and checked on return."""

from __future__ import annotations

import asyncio
import concurrent.futures
import inspect
import threading
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from megatron_gspo.errors import RewardError
from megatron_gspo.rewards.interface import RewardResult, Stopped, TokenRewards
from megatron_gspo.rewards.registry import Reward
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


async def score_groups(reward: Reward, groups: Sequence[Sequence[Rollout]]) -> list[GroupRewards]:
    """Scores every response of every group, each for its own ``rollout.prompt``.

    An ``async def`` function has up to ``reward.concurrency`` calls in flight; a plain one runs in up to
    ``SYNC_THREADS`` threads. The first response that raises, takes over ``reward.timeout_s`` seconds, or gets anything
    but numbers in [0, 1] stops the scoring with a RewardError that names prompt, sample and value. A built-in function
    that takes too long does not: the response gets 0 and is counted in ``GroupRewards.stopped``.

    What a timeout cannot do: a thread is never killed. After a timeout the function goes on in a daemon thread until it
    returns or the process ends; and one that keeps the interpreter lock (a runaway regular expression, a huge power)
    stops the event loop with it, timeouts included. Such work belongs in a process of its own.
    """
    is_async = _is_async(reward.function)
    limit = asyncio.Semaphore(reward.concurrency if is_async else min(reward.concurrency, SYNC_THREADS))
    tasks = [
        [asyncio.create_task(_score(reward, is_async, rollout, limit)) for rollout in rollouts] for rollouts in groups
    ]
    flat = [task for group in tasks for task in group]
    try:
        await asyncio.gather(*flat)
    finally:
        for task in flat:
            task.cancel()  # after a failure: nothing runs on behind the caller's back
    return [_group(rollouts, [t.result() for t in group]) for rollouts, group in zip(groups, tasks, strict=True)]


async def _score(reward: Reward, is_async: bool, rollout: Rollout, limit: asyncio.Semaphore) -> RewardResult:
    async with limit:
        try:
            result = await asyncio.wait_for(_call(reward, is_async, rollout), reward.timeout_s)
        except TimeoutError:
            if reward.built_in:
                return Stopped()
            raise _error(reward, rollout, f"gave no answer within {reward.timeout_s:g} s (reward.timeout_s)") from None
        except Exception as error:  # a user's function may raise anything; what it raised stays attached
            raise _error(reward, rollout, f"raised {type(error).__name__}: {error}") from error
    return _checked(reward, rollout, result)


async def _call(reward: Reward, is_async: bool, rollout: Rollout) -> Any:
    try:
        result = reward.function(rollout.prompt, rollout) if is_async else await _in_thread(reward, rollout)
        return await result if inspect.isawaitable(result) else result
    except SystemExit as error:  # past this coroutine it would end the process, and the run as if it were done
        raise RuntimeError(f"sys.exit({error.code!r})") from error


async def _in_thread(reward: Reward, rollout: Rollout) -> Any:
    """Runs a plain function in a daemon thread: an executor's threads would be joined at exit, a stuck one for ever."""
    future: concurrent.futures.Future[Any] = concurrent.futures.Future()
    future.set_running_or_notify_cancel()

    def run() -> None:
        try:
            future.set_result(reward.function(rollout.prompt, rollout))
        except BaseException as error:  # carried over to the awaiting side, whatever it is
            future.set_exception(error)

    threading.Thread(target=run, name=f"reward-{rollout.prompt.id}-{rollout.sample}", daemon=True).start()
    return await asyncio.wrap_future(future)


def _checked(reward: Reward, rollout: Rollout, result: object) -> RewardResult:
    """The result as a float or as float64 token rewards. Raises RewardError unless all of it lies in [0, 1]."""
    if isinstance(result, Stopped):
        return result
    per_token = isinstance(result, TokenRewards)
    values = result.values if isinstance(result, TokenRewards) else result
    if not per_token and (not hasattr(values, "__float__") or np.ndim(values)):  # type: ignore[arg-type]
        hint = "for one value a token, wrap them in TokenRewards"
        raise _error(reward, rollout, f"returned {result!r:.100}, not a number in [0, 1] ({hint})")
    array = np.asarray(values, dtype=np.float64)
    if per_token and array.shape != rollout.response_ids.shape:
        raise _error(reward, rollout, f"returned token rewards of shape {list(array.shape)}, not one a token")
    inside = (array >= 0) & (array <= 1)  # False for NaN too
    if not inside.all():
        raise _error(reward, rollout, f"returned {array[~inside].flat[0]}, outside [0, 1]")
    return TokenRewards(array) if per_token else float(array)


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
