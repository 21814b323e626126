"""A draw whose servers die, hang, are late, or come back without weights: every prompt is answered once."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable
from typing import Any

import aiohttp
import pytest
from aiohttp import web
from aiohttp.test_utils import TestServer

from megatron_gspo.config import RolloutConfig
from megatron_gspo.errors import EngineUnavailableError, NoServerError
from megatron_gspo.rollout.dispatch import shares
from megatron_gspo.rollout.engine import Sampling, make_engine
from megatron_gspo.rollout.sglang import client as sglang_client
from megatron_gspo.types import Prompt, ServerAccess
from tests.rollout.cases import STOP, prompt, reply

Fault = Callable[[web.Request, int], Awaitable[web.StreamResponse | None]]
"""(request, requests before it) -> an answer in place of a sound one, or None."""
ONE = Sampling(1, 1.0, 4, (STOP,), seed=1)
ACCESS = ServerAccess("", "4f1c09ab")
OURS = ACCESS.version_name(7)


@pytest.fixture(autouse=True)
def _no_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sglang_client, "FIRST_PAUSE_S", 0.001)


async def nothing(request: web.Request, count: int) -> None:
    return None


def after(requests: int, fault: Fault) -> Fault:
    async def answer(request: web.Request, count: int) -> web.StreamResponse | None:
        return None if count < requests else await fault(request, count)

    return answer


async def hangs_up(request: web.Request, count: int) -> web.StreamResponse:
    assert request.transport is not None
    request.transport.close()
    return web.Response()


async def hangs(request: web.Request, count: int) -> web.StreamResponse:
    await asyncio.sleep(60)
    return web.Response()


class Server:
    """Answers with the prompt's own first token: it is the same whoever answers. ``asked``: prompts by their tokens."""

    def __init__(self, fault: Fault = nothing, *, version: str = OURS, hears: bool = True) -> None:
        self.fault, self.version, self.hears = fault, version, hears
        self.asked: list[int] = []
        self.aborted: list[str] = []
        self.sent: list[str] = []
        self.answered = 0

    async def generate(self, request: web.Request) -> web.StreamResponse:
        body = await request.json()
        single = isinstance(body["rid"], str)
        if single:
            body |= {"rid": [body["rid"]], "input_ids": [body["input_ids"]]}
        self.asked.append(body["input_ids"][0][0])
        self.sent += body["rid"]
        if (strange := await self.fault(request, len(self.asked) - 1)) is not None:
            return strange
        self.answered += 1
        answers = []
        for rid, ids in zip(body["rid"], body["input_ids"], strict=True):
            one = reply([ids[0], STOP], version=self.version, prompt_tokens=len(ids))
            one["meta_info"]["id"] = rid
            answers.append(one)
        return web.json_response(answers[0] if single else answers)

    async def abort(self, request: web.Request) -> web.Response:
        self.aborted.append((await request.json())["rid"])
        return web.Response()

    async def info(self, request: web.Request) -> web.StreamResponse:
        return web.json_response({"version": "0.5.23", "enable_deterministic_inference": True})

    async def model(self, request: web.Request) -> web.StreamResponse:
        return web.json_response({}) if self.hears else await hangs(request, 0)

    def app(self) -> web.Application:
        app = web.Application()
        app.router.add_post("/generate", self.generate)
        app.router.add_post("/abort_request", self.abort)
        app.router.add_get("/server_info", self.info)
        app.router.add_get("/model_info", self.model)
        return app


class Outcome:
    """What a draw gave: ``firsts`` by prompt, and the engine."""

    def __init__(self, groups: Any, engine: Any, seconds: float) -> None:
        self.firsts = [int(group[0].response_ids[0]) for group in groups]
        self.lost, self.moved, self.resubmitted = dict(engine.lost), engine.moved, engine.resubmitted
        self.seconds = seconds


def draw(*servers: Server, count: int = 12, leaders: int = 1, router: Any = None, **settings: Any) -> list[Outcome]:
    """All leaders at once, each with its share of ``count`` prompts."""

    async def leader(urls: list[str], prompts: list[Prompt], first: int, **more: Any) -> Outcome:
        config = RolloutConfig(**{"retries": 1, "servers": urls, **settings, **more})
        engine = make_engine(urls, config, vocab_size=64, access=ACCESS, leaders=leaders)
        begin = time.monotonic()
        async with engine:
            groups = await engine.rollout_groups(prompts, ONE, weight_version=7, first=first)
        return Outcome(groups, engine, time.monotonic() - begin)

    async def main() -> list[Outcome]:
        serving = [TestServer(server.app()) for server in servers]
        for each in serving:
            await each.start_server()
        urls = [str(each.make_url("/")).rstrip("/") for each in serving]
        more = {}
        if router is not None:
            front = TestServer(router(urls))
            await front.start_server()
            serving.append(front)
            more["router"] = str(front.make_url("/"))
        own = [[prompt(str(i), (i,)) for i in range(10 + rank, 10 + count, leaders)] for rank in range(leaders)]
        try:
            async with asyncio.TaskGroup() as group:
                firsts = shares([len(prompts) for prompts in own])
                drawn = [
                    group.create_task(leader(urls, prompts, first, **more))
                    for prompts, first in zip(own, firsts, strict=True)
                ]
            return [task.result() for task in drawn]
        except BaseExceptionGroup as failures:
            raise failures.exceptions[0] from None
        finally:
            for each in serving:
                await each.close()

    return asyncio.run(main())


