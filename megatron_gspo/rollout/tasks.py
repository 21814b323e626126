"""Several coroutines at once, and what becomes of a failure among them."""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine, Iterable, Sequence
from typing import Any, TypeVar

T = TypeVar("T")


async def first_result(tasks: Sequence[asyncio.Task[T]]) -> T:
    """The result of the task that has one first. The first task's failure is a failure, those of others are not."""
    waiting = set(tasks)
    while waiting and not tasks[0].done():
        done, waiting = await asyncio.wait(waiting, return_when=asyncio.FIRST_COMPLETED)
        for task in done - {tasks[0]}:
            if task.exception() is None:
                return task.result()
    return tasks[0].result()


async def gather(coroutines: Iterable[Coroutine[Any, Any, T]]) -> list[T]:
    """Every result, in order. The first failure cancels the rest and is raised as itself, not in a group."""
    try:
        async with asyncio.TaskGroup() as group:
            tasks = [group.create_task(coroutine) for coroutine in coroutines]
    except BaseExceptionGroup as failures:
        raise failures.exceptions[0] from None
    return [task.result() for task in tasks]
