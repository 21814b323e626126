"""The client against a server that fails on demand. (What a real server does is in test_sglang.py.)"""

from __future__ import annotations

import asyncio
import contextlib
import gzip
import itertools
import json
from collections import Counter
from collections.abc import Awaitable, Callable
from typing import Any

import pytest
from aiohttp import web
from aiohttp.test_utils import TestServer

from megatron_gspo.config import RolloutConfig
from megatron_gspo.errors import (
    ConfigError,
    DataError,
    EngineReplyError,
    EngineUnavailableError,
    RolloutError,
    SyncError,
)
from megatron_gspo.rollout.engine import Sampling, make_engine, rollout_seed
from megatron_gspo.rollout.sglang import client as sglang_client
from megatron_gspo.rollout.sglang.control import Servers
from megatron_gspo.types import OPEN, Prompt, Rollout, ServerAccess
from tests.rollout.cases import REQUEST, SAMPLING, STOP, prompt, reply

Answer = Callable[[web.Request, dict[str, Any], int], Awaitable[web.StreamResponse]]
"""(request, its body, how often this very body came before) -> answer."""
SOUND = reply([9, 8, STOP])
JSON = "application/json"


@pytest.fixture(autouse=True)
def _no_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sglang_client, "FIRST_PAUSE_S", 0.001)


class StandIn:
    """A server whose /generate is ``answer``; it keeps the bodies it was sent."""

    def __init__(self, answer: Answer, deterministic: bool = True, info: bytes = b"") -> None:
        self._info = info
        self.bodies: list[dict[str, Any]] = []
        self.request_ids: list[str] = []
        self._seen: Counter[str] = Counter()
        self._answer = answer
        self._deterministic = deterministic
        self.running = self.most_running = self.requests = 0
        self.work: Callable[[], int] | None = None

    async def generate(self, request: web.Request) -> web.StreamResponse:
        """Answers each response of a request; what is no reply to one of them answers all."""
        body = await request.json()
        ids, prompts, parameters = body.pop("rid"), body.pop("input_ids"), body.pop("sampling_params")
        self.requests += 1
        singles = [
            body | {"input_ids": prompt, "sampling_params": own}
            for prompt, own in zip(prompts, parameters, strict=True)
        ]
        answers = await asyncio.gather(*(self._one(request, *each) for each in zip(ids, singles, strict=True)))
        for answer in answers:
            if not isinstance(answer, web.Response) or answer.status != 200 or answer.content_type != JSON:
                return answer
        return web.Response(text=f"[{','.join(answer.text or '' for answer in answers)}]", content_type=JSON)

    async def _one(self, request: web.Request, rid: str, body: dict[str, Any]) -> web.StreamResponse:
        self.request_ids.append(rid)
        self.bodies.append(body)
        key = repr(body)
        self._seen[key] += 1
        self.running += 1
        self.most_running = max(self.running, self.most_running)
        try:
            return bearing(await self._answer(request, body, self._seen[key] - 1), rid)
        finally:
            self.running -= 1

    async def loads(self, request: web.Request) -> web.Response:
        if self.work is None:
            return web.Response(status=404)
        return web.json_response({"loads": [{"num_used_tokens": self.work()}]})

    async def server_info(self, request: web.Request) -> web.Response:
        if self._info:
            return web.Response(body=self._info)
        return web.json_response({"version": "0.5.23", "enable_deterministic_inference": self._deterministic})

    def serve(self) -> TestServer:
        app = web.Application()
        app.router.add_post("/generate", self.generate)
        app.router.add_get("/server_info", self.server_info)
        app.router.add_get("/v1/loads", self.loads)
        return TestServer(app)


def bearing(response: web.StreamResponse, rid: str) -> web.StreamResponse:
    """The answer with the id of its request, if it is a reply that bears the one of ``reply``."""
    if isinstance(response, web.Response) and isinstance(response.body, bytes):
        response.body = response.body.replace(json.dumps(REQUEST).encode(), json.dumps(rid).encode())
    return response


def draw(
    *stand_ins: StandIn,
    prompts: tuple[Prompt, ...] = (prompt(),),
    sampling: Sampling = SAMPLING,
    progress: Any = None,
    access: ServerAccess = OPEN,
    **settings: Any,
) -> list[list[Rollout]]:
    async def main() -> list[list[Rollout]]:
        servers = [stand_in.serve() for stand_in in stand_ins]
        for server in servers:
            await server.start_server()
        try:
            urls = [str(server.make_url("/")) for server in servers]
            async with make_engine(urls, RolloutConfig(**settings), vocab_size=64, access=access) as engine:
                return await engine.rollout_groups(prompts, sampling, weight_version=7, progress=progress)
        finally:
            for server in servers:
                await server.close()

    return asyncio.run(main())