@pytest.mark.parametrize(("leaders", "servers"), [(1, 3), (2, 2), (3, 2), (2, 4), (4, 3)])
def test_leaders_together_ask_every_server_for_as_much(leaders: int, servers: int) -> None:
    each = [Server() for _ in range(servers)]
    outcomes = draw(*each, leaders=leaders)
    assert [outcome.firsts for outcome in outcomes] == [[*range(10 + rank, 22, leaders)] for rank in range(leaders)]
    assert [len(server.asked) for server in each] == [12 // servers] * servers


@pytest.mark.parametrize("fault", [hangs_up, hangs])
def test_what_a_dead_or_hung_server_had_is_answered_by_others(fault: Fault) -> None:
    bad, sound = Server(after(2, fault)), Server()
    (outcome,) = draw(bad, sound, timeout_s=2.0)
    assert outcome.firsts == [*range(10, 22)]
    assert len(outcome.lost) == 1 and outcome.moved == 4
    assert sound.answered == 10 and bad.answered == 2


def test_a_server_that_nobody_is_behind_is_given_up_before_its_time() -> None:
    bad, sound = Server(hangs, hears=False), Server()
    (outcome,) = draw(bad, sound, health_every_s=0.1, timeout_s=60)
    assert outcome.firsts == [*range(10, 22)] and outcome.seconds < 40
    (why,) = outcome.lost.values()
    assert "takes no request: 3 in a row were not answered in 0.1 s (rollout.health_every_s)" in why


def test_a_server_that_hears_is_waited_for_until_its_time_is_over() -> None:
    late = Server(lambda request, count: asyncio.sleep(2.0))  # type: ignore[arg-type, return-value]
    (outcome,) = draw(late, health_every_s=0.3, timeout_s=60)
    assert outcome.firsts == [*range(10, 22)] and not outcome.lost


@pytest.mark.parametrize("version", ["default", "6", f"{OURS}-incomplete"])
def test_a_server_that_was_started_again_gets_nothing_more_and_its_answers_do_not_count(version: str) -> None:
    stale, sound = Server(version=version), Server()
    (outcome,) = draw(stale, sound)
    assert outcome.firsts == [*range(10, 22)] and sound.answered == 12
    (why,) = outcome.lost.values()
    assert "none of this run's" in why


def test_without_any_server_a_draw_says_why_of_each() -> None:
    with pytest.raises(NoServerError) as caught:
        draw(Server(after(3, hangs_up)), Server(version="default"))
    assert "failed 2 times" in str(caught.value) and "none of this run's" in str(caught.value)


def test_the_loss_of_a_server_ends_the_draw_where_that_is_asked_for() -> None:
    with pytest.raises(EngineUnavailableError, match="failed 2 times") as caught:
        draw(Server(hangs_up), Server(), on_server_loss="error")
    assert not isinstance(caught.value, NoServerError)


def test_a_late_server_does_not_hold_the_others_answers_and_is_told_to_stop() -> None:
    late, sound = Server(hangs), Server()
    (outcome,) = draw(late, sound, resubmit_after_s=1.0, timeout_s=60)
    assert outcome.firsts == [*range(10, 22)] and outcome.seconds < 40
    assert not outcome.lost and outcome.resubmitted == 6
    assert sorted(late.aborted) == sorted(late.sent) and len(late.sent) == 6
    assert sound.answered == 12 and sound.aborted == []


def test_a_request_that_was_sent_twice_is_counted_once_whoever_is_first() -> None:
    asked: set[int] = set()

    async def late(request: web.Request, count: int) -> None:
        first = (await request.json())["input_ids"][0][0]
        again = first in asked
        asked.add(first)
        await asyncio.sleep(60 if again else 2.0)  # of two answers at once both may count as the first

    one, other = Server(late), Server(late)
    (outcome,) = draw(one, other, resubmit_after_s=0.1)
    assert outcome.firsts == [*range(10, 22)] and outcome.resubmitted == 12
    assert len(one.aborted) + len(other.aborted) == 12


def test_a_resubmission_to_a_server_that_dies_leaves_the_first_request_alone() -> None:
    async def late(request: web.Request, count: int) -> None:
        await asyncio.sleep(3.0)

    slow, dying = Server(late), Server(after(6, hangs_up))
    (outcome,) = draw(slow, dying, resubmit_after_s=1.0)  # the other's own six are answered by then
    assert outcome.firsts == [*range(10, 22)]
    assert len(outcome.lost) == 1 and slow.answered == 6


def proxy(urls: list[str]) -> web.Application:
    """A router: requests go to the servers in turn. As SGLang's, it takes one response a request."""
    turn = iter(range(10**6))

    async def forward(request: web.Request) -> web.Response:
        body = await request.read()
        assert isinstance((await request.json())["rid"], str)
        url = urls[next(turn) % len(urls)] + request.path
        async with aiohttp.ClientSession() as session, session.post(url, data=body) as answer:
            return web.Response(body=await answer.read(), status=answer.status)

    app = web.Application()
    app.router.add_post("/generate", forward)
    return app


def test_requests_go_through_a_router_and_questions_do_not() -> None:
    one, other = Server(), Server()
    (outcome,) = draw(one, other, router=proxy)
    assert outcome.firsts == [*range(10, 22)]
    assert len(one.asked) == len(other.asked) == 6


def test_what_a_router_had_from_a_server_without_weights_does_not_count() -> None:
    with pytest.raises(NoServerError, match="none of this run's"):
        draw(Server(), Server(version="default"), router=proxy)


def test_a_router_needs_the_names_of_its_servers() -> None:
    with pytest.raises(ValueError, match=r"router: name the servers behind it in rollout\.servers"):
        RolloutConfig(router="http://router:1")
