"""The dispatcher by itself: no server, no clock. Whatever happens, every prompt is sent once, or nobody is left."""

from __future__ import annotations

import asyncio
from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron_gspo.errors import NoServerError, RolloutError
from megatron_gspo.rollout.accounts import check_answered, check_complete
from megatron_gspo.rollout.desk import Desk
from megatron_gspo.rollout.dispatch import Dispatcher, Ticket, planned, shares
from tests.rollout.cases import prompt, rollout


def dispatcher(*urls: str, slots: int | None = None, limit: int | None = None) -> Dispatcher:
    made = Dispatcher(slots=slots, limit=limit)
    made.serve(urls)
    return made


def sent(made: Dispatcher) -> list[tuple[str, str]]:
    return [(ticket.prefix, url) for ticket, url in made.take()]


@given(
    counts=st.lists(st.integers(0, 40), min_size=1, max_size=9),
    servers=st.integers(1, 12),
)
def test_over_all_leaders_servers_get_the_same_number_of_prompts_but_for_one(counts: list[int], servers: int) -> None:
    urls = [f"s{index}" for index in range(servers)]
    homes = Counter(dict.fromkeys(urls, 0))
    for count, first in zip(counts, shares(counts), strict=True):
        homes.update(planned(count, urls, first))
    assert max(homes.values()) - min(homes.values()) <= 1
    assert sum(homes.values()) == sum(counts)


def test_a_plan_is_kept_while_servers_have_room_and_the_idle_take_from_the_longest_queue() -> None:
    made = dispatcher("a", "b", slots=1)
    for prefix, wish in (("p", "a"), ("q", "a"), ("r", "a"), ("s", "b")):
        made.put(Ticket(prefix, wish))
    assert sent(made) == [("p", "a"), ("s", "b")]
    made.done("b")
    assert sent(made) == [("q", "b")], "b has nothing of its own left"
    made.done("a")
    assert sent(made) == [("r", "a")]


def test_a_prefix_stays_with_its_server_until_that_is_lost() -> None:
    made = dispatcher("a", "b", "c")
    made.put(Ticket("p", "b"))
    made.put(Ticket("q"))
    assert sent(made) == [("q", "a"), ("p", "b")]
    for _ in range(3):
        made.put(Ticket("p", "c"))  # another turn of it, whatever a plan says
        assert sent(made) == [("p", "b")]
    made.lose("b")
    made.put(Ticket("p"))
    assert sent(made) == [("p", "c")], "the least loaded of those that are left"


def test_what_waits_for_a_lost_server_goes_to_others_before_what_came_later() -> None:
    made = dispatcher("a", "b", slots=1)
    for prefix, wish in (("p", "a"), ("q", "b"), ("r", "a"), ("s", "b")):
        made.put(Ticket(prefix, wish))
    assert sent(made) == [("p", "a"), ("q", "b")]
    assert made.lose("a") == []
    made.done("a")  # the one that was under way there has failed
    made.done("b")
    assert sent(made) == [("r", "b")]


def test_what_may_go_nowhere_is_handed_back_or_refused() -> None:
    made = dispatcher("a", "b", slots=0)
    waiting = Ticket("p", avoid=frozenset("b"))
    made.put(waiting)
    assert made.lose("a") == [waiting]
    with pytest.raises(LookupError, match="no server is left for 'q'"):
        made.put(Ticket("q", avoid=frozenset("b")))


@given(st.data())
def test_whatever_is_lost_and_whenever_each_prompt_is_sent_once_until_it_is_moved(data: st.DataObject) -> None:
    urls = [f"s{index}" for index in range(data.draw(st.integers(1, 4)))]
    prompts = data.draw(st.integers(0, 12))
    slots = data.draw(st.integers(1, 3))
    limit = data.draw(st.none() | st.integers(1, 5))
    made = dispatcher(*urls, slots=slots, limit=limit)
    plan = planned(prompts, urls, data.draw(st.integers(0, 3)))
    for number in range(prompts):
        made.put(Ticket(str(number), plan[number]))
    under_way: list[tuple[Ticket, str]] = []
    answered: list[str] = []
    stranded: list[Ticket] = []
    while True:
        under_way += made.take()
        at = Counter(url for _, url in under_way)
        assert max(at.values(), default=0) <= slots and len(under_way) <= (limit or len(under_way))
        if not under_way:
            break
        ticket, url = under_way.pop(data.draw(st.integers(0, len(under_way) - 1)))
        if url not in made.up or data.draw(st.integers(0, 3)) == 0:  # it fails there
            stranded += made.lose(url)
            made.done(url)
            try:
                made.put(Ticket(ticket.prefix))
            except LookupError:
                stranded.append(ticket)
        else:
            made.done(url)
            answered.append(ticket.prefix)
    assert sorted(answered + [ticket.prefix for ticket in stranded]) == sorted(map(str, range(prompts)))
    assert not stranded or made.up == ()


def test_a_desk_gives_slots_back_when_whoever_waits_is_cancelled() -> None:
    async def main() -> list[str]:
        desk = Desk(dispatcher(slots=1), ["a"], {})
        served: list[str] = []

        async def one(name: str, seconds: float = 0.0) -> None:
            async with desk.server(name) as url:
                await asyncio.sleep(seconds)
                served.append(name + url)

        first = asyncio.create_task(one("p", 60))
        waiting = asyncio.create_task(one("q"))
        granted = asyncio.create_task(one("r"))
        await asyncio.sleep(0.01)
        waiting.cancel()
        first.cancel()
        await asyncio.sleep(0)
        await asyncio.wait_for(granted, 5)
        await asyncio.wait_for(one("s"), 5)
        return served

    assert asyncio.run(main()) == ["ra", "sa"]


def test_whoever_waits_at_a_desk_without_servers_hears_why() -> None:
    async def main() -> None:
        desk = Desk(dispatcher(slots=1), ["a", "b"], {})
        async with desk.server("p"), desk.server("q"):
            waiting = asyncio.create_task(desk.server("r").__aenter__())
            await asyncio.sleep(0)
            desk.lose("a", "a is silent")
            desk.lose("b", "b has died")
            with pytest.raises(NoServerError, match="a is silent; b has died"):
                await waiting

    asyncio.run(main())


def test_a_prompt_without_its_responses_or_with_one_twice_is_named() -> None:
    prompts = {0: prompt()}
    both = [rollout(sample=0), rollout(sample=1)]
    check_complete(prompts, {0: both}, 2)
    for group in (both[:1], [both[0], both[0]], [*both, both[1]], []):
        with pytest.raises(RolloutError, match=r"prompt 'p' has responses \[.*\], and each of 2 was to come once"):
            check_complete(prompts, {0: group}, 2)


def test_a_prompt_that_no_leader_has_or_two_have_is_named() -> None:
    prompts = {0: prompt("a"), 1: prompt("b")}
    check_answered(prompts, [[0], [1]])
    with pytest.raises(RolloutError, match=r"prompt 'b' \(place 1 of the outer step\): no leader has responses"):
        check_answered(prompts, [[0], []])
    with pytest.raises(RolloutError, match=r"prompt 'a' .*: 2 leaders have responses"):
        check_answered(prompts, [[0], [1, 0]])