def always(answer: Any, status: int = 200) -> Answer:
    async def respond(request: web.Request, body: dict[str, Any], seen: int) -> web.Response:
        return web.json_response(answer, status=status)

    return respond


def at_first(failure: Answer, times: int, then: Any = SOUND) -> Answer:
    async def respond(request: web.Request, body: dict[str, Any], seen: int) -> web.StreamResponse:
        return await failure(request, body, seen) if seen < times else web.json_response(then)

    return respond


async def drop_connection(request: web.Request, body: dict[str, Any], seen: int) -> web.StreamResponse:
    assert request.transport is not None
    request.transport.close()
    return web.Response()


async def half_a_body(request: web.Request, body: dict[str, Any], seen: int) -> web.StreamResponse:
    response = web.StreamResponse(headers={"Content-Length": "1000"})
    await response.prepare(request)
    await response.write(b'{"output_ids": [9, 8')
    assert request.transport is not None
    request.transport.close()
    return response


async def half_json(request: web.Request, body: dict[str, Any], seen: int) -> web.StreamResponse:
    return web.Response(text='{"output_ids": [9, 8')


FAILURES = {
    "503": always({"error": "busy"}, status=503),
    "dropped connection": drop_connection,
    "half a body": half_a_body,
}


@pytest.mark.parametrize("failure", FAILURES)
def test_a_passing_failure_is_tried_again_with_the_same_request(failure: str) -> None:
    stand_in = StandIn(at_first(FAILURES[failure], times=2))
    [group] = draw(stand_in, sampling=Sampling(2, 1.0, 4, (STOP,), seed=1), retries=2)
    assert [rollout.response_ids.tolist() for rollout in group] == [[9, 8, STOP]] * 2
    assert len(stand_in.bodies) == 6
    assert len({body["sampling_params"]["sampling_seed"] for body in stand_in.bodies}) == 2


@pytest.mark.parametrize(
    ("failure", "last"), [("503", "HTTP 503.*busy"), ("dropped connection", "Disconnected"), ("half a body", "Payload")]
)
def test_a_lasting_failure_names_the_server_and_the_last_cause(failure: str, last: str) -> None:
    stand_in = StandIn(FAILURES[failure])
    with pytest.raises(
        EngineUnavailableError, match=rf"(?s)http://127.0.0.1:\d+/generate failed 3 times, at last with .*{last}"
    ):
        draw(stand_in, sampling=Sampling(1, 1.0, 4, (STOP,)), retries=2)
    assert len(stand_in.bodies) == 3


def test_a_refusal_is_shown_in_the_servers_words_and_not_repeated() -> None:
    stand_in = StandIn(always({"error": {"message": "The input (600 tokens) is longer"}}, status=400))
    with pytest.raises(RolloutError, match=r"HTTP 400\): The input \(600 tokens\) is longer"):
        draw(stand_in, sampling=Sampling(1, 1.0, 4, (STOP,)))
    assert len(stand_in.bodies) == 1


def test_a_server_that_does_not_answer_in_time_is_given_up_without_asking_again() -> None:
    async def slow(request: web.Request, body: dict[str, Any], seen: int) -> web.Response:
        await asyncio.sleep(60)
        return web.json_response(SOUND)

    stand_in = StandIn(slow)
    with pytest.raises(EngineUnavailableError, match=r"did not answer within rollout\.timeout_s = 0\.2 s"):
        draw(stand_in, sampling=Sampling(1, 1.0, 4, (STOP,)), timeout_s=0.2)
    assert len(stand_in.bodies) == 1


def test_waiting_in_the_servers_queue_is_no_silence() -> None:
    queue = asyncio.Lock()

    async def one_at_a_time(request: web.Request, body: dict[str, Any], seen: int) -> web.Response:
        async with queue:
            await asyncio.sleep(0.1)
            return web.json_response(SOUND)

    prompts = tuple(prompt(str(i)) for i in range(40))
    groups = draw(StandIn(one_at_a_time), prompts=prompts, sampling=Sampling(1, 1.0, 4, (STOP,)), timeout_s=2.0)
    assert [len(group) for group in groups] == [1] * 40  # the last one has waited twice as long as the limit


