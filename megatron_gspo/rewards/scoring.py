"""Scores responses: bounded in flight, timed, and checked on return."""

from __future__ import annotations

import asyncio
import concurrent.futures
import contextlib
import functools
import inspect
import os
import threading
from collections.abc import AsyncIterator, Callable, Coroutine, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from megatron_gspo.errors import RewardError
from megatron_gspo.rewards.guard import GUARD, end_a_forked_child, read_only
from megatron_gspo.rewards.interface import Stopped, TokenRewards
from megatron_gspo.rewards.registry import Reward
from megatron_gspo.rewards.results import Result, checked, error_text, reward_error, shown
from megatron_gspo.supervise import was_interrupted
from megatron_gspo.types import Rollout

CANCELLED_S = 1.0
"""That a call which was cancelled has for its end."""
SYNC_THREADS = 8
"""Plain functions running at a time. They share the interpreter lock, so more of them would not grade faster, but each
would seem to take longer and run into its timeout."""


@dataclass(frozen=True)
class GroupRewards:
    """The rewards of one group's responses, in their order."""

    rewards_G: np.ndarray
    """[G] float64 in the reward's range; the mean of a response's token rewards where it has them. NaN for a response
    that was not graded."""
    token_rewards_G: tuple[np.ndarray, ...] | None
    """G arrays, each [R] float64; None when the function gave one number per response throughout."""
    stopped: int = 0
    """Responses whose grading took too long and was stopped; their rewards are 0."""
    ungraded_G: tuple[str, ...] = ()
    """G reasons why a response was not graded, "" for those that were; empty when all were."""
    components_G: tuple[dict[str, float], ...] = ()
    """G tables of named components; empty when no response has one."""

    @property
    def graded(self) -> list[int]:
        """Positions of the responses that have a reward."""
        return [i for i in range(len(self.rewards_G)) if not (self.ungraded_G and self.ungraded_G[i])]

    def of(self, positions: Sequence[int]) -> GroupRewards:
        """Those of some of the responses, all of them graded."""
        tokens, components = self.token_rewards_G, self.components_G
        return replace(
            self,
            rewards_G=self.rewards_G[list(positions)],
            token_rewards_G=None if tokens is None else tuple(tokens[i] for i in positions),
            ungraded_G=(),
            components_G=tuple(components[i] for i in positions) if components else (),
        )


def score_now(reward: Reward, groups: Sequence[Sequence[Rollout]]) -> list[GroupRewards]:
    """``score_groups`` in an event loop of its own."""
    with guarded(reward):
        return asyncio.run(score_groups(reward, groups))


def guarded(reward: Reward) -> contextlib.AbstractContextManager[None]:
    """Around an event loop that scores: what a user's function did to the process, its loop included, is noticed."""
    return contextlib.nullcontext() if reward.ours else GUARD.around(reward.name)


async def score_groups(reward: Reward, groups: Sequence[Sequence[Rollout]]) -> list[GroupRewards]:
    """Scores every response of every group, each for its own ``rollout.prompt``, within the reward's lifetime.

    An ``async`` reward has up to ``reward.concurrency`` calls in flight; a plain one runs in up to ``SYNC_THREADS``
    threads. A call is of one response, or of a group where the reward takes groups. The first one that raises, takes
    over ``reward.timeout_s`` seconds, or gets anything but numbers in the reward's range stops the scoring with a
    RewardError that names prompt, sample and value. A built-in reward that takes too long does not: the response gets
    0 and is counted in ``GroupRewards.stopped``, or is left ungraded, as ``Reward.on_timeout`` says.

    What a user's function may do to the process, ``rewards.guard`` undoes or refuses; it cannot write into the arrays
    that it is shown.

    What a timeout cannot do: a thread is never killed. After a timeout the function goes on in a daemon thread until it
    returns or the process ends; and one that keeps the interpreter lock (a runaway regular expression, a huge power)
    stops the event loop with it, timeouts included. Such work belongs in a process of its own.
    """
    with guarded(reward):
        async with lifetime(reward):
            return await score_within(reward, groups)


