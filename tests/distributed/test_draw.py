"""The prompts of a step where some are bad: the same on every rank, at any layout, and after a resume."""

from __future__ import annotations

from typing import Any

import pytest
import torch.distributed as dist
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_gspo.data.cursor import PromptCursor
from megatron_gspo.errors import DataError
from megatron_gspo.train.draw import Drawn, skip_notes, take_usable
from tests.pool import RankError, RankPool

pytestmark = pytest.mark.distributed

MANY, STEP = 23, 6
BAD = {3, 4, 11, 22}
UNGRADABLE = {7, 19}
"""As bad, but only a judge on one rank knows."""


def take(cursor: PromptCursor, share: str, **changes: Any) -> Drawn[int]:
    rank, world = dist.get_rank(), dist.get_world_size()
    mine = range(STEP) if share == "all" else range(rank, STEP, world)

    def make(index: int) -> int:
        if index in changes.get("bad", BAD):
            raise DataError(f"x.jsonl, line {index + 1}: bad")
        return index

    def judge(drawn: Any) -> dict[int, str]:
        own = {position: index for position, (index, _) in drawn.items() if position % world == rank}
        return {position: f"line {index + 1}: ungradable" for position, index in own.items() if index in UNGRADABLE}

    group = dist.group.WORLD
    assert group is not None
    skip_bad = changes.get("skip_bad", True)
    return take_usable(cursor, STEP, make, group, mine=mine, skip_bad=skip_bad, judge=judge)


def steps(count: int, share: str, resume_at: int) -> list[tuple[dict[int, int], tuple[str, ...]]]:
    """What each step draws; before step ``resume_at`` the cursor is a new one, brought to the old one's state."""
    cursor, drawn = PromptCursor(MANY, seed=2), []
    for step in range(count):
        if step == resume_at:
            state = cursor.state_dict()
            cursor = PromptCursor(MANY, seed=2)
            cursor.load_state_dict(state)
        found = take(cursor, share)
        drawn.append((found.items, found.skipped))
    return drawn


def expected(count: int) -> list[list[int]]:
    """The same, written down separately: bad ones are replaced in order of their positions by what comes next."""
    cursor, drawn = PromptCursor(MANY, seed=2), []
    for _ in range(count):
        indices = cursor.take(STEP)
        while bad := [p for p, index in enumerate(indices) if index in BAD | UNGRADABLE]:
            for position, index in zip(bad, cursor.take(len(bad)), strict=True):
                indices[position] = index
        drawn.append(indices)
    return drawn


@pytest.mark.parametrize("share", ["all", "own"])
def test_the_next_of_the_order_stands_in_for_a_bad_one_the_same_on_every_rank_and_after_a_resume(
    ranks: RankPool, share: str
) -> None:
    first, second = ranks.run(2, steps, 9, share, 4)
    (alone,) = ranks.run(1, steps, 9, share, -1)
    assert [[items[p] for p in range(STEP)] for items, _ in alone] == expected(9)
    assert not {index for indices in expected(9) for index in indices} & (BAD | UNGRADABLE)
    for step in range(9):
        parts = [first[step][0], second[step][0]]
        assert parts[0] | parts[1] == alone[step][0]
        assert share == "own" or parts[0] == parts[1]
        assert first[step][1] == second[step][1] == alone[step][1]
    assert sum(len(skipped) for _, skipped in alone) >= 12, "two rounds of the order meet each bad one twice"


def failing(changes: dict[str, Any]) -> None:
    take(PromptCursor(MANY, seed=2), "own", **changes)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"skip_bad": False}, r"DataError: (x.jsonl, )?line \d+: (bad|ungradable)"),
        ({"bad": set(range(MANY))}, r"DataError: \d+ prompts in a row are unusable, the first: "),
    ],
)
def test_without_skip_bad_and_without_good_ones_every_rank_ends(
    ranks: RankPool, changes: dict[str, Any], said: str
) -> None:
    with pytest.raises(RankError, match=said):
        ranks.run(2, failing, changes)


@settings(max_examples=30)
@given(st.lists(st.text(min_size=1), max_size=3))
def test_a_note_names_the_step_as_people_count_and_the_first_of_the_bad(skipped: list[str]) -> None:
    notes = skip_notes(4, skipped)
    assert len(notes) == bool(skipped)
    if skipped:
        assert notes[0].startswith(f"step 5: skipped, and the next drawn instead: {skipped[0]}")
        assert notes[0].endswith(f" (and {len(skipped) - 1} more)") or len(skipped) == 1