def test_a_response_that_takes_longer_than_the_limit_is_waited_for_while_tokens_are_made() -> None:
    def after(seconds: float) -> Answer:
        async def long(request: web.Request, body: dict[str, Any], seen: int) -> web.Response:
            await asyncio.sleep(seconds)
            return web.json_response(SOUND)

        return long

    one = Sampling(1, 1.0, 4, (STOP,))
    working = StandIn(after(1.5))
    working.work = itertools.count().__next__
    assert draw(working, sampling=one, timeout_s=0.4)[0][0].response_ids.tolist() == [9, 8, STOP]
    for work in (lambda: 7, None):  # tokens are held and none is made; a server that does not say
        idle = StandIn(after(60.0))
        idle.work = work
        with pytest.raises(
            EngineUnavailableError, match=r"timeout_s = 0\.4 s, answered no other request, and generated"
        ):
            draw(idle, sampling=one, timeout_s=0.4)


def test_a_group_is_one_request_and_only_what_was_aborted_is_drawn_again() -> None:
    async def second_is_aborted(request: web.Request, body: dict[str, Any], seen: int) -> web.Response:
        again = body["sampling_params"]["sampling_seed"] == seeds[1] and not seen
        return web.json_response(reply([9], "abort") if again else SOUND)

    four = Sampling(4, 1.0, 4, (STOP,), seed=1)
    seeds = [rollout_seed(1, 0, "p", sample) for sample in range(4)]
    stand_in = StandIn(second_is_aborted)
    [group] = draw(stand_in, sampling=four)
    assert [(rollout.sample, rollout.finish_reason) for rollout in group] == [(i, "stop") for i in range(4)]
    assert stand_in.requests == 2
    assert [body["sampling_params"]["sampling_seed"] for body in stand_in.bodies] == [*seeds, seeds[1]]


def test_a_list_of_another_length_is_no_reply() -> None:
    async def short(request: web.Request, body: dict[str, Any], seen: int) -> web.StreamResponse:
        return web.Response(text="[]")

    with pytest.raises(EngineReplyError, match=r"127.0.0.1:\d+: 2 responses were asked for, and it sent \[\]"):
        draw(StandIn(short))


def test_a_broken_reply_is_an_error_at_once_and_names_the_server() -> None:
    stand_in = StandIn(half_json)
    with pytest.raises(EngineReplyError, match=r'127.0.0.1:\d+.* broken JSON .*\{"output_ids": \[9, 8'):
        draw(stand_in, sampling=Sampling(1, 1.0, 4, (STOP,)))
    assert len(stand_in.bodies) == 1
    with pytest.raises(EngineReplyError, match=r"127.0.0.1:\d+: prompt 'p', sample 0: .* version 6"):
        draw(StandIn(always(reply([9, STOP], version="6"))), sampling=Sampling(1, 1.0, 4, (STOP,)))


def test_one_broken_reply_among_many_stops_the_whole_call_with_that_error() -> None:
    async def mostly_sound(request: web.Request, body: dict[str, Any], seen: int) -> web.Response:
        if body["input_ids"] == [5, 5, 5]:
            return web.json_response(reply([99, STOP]))
        await asyncio.sleep(0.01)
        return web.json_response(SOUND)

    prompts = tuple(prompt(str(i), (i, i, i)) for i in range(4, 12))
    with pytest.raises(EngineReplyError, match=r"prompt '5'.*outside the vocabulary \[0, 64\): \[99\]"):
        draw(StandIn(mostly_sound), prompts=prompts)


def test_an_abort_is_drawn_again_and_returned_when_it_persists() -> None:
    aborted = reply([9], "abort")
    [group] = draw(StandIn(at_first(always(aborted), times=1)), retries=1)
    assert [rollout.finish_reason for rollout in group] == ["stop", "stop"]
    stand_in = StandIn(always(aborted))
    [group] = draw(stand_in, sampling=Sampling(1, 1.0, 4, (STOP,)), retries=2)
    assert [rollout.finish_reason for rollout in group] == ["abort"]
    assert len(stand_in.bodies) == 3


