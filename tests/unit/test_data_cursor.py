"""The order of prompts: each once an epoch, the same on every rank, resumable anywhere."""

from __future__ import annotations

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron_gspo.data import PromptCursor
from megatron_gspo.errors import DataError


@given(num=st.integers(1, 40), seed=st.integers(-5, 2**70), takes=st.lists(st.integers(0, 25), max_size=12))
def test_every_epoch_visits_each_prompt_exactly_once(num: int, seed: int, takes: list[int]) -> None:
    cursor = PromptCursor(num, seed)
    visited = [index for n in takes for index in cursor.take(n)]
    assert len(visited) == sum(takes)
    for start in range(0, len(visited) - num + 1, num):
        assert sorted(visited[start : start + num]) == list(range(num))
    tail = visited[len(visited) // num * num :]
    assert len(set(tail)) == len(tail)


@given(cuts=st.lists(st.integers(0, 9), max_size=8))
def test_the_order_does_not_depend_on_how_it_is_cut_into_batches(cuts: list[int]) -> None:
    whole, cut = PromptCursor(7, seed=3), PromptCursor(7, seed=3)
    assert [i for n in cuts for i in cut.take(n)] == whole.take(sum(cuts))


@pytest.mark.parametrize("before", [0, 1, 9, 10, 11, 25])
def test_a_resumed_cursor_continues_where_it_was_saved(before: int) -> None:
    cursor = PromptCursor(10, seed=1)
    cursor.take(before)
    resumed = PromptCursor(10, seed=1)
    resumed.load_state_dict(json.loads(json.dumps(cursor.state_dict())))
    assert resumed.take(17) == cursor.take(17)


def test_epochs_and_seeds_have_orders_of_their_own() -> None:
    cursor = PromptCursor(50, seed=0)
    first, second = cursor.take(50), cursor.take(50)
    assert first != second
    assert PromptCursor(50, seed=1).take(50) != first
    assert PromptCursor(50, seed=0).take(50) == first


def test_the_order_of_a_seed_is_written_in_stone() -> None:
    """A checkpoint resumed under a newer numpy must walk on in the same order."""
    assert PromptCursor(8, seed=0).take(8) == [2, 4, 3, 6, 5, 0, 1, 7]


def test_without_shuffling_prompts_come_in_file_order() -> None:
    assert PromptCursor(3, seed=5, shuffle=False).take(7) == [0, 1, 2, 0, 1, 2, 0]


@pytest.mark.parametrize(("other", "name"), [((11, 1), "num_prompts"), ((10, 2), "seed"), ((10, 1, False), "shuffle")])
def test_a_state_of_other_prompts_is_refused(other: tuple[int, ...], name: str) -> None:
    state = PromptCursor(*other).state_dict()
    with pytest.raises(DataError, match=f"cursor has {name} = {state[name]}"):
        PromptCursor(10, seed=1).load_state_dict(state)


def test_no_prompts_are_an_error() -> None:
    with pytest.raises(DataError, match="num_prompts = 0"):
        PromptCursor(0, seed=1)