@contextlib.asynccontextmanager
async def lifetime(reward: Reward) -> AsyncIterator[None]:
    """A reward's ``__aenter__`` and ``__aexit__``, each within ``reward.timeout_s``; nothing where it has none. An
    error that is under way is never swallowed, and comes before one of ``__aexit__``. Raises RewardError."""
    kind = type(reward.function)
    enter, leave = getattr(kind, "__aenter__", None), getattr(kind, "__aexit__", None)
    if enter is None or leave is None:
        yield
        return
    await _timed(reward, "__aenter__", functools.partial(enter, reward.function))
    try:
        yield
    except BaseException as error:
        leaving = functools.partial(leave, reward.function, type(error), error, error.__traceback__)
        with contextlib.suppress(RewardError):
            await _timed(reward, "__aexit__", leaving)
        raise
    await _timed(reward, "__aexit__", functools.partial(leave, reward.function, None, None, None))


async def score_within(reward: Reward, groups: Sequence[Sequence[Rollout]]) -> list[GroupRewards]:
    """``score_groups`` where the reward's lifetime has begun."""
    results = await results_of(reward, groups, slots(reward))
    return [_group(rollouts, found) for rollouts, found in zip(groups, results, strict=True)]


def slots(reward: Reward) -> asyncio.Semaphore:
    """As many as its calls that may be in flight; of one event loop."""
    return asyncio.Semaphore(reward.concurrency if reward.is_async else min(reward.concurrency, SYNC_THREADS))


async def results_of(
    reward: Reward, groups: Sequence[Sequence[Rollout]], limit: asyncio.Semaphore
) -> list[list[Result]]:
    """What each response got, by group. Raises RewardError."""
    shown_ones = [array for rollouts in groups for r in rollouts for array in (r.response_ids, r.rollout_logprobs)]
    with guarded(reward), read_only(shown_ones):
        return await _score_all(reward, groups, limit)


async def _score_all(
    reward: Reward, groups: Sequence[Sequence[Rollout]], limit: asyncio.Semaphore
) -> list[list[Result]]:
    whole = reward.takes_groups
    calls = [[list(rollouts)] if whole and rollouts else [[rollout] for rollout in rollouts] for rollouts in groups]
    tasks = [[asyncio.create_task(_score(reward, called, limit)) for called in of_group] for of_group in calls]
    flat = [task for of_group in tasks for task in of_group]
    try:
        await asyncio.gather(*flat)
    finally:
        for task in flat:
            task.cancel()  # after a failure: nothing runs on behind the caller's back
    return [[result for task in of_group for result in task.result()] for of_group in tasks]


async def _score(reward: Reward, called: Sequence[Rollout], limit: asyncio.Semaphore) -> list[Result]:
    """The results of one call, one a response."""
    whole, prompt = reward.takes_groups, called[0].prompt
    scored: Any = reward.function.score_group if whole else reward.function  # type: ignore[union-attr]
    async with limit:
        try:
            action = _call(reward, lambda: scored(prompt, tuple(called) if whole else called[0]), reward.is_async)
            result = await _within(action, None if reward.untimed else reward.timeout_s)
        except TimeoutError:
            return [_late(reward, rollout) for rollout in called]
        except Exception as error:  # a user's function may raise anything; what it raised stays attached
            if reward.built_in and isinstance(error, RewardError):  # one of ours, which has said what it is about
                raise
            raise reward_error(reward, called[0], f"raised {_described(error)}") from error
    found = _of_group(reward, called, result) if whole else [result]
    return [checked(reward, rollout, one) for rollout, one in zip(called, found, strict=True)]


def _of_group(reward: Reward, called: Sequence[Rollout], result: object) -> list[object]:
    """One result a response. Raises RewardError for another number of them."""
    try:
        found = list(result)  # type: ignore[call-overload]
    except Exception:
        found = None
    if isinstance(result, (str, bytes, dict)) or found is None or len(found) != len(called):
        count = "" if found is None else f", {len(found)} results"
        what = f"returned {shown(result)}{count} for the {len(called)} responses of a group, not one each"
        raise reward_error(reward, called[0], what)
    return found