def test_groups_come_back_in_order_from_all_servers_within_the_limit_of_prompts_in_flight() -> None:
    async def later_prompts_first(request: web.Request, body: dict[str, Any], seen: int) -> web.Response:
        await asyncio.sleep(0.06 if body["input_ids"][0] % 2 else 0.03)
        return web.json_response(reply([body["input_ids"][0], STOP], prompt_tokens=1))

    stand_ins = StandIn(later_prompts_first), StandIn(later_prompts_first)
    prompts = tuple(prompt(str(i), (i,)) for i in range(10, 30))
    done: list[str] = []
    groups = draw(*stand_ins, prompts=prompts, concurrency=4, progress=lambda group: done.append(group[0].prompt.id))
    assert [[rollout.response_ids[0] for rollout in group] for group in groups] == [[i, i] for i in range(10, 30)]
    assert [[rollout.sample for rollout in group] for group in groups] == [[0, 1]] * 20
    assert sorted(done) == sorted(p.id for p in prompts)
    assert done != [p.id for p in prompts]
    assert [stand_in.most_running for stand_in in stand_ins] == [4, 4]  # 2 prompts of 2 samples each
    for stand_in in stand_ins:
        assert len(stand_in.bodies) >= 12
        assert set(Counter(body["input_ids"][0] for body in stand_in.bodies).values()) == {2}  # a group stays together


@pytest.mark.parametrize(("group_size", "most"), [(1, 4), (2, 4), (4, 4), (8, 8)])
def test_by_default_as_many_responses_are_in_flight_as_a_server_is_given(
    group_size: int, most: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sglang_client, "RESPONSES_A_SERVER", 4)

    async def slow(request: web.Request, body: dict[str, Any], seen: int) -> web.Response:
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(10):  # until as many are there as may be
                while stand_in.most_running < most:
                    await asyncio.sleep(0.01)
        await asyncio.sleep(0.1)  # and one more would come
        return web.json_response(SOUND)

    stand_in = StandIn(slow)
    draw(stand_in, prompts=tuple(prompt(str(i)) for i in range(6)), sampling=Sampling(group_size, 1.0, 4, (STOP,)))
    assert stand_in.most_running == most


@pytest.mark.parametrize("info", [b"[1]", b"null", b"<html>", b"[" * 100_000, b"\xff\xfe"])
def test_what_answers_and_is_no_sglang_server_is_refused_on_entry(info: bytes) -> None:
    stand_in = StandIn(always(SOUND), info=info)
    with pytest.raises(
        EngineReplyError, match=r"127\.0\.0\.1:\d+/server_info (answered with broken JSON|is no object)"
    ):
        draw(stand_in)
    assert stand_in.bodies == []


