"""A request is over in time, reads no more than it may, and goes to the server that was named."""

from __future__ import annotations

import contextlib
import json
import socket
import threading
import time
from collections.abc import Callable, Iterator
from http.client import HTTPException

import pytest

from megatron_gspo.calls import OverlongReplyError, call
from megatron_gspo.errors import NoAnswerError, SyncError
from megatron_gspo.rollout.sglang.control import Servers
from megatron_gspo.rollout.sglang.probe import probe

Talk = Callable[[socket.socket, bytes], None]
"""What a server says to a request."""


@contextlib.contextmanager
def server(talk: Talk) -> Iterator[tuple[str, list[bytes]]]:
    """(URL, requests that have come) of a server on loopback."""
    requests: list[bytes] = []
    over = threading.Event()
    with socket.create_server(("127.0.0.1", 0)) as listener:

        def serve() -> None:
            while not over.is_set():
                with contextlib.suppress(OSError):
                    peer = listener.accept()[0]
                    request = peer.recv(65536)
                    if request.startswith(b"POST") and request.endswith(b"\r\n\r\n"):
                        request += peer.recv(65536)
                    requests.append(request)
                    with peer:
                        talk(peer, requests[-1])

        threading.Thread(target=serve, daemon=True).start()
        yield f"http://127.0.0.1:{listener.getsockname()[1]}", requests
        over.set()


def answer(body: bytes, status: str = "200 OK", more: str = "") -> bytes:
    return f"HTTP/1.1 {status}\r\n{more}Content-Length: {len(body)}\r\n\r\n".encode() + body


def says(text: bytes) -> Talk:
    return lambda peer, _: peer.sendall(text)


def trickle(start: bytes) -> Talk:
    """Goes on for ever, a byte now and then: never silent for long."""

    def talk(peer: socket.socket, _: bytes) -> None:
        peer.sendall(start)
        while True:
            time.sleep(0.05)
            peer.sendall(b"x")

    return talk


def endless(peer: socket.socket, _: bytes) -> None:
    peer.sendall(b"HTTP/1.1 200 OK\r\n\r\n")
    while True:
        peer.sendall(b"x" * 65536)


def test_a_question_and_an_order_reach_the_server_with_the_key() -> None:
    with server(says(answer(b"yes"))) as (url, requests):
        assert call(f"{url}/a?b=c", key="k", timeout_s=5) == call(f"{url}/d", b"{}", timeout_s=5)
    assert requests[0].startswith(b"GET /a?b=c HTTP/1.1\r\n") and b"Authorization: Bearer k\r\n" in requests[0]
    assert requests[1].startswith(b"POST /d HTTP/1.1\r\n") and b"Authorization" not in requests[1]
    assert b"Content-Type: application/json\r\n" in requests[1] and requests[1].endswith(b"\r\n\r\n{}")


@pytest.mark.parametrize(
    "start",
    [b"", b"HTTP/1.1 200 OK\r\nA: ", b"HTTP/1.1 200 OK\r\n\r\n", b"HTTP/1.1 200 OK\r\nContent-Length: 9999\r\n\r\n"],
    ids=["before the status", "in a header", "in a body without a length", "in a body of 9999 bytes"],
)
def test_a_server_that_trickles_is_given_up_when_the_time_is_over(start: bytes) -> None:
    began = time.monotonic()
    with server(trickle(start)) as (url, _), pytest.raises(TimeoutError, match=r"timed out after 0\.5 s"):
        call(url, timeout_s=0.5)
    assert 0.4 < time.monotonic() - began < 30, "it would go on for ever"


def test_an_endless_reply_is_not_read_on() -> None:
    with server(endless) as (url, _), pytest.raises(OverlongReplyError, match="goes on after 100000 bytes"):
        call(url, timeout_s=20, most_bytes=100_000)


def test_a_reply_of_the_most_bytes_is_read_and_one_of_one_more_is_not() -> None:
    with server(says(answer(b"x" * 1000))) as (url, _):
        assert len(call(url, timeout_s=5, most_bytes=1000).body) == 1000
        with pytest.raises(OverlongReplyError):
            call(url, timeout_s=5, most_bytes=999)


def test_a_redirect_is_an_answer_and_is_not_followed() -> None:
    with server(says(answer(b"mine"))) as (other, elsewhere):
        moved = says(answer(b"", "307 Temporary Redirect", f"Location: {other}/x\r\n"))
        with server(moved) as (url, _):
            assert call(url, b"{}", key="secret", timeout_s=5).status == 307
            with pytest.raises(SyncError, match="refused \\(HTTP 307\\)"):
                Servers([url], 5).post("/flush_cache")
    assert elsewhere == []


def test_what_is_no_http_is_no_reply() -> None:
    with server(says(b"220 mail\r\n\r\n")) as (url, _), pytest.raises(HTTPException):
        call(url, timeout_s=5)


@pytest.mark.parametrize("success", [False, None, "no", 0])
def test_an_order_that_is_answered_200_without_success_has_failed(success: object) -> None:
    body = json.dumps({"success": success, "message": "out of memory"}).encode()
    with server(says(answer(body))) as (url, _), pytest.raises(SyncError, match=r"success = false\): .*out of memory"):
        Servers([url], 5).post("/begin_weight_update")


@pytest.mark.parametrize("body", [b"Cache flushed.", b'{"success": true}', b"{}", b"[false]"])
def test_an_order_that_is_answered_200_otherwise_is_done(body: bytes) -> None:
    with server(says(answer(body))) as (url, _):
        Servers([url], 5).post("/flush_cache")


def test_control_calls_are_bounded_and_name_the_server() -> None:
    with server(trickle(b"HTTP/1.1 200 OK\r\n\r\n")) as (url, _), pytest.raises(NoAnswerError, match=url):
        Servers([url], 0.5).infos()
    with server(endless) as (url, _), pytest.raises(SyncError, match=f"{url}/weights_checker: .*16777216 bytes"):
        Servers([url], 60).checksums()


def test_a_server_that_asks_for_another_key_says_where_to_give_it() -> None:
    with server(says(answer(b"{}", "401 Unauthorized"))) as (url, _):
        with pytest.raises(SyncError, match=r"HTTP 401; it asks for another key: set \$MEGATRON_GSPO_SERVER_KEY"):
            Servers([url], 5).post("/flush_cache")
        assert "set $MEGATRON_GSPO_SERVER_KEY" in str(probe([url])[0].error)
