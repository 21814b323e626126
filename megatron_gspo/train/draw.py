"""The prompts of a step: the next of the order, and for a bad one the next after them, the same on every rank."""

from __future__ import annotations

import functools
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Generic, TypeVar

import torch.distributed as dist

from megatron_gspo.data.cursor import PromptOrder
from megatron_gspo.errors import DataError
from megatron_gspo.parallel.exchange import gather_objects, together

T = TypeVar("T")
Judge = Callable[[Mapping[int, tuple[int, T]]], Mapping[int, str]]
"""Position -> (index among the prompts, item), to position -> what is wrong, of some of them."""


@dataclass(frozen=True)
class Drawn(Generic[T]):
    """What a step works on."""

    items: dict[int, T]
    """Position in the step -> item; of the positions that this rank asked for."""
    skipped: tuple[str, ...]
    """What was wrong with each bad one that another stands in for."""
    indices: dict[int, int]
    """Position in the step -> index among the prompts, of all positions."""


def take_usable(
    cursor: PromptOrder,
    count: int,
    make: Callable[[int], T],
    world: dist.ProcessGroup,
    *,
    mine: Collection[int],
    skip_bad: bool,
    judge: Judge[T] | None = None,
) -> Drawn[T]:
    """Takes ``count`` places of the order and makes this rank's items of them. Collective.

    A position whose item any rank finds bad (``make`` raises DataError, or ``judge`` objects) gets the next place of
    the order instead (of a mixture, the next of its source), in order of positions, until all are good. So the items
    are a function of the file and of the cursor, which stands behind the last place taken, whatever the ranks.

    Args:
        make: index among the prompts -> item.
        mine: positions in the step that this rank makes; together the ranks make all.
        judge: looks at items that this rank has made; empty on ranks that leave it to others.
    Raises:
        DataError: a bad item without ``skip_bad``, or no good ones in a whole round of the order.
    """
    items: dict[int, T] = {}
    skipped: list[str] = []
    pending = dict(enumerate(cursor.take(count)))
    indices = dict(pending)
    while pending:
        problems = _of_all_ranks(functools.partial(_make, pending, mine, make, judge, items), world)
        if problems and not skip_bad:
            raise DataError(problems[min(problems)])
        skipped += [problems[position] for position in sorted(problems)]
        if len(skipped) > cursor.num_prompts:
            raise DataError(f"{len(skipped)} prompts in a row are unusable, the first: {skipped[0]}")
        bad = sorted(problems)
        pending = dict(zip(bad, cursor.instead([indices[position] for position in bad]), strict=True))
        indices |= pending
    return Drawn(items, tuple(skipped), indices)


def skip_notes(step: int, skipped: Sequence[str]) -> list[str]:
    """One line, if any were: "step 4: 1 prompt skipped: train.jsonl, line 13: ..."."""
    if not skipped:
        return []
    more = f" (and {len(skipped) - 1} more)" if len(skipped) > 1 else ""
    return [f"step {step + 1}: skipped, and the next drawn instead: {skipped[0]}{more}"]


def _make(
    todo: Mapping[int, int],
    mine: Collection[int],
    make: Callable[[int], T],
    judge: Judge[T] | None,
    items: dict[int, T],
) -> dict[int, str]:
    """Fills ``items``; what was wrong, by position."""
    problems: dict[int, str] = {}
    made: dict[int, T] = {}
    for position, index in todo.items():
        if position in mine:
            try:
                made[position] = make(index)
            except DataError as error:
                problems[position] = str(error)
    items |= made
    judged = judge({position: (todo[position], item) for position, item in made.items()}) if judge else {}
    return problems | dict(judged)


def _of_all_ranks(action: Callable[[], dict[int, str]], world: dist.ProcessGroup) -> dict[int, str]:
    """The union of every rank's problems; an error of any rank is raised on all."""
    parts = gather_objects(together(action, world), world)
    return {position: text for part in reversed(parts) for position, text in part.items()}