def _late(reward: Reward, rollout: Rollout) -> Result:
    """What a response gets that was not graded in time. Raises RewardError where that ends the scoring."""
    what = f"gave no answer within {reward.timeout_s:g} s (reward.timeout_s)"
    if reward.on_timeout == "error":
        raise reward_error(reward, rollout, what) from None
    return Result(Stopped()) if reward.on_timeout == "zero" else Result(ungraded=f"the reward {what}")


async def _timed(reward: Reward, what: str, action: Callable[[], Any]) -> None:
    """Awaits a part of a reward's lifetime. Raises RewardError."""
    try:
        await _within(_call(reward, action, is_async=True), reward.timeout_s)
    except TimeoutError:
        gone = f"{what} did not end within {reward.timeout_s:g} s (reward.timeout_s)"
        raise RewardError(f"reward {reward.name!r}: {gone}") from None
    except RewardError:
        raise
    except Exception as error:
        raise RewardError(f"reward {reward.name!r}: {what} raised {_described(error)}") from error


async def _within(action: Coroutine[Any, Any, Any], seconds: float | None) -> Any:
    """As ``asyncio.wait_for``, which waits for ever for what does not let itself be cancelled: a loop that tries again
    after whatever is raised. Such a task is forgotten, or ``asyncio.run`` would wait for it in its turn."""
    task = asyncio.create_task(action)
    try:
        done, _ = await asyncio.wait({task}, timeout=seconds)
        if done:
            return task.result()
        raise TimeoutError
    finally:
        if not task.done():
            task.cancel()
            await asyncio.wait({task}, timeout=CANCELLED_S)
        if not task.done():
            task._log_destroy_pending = False  # type: ignore[attr-defined]
            asyncio._unregister_task(task)
        elif not task.cancelled():
            task.exception()  # or asyncio prints it, of one that raised as it was cancelled


async def _call(reward: Reward, action: Callable[[], Any], is_async: bool) -> Any:
    owner = os.getpid()
    try:
        result = action() if is_async else await _in_thread(reward, action)
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


async def _in_thread(reward: Reward, action: Callable[[], Any]) -> Any:
    """Runs a plain function in a daemon thread: an executor's threads would be joined at exit, a stuck one for ever."""
    future: concurrent.futures.Future[tuple[Any, BaseException | None]] = concurrent.futures.Future()
    future.set_running_or_notify_cancel()
    owner = os.getpid()

    def run() -> None:
        result, raised = None, None
        try:
            result = action()
        except BaseException as error:  # carried over to the awaiting side, whatever it is
            raised = error
        finally:
            end_a_forked_child(owner, reward.name)
        future.set_result((result, raised))

    threading.Thread(target=run, name=f"reward-{reward.name}", daemon=True).start()
    result, raised = await asyncio.wrap_future(future)
    if raised is not None:
        raise raised
    return result


def _described(error: BaseException) -> str:
    return f"{type(error).__name__}: {error_text(error)}"


def _group(rollouts: Sequence[Rollout], results: Sequence[Result]) -> GroupRewards:
    per_token = any(isinstance(result.reward, TokenRewards) for result in results)
    rewards = [np.nan if result.ungraded else result.reward for result in results]
    scalars = [float(r.values.mean()) if isinstance(r, TokenRewards) else r for r in rewards]
    tokens = [
        reward.values if isinstance(reward, TokenRewards) else np.full(len(rollout.response_ids), reward)
        for rollout, reward in zip(rollouts, rewards, strict=True)
    ]
    return GroupRewards(
        np.asarray(scalars, dtype=np.float64),
        tuple(tokens) if per_token else None,
        stopped=sum(isinstance(result.reward, Stopped) for result in results),
        ungraded_G=tuple(r.ungraded for r in results) if any(r.ungraded for r in results) else (),
        components_G=tuple(r.components for r in results) if any(r.components for r in results) else (),
    )