def test_a_server_that_speaks_no_http_is_one_line() -> None:
    async def talk(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(b"220 mail.example.org ESMTP\r\n")
        await writer.drain()
        writer.close()

    async def enter() -> None:
        async with await asyncio.start_server(talk, "127.0.0.1", 0) as server:
            port = server.sockets[0].getsockname()[1]
            async with make_engine([f"http://127.0.0.1:{port}"], RolloutConfig(retries=0), vocab_size=64):
                pass

    with pytest.raises(EngineUnavailableError, match="server_info failed 1 times, at last with"):
        asyncio.run(enter())


def test_seeds_are_refused_by_servers_that_would_ignore_them() -> None:
    stand_in = StandIn(always(SOUND), deterministic=False)
    with pytest.raises(ConfigError, match="--enable-deterministic-inference"):
        draw(stand_in, sampling=Sampling(2, 1.0, 4, (STOP,), seed=1))
    assert draw(stand_in)[0][0].response_ids.tolist() == [9, 8, STOP]


def test_a_prompt_that_would_crash_the_server_is_never_sent() -> None:
    stand_in = StandIn(always(SOUND))
    with pytest.raises(DataError, match="prompt 'p' holds token 64, outside the model's vocabulary of 64"):
        draw(stand_in, prompts=(prompt("p", (5, 64)),))
    with pytest.raises(DataError, match="prompt 'p' has no tokens"):
        draw(stand_in, prompts=(prompt("p", ()),))
    assert stand_in.bodies == []


def test_no_server_and_a_server_that_is_not_there_are_errors_on_entry() -> None:
    with pytest.raises(ConfigError, match="no rollout server"):
        draw()

    async def enter() -> None:
        async with make_engine(["http://127.0.0.1:9"], RolloutConfig(retries=1), vocab_size=64):
            pass

    with pytest.raises(EngineUnavailableError, match=r"http://127\.0\.0\.1:9/server_info failed 2 times"):
        asyncio.run(enter())


async def endless(request: web.Request, body: dict[str, Any], seen: int) -> web.StreamResponse:
    response = web.StreamResponse()
    await response.prepare(request)
    with contextlib.suppress(ConnectionError):
        while True:
            await response.write(b" " * 65536)
    return response


async def trickle(request: web.Request, body: dict[str, Any], seen: int) -> web.StreamResponse:
    response = web.StreamResponse()
    await response.prepare(request)
    with contextlib.suppress(ConnectionError):
        while True:
            await response.write(b" ")
            await asyncio.sleep(0.05)
    return response


def test_a_reply_may_take_as_many_bytes_as_were_asked_for_and_no_more() -> None:
    with pytest.raises(EngineReplyError, match=r"goes on after 1065984 bytes"):
        draw(StandIn(endless), sampling=Sampling(1, 1.0, 4, (STOP,)))


def test_a_reply_that_packs_its_bytes_is_not_unpacked() -> None:
    async def packed(request: web.Request, body: dict[str, Any], seen: int) -> web.StreamResponse:
        return web.Response(body=gzip.compress(b" " * 10**8), headers={"Content-Encoding": "gzip"})

    with pytest.raises(EngineReplyError, match="broken JSON"):
        draw(StandIn(packed))


def test_a_reply_that_trickles_is_given_up_when_the_time_is_over() -> None:
    with pytest.raises(EngineUnavailableError, match=r"within rollout\.timeout_s = 0\.5 s"):
        draw(StandIn(trickle), sampling=Sampling(1, 1.0, 4, (STOP,)), timeout_s=0.5)


def test_a_redirect_is_not_followed() -> None:
    async def elsewhere(request: web.Request, body: dict[str, Any], seen: int) -> web.StreamResponse:
        return web.Response(status=307, headers={"Location": "/server_info"})

    with pytest.raises(RolloutError, match=r"refused the request \(HTTP 307\)"):
        draw(StandIn(elsewhere))


def test_every_attempt_has_an_id_of_its_own_and_a_reply_to_another_is_refused() -> None:
    stand_in = StandIn(at_first(FAILURES["503"], times=1))
    draw(stand_in)
    assert len(stand_in.request_ids) == 4 == len(set(stand_in.request_ids))  # two, and the two that failed

    async def swapped(request: web.Request, body: dict[str, Any], seen: int) -> web.StreamResponse:
        answer = reply([9, 8, STOP])
        answer["meta_info"]["id"] = stand_in.request_ids[0]  # of somebody else's request
        return web.json_response(answer)

    with pytest.raises(EngineReplyError, match=f"that of request {stand_in.request_ids[0]}"):
        draw(StandIn(swapped))


def test_the_key_goes_with_every_request() -> None:
    seen: set[str | None] = set()

    async def keyed(request: web.Request, body: dict[str, Any], count: int) -> web.StreamResponse:
        seen.add(request.headers.get("Authorization"))
        return web.json_response(reply([9, 8, STOP], version="7-4f1c09ab"))

    (group,) = draw(StandIn(keyed), access=ServerAccess("k", "4f1c09ab"))
    assert seen == {"Bearer k"}
    assert {rollout.weight_versions for rollout in group} == {(7,)}


@pytest.mark.parametrize("version", ["7", "7-4f1c09ab-incomplete", "07-4f1c09ab", "-4f1c09ab"])
def test_weights_that_this_run_has_not_sent_are_refused_whatever_their_number(version: str) -> None:
    with pytest.raises(EngineReplyError, match=r"none of this run's \('7-4f1c09ab' was expected\)"):
        draw(
            StandIn(always(reply([9, 8, STOP], version=version))),
            access=ServerAccess("", "4f1c09ab"),
            on_server_loss="error",
        )


@pytest.mark.parametrize("version", ["7-4f1c09ac", "0-beef", "8-4f1c09ac-incomplete"])
def test_a_server_that_another_run_has_given_weights_is_named_as_that(version: str) -> None:
    said = rf"another run is using the server: it holds weights of version .*{version}.*, and '7-4f1c09ab' were sent"
    with pytest.raises(EngineReplyError, match=said):
        draw(StandIn(always(reply([9, 8, STOP], version=version))), access=ServerAccess("", "4f1c09ab"))


def test_a_sync_that_another_run_overtakes_says_so() -> None:
    servers = Servers(["http://127.0.0.1:1"])
    for reported, another in (("3-beef00", True), ("3-beef00-incomplete", True), ("2-4f1c09ab", False), ("3", False)):
        servers._get = lambda path, reported=reported: [{"weight_version": reported}]  # type: ignore[method-assign]
        with pytest.raises(SyncError, match=f"hold weight version 3-4f1c09ab after the sync.*{reported}") as caught:
            servers.check_version("3-4f1c09ab")
        assert ("another run is using the server" in str(caught.value)) == another
