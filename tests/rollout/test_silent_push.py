"""A server that falls silent while weights are pushed: given up when nobody is there, waited for when it works."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from megatron_gspo.errors import NoAnswerError
from megatron_gspo.rollout.sglang.control import Servers


class Silent:
    """It answers questions after its model only where it ``hears``, and a push ``after_s``; ``asked`` counts both."""

    def __init__(self, *, hears: bool, after_s: float) -> None:
        self.hears, self.after_s = hears, after_s
        self.asked = {"questions": 0, "pushes": 0}
        self.over = threading.Event()
        self.url = ""


@contextmanager
def serving(silent: Silent) -> Iterator[Silent]:
    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            silent.asked["questions"] += 1
            self.answer(silent.hears)

        def do_POST(self) -> None:
            silent.asked["pushes"] += 1
            self.rfile.read(int(self.headers["Content-Length"]))
            self.answer(not silent.over.wait(silent.after_s))

        def answer(self, said: bool) -> None:
            if not said:
                silent.over.wait(30)
                return
            self.send_response(200)
            self.send_header("Content-Length", "2")
            self.end_headers()
            self.wfile.write(b"{}")

        def log_message(self, *args: object) -> None: ...

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
    silent.url = f"http://127.0.0.1:{server.server_port}"
    try:
        yield silent
    finally:
        silent.over.set()
        server.shutdown()
        server.server_close()


def test_a_push_to_a_server_that_takes_no_question_is_given_up_long_before_its_timeout() -> None:
    with serving(Silent(hears=False, after_s=30)) as gone:
        begin = time.monotonic()
        with pytest.raises(NoAnswerError, match=r"/end_weight_update did not answer, and nobody is there: 3 questions"):
            Servers([gone.url], timeout_s=60.0, health_every_s=0.5).end_update()
        assert time.monotonic() - begin < 25
        assert gone.asked == {"questions": 3, "pushes": 1}, "it is not pushed to again"


def test_a_push_to_a_server_that_is_slow_and_takes_questions_is_waited_for() -> None:
    with serving(Silent(hears=True, after_s=4.0)) as slow:
        Servers([slow.url], timeout_s=60.0, health_every_s=0.5).end_update()
        assert slow.asked["pushes"] == 1 and slow.asked["questions"] >= 4, "more than it takes to give one up"


def test_the_timeout_of_a_push_still_ends_what_hangs_behind_an_open_ear() -> None:
    with serving(Silent(hears=True, after_s=30)) as hung, pytest.raises(NoAnswerError, match=r"timed out after 3 s"):
        Servers([hung.url], timeout_s=3.0, health_every_s=1.0).end_update()


def test_what_is_begun_for_several_servers_fails_for_the_one_that_is_gone() -> None:
    with serving(Silent(hears=False, after_s=30)) as gone, serving(Silent(hears=True, after_s=0)) as there:
        servers = Servers([gone.url, there.url], timeout_s=60.0, health_every_s=0.2)
        first, second = servers.start("/init_weights_update_group", [{}, {}])
        assert isinstance(first.exception(timeout=50), NoAnswerError) and gone.url in str(first.exception())
        assert second.result(timeout=50) == "{}"
