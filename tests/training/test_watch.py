"""What is seen of servers between two draws: who may be asked, who needs weights, who stays away."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler
from pathlib import Path
from typing import Any

import pytest

from megatron_gspo.errors import ConfigError
from megatron_gspo.train import watch
from megatron_gspo.train.watch import Watchman, another_server
from tests.training.stand_in import StandIn

RUN = "4f1c09ab"


class Hung(StandIn):
    """Answers every question, and generates nothing before it is ``free``."""

    aborted = 0

    def __init__(self, model: Path) -> None:
        super().__init__(model)
        self.free = threading.Event()

    def reply(self, handler: BaseHTTPRequestHandler, body: dict[str, Any]) -> None:
        self.aborted += bool(body.get("abort_all"))
        if handler.path == "/health_generate":
            self.free.wait(60)
        super().reply(handler, body)


def test_a_server_is_asked_that_holds_the_version_and_filled_where_it_holds_another(tmp_path: Path) -> None:
    with StandIn(tmp_path) as one, StandIn(tmp_path) as other, StandIn(tmp_path) as third:
        one.version, other.version = f"3-{RUN}", "default"
        third.die()
        sight = Watchman([one.url + "/", other.url, third.url], run=RUN).look(f"3-{RUN}", ())
        assert (sight.holding, sight.empty, [*sight.gone]) == ((one.url,), (other.url,), [third.url])


def test_a_push_has_lost_who_does_not_answer_and_who_was_started_again(tmp_path: Path) -> None:
    with StandIn(tmp_path) as one, StandIn(tmp_path) as other, StandIn(tmp_path) as third:
        one.version, other.version = f"3-{RUN}-incomplete", "default"
        third.die()
        urls = [one.url, other.url, third.url]
        gone = Watchman(urls, run=RUN).gone(urls)
        assert [*gone] == [third.url, other.url]
        assert gone[other.url] == f"{other.url} was started again: it holds weights of version default"
        assert Watchman(urls, run=RUN).gone([one.url]) == {}


def test_a_server_that_was_given_up_shows_that_it_generates_before_it_is_asked_and_holds_nobody_up(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(watch, "PROMPT_S", 0.2)
    with Hung(tmp_path) as server:
        server.version = f"3-{RUN}"
        looking = Watchman([server.url], run=RUN)
        begin = time.monotonic()
        assert looking.look(f"3-{RUN}", [server.url]).gone == {
            server.url: f"{server.url} does not say yet whether it generates"
        }
        assert time.monotonic() - begin < watch.GENERATE_S
        server.free.set()
        monkeypatch.setattr(watch, "PROMPT_S", 60.0)
        assert looking.look(f"3-{RUN}", [server.url]).holding == (server.url,)
        assert server.aborted == 1, "what it was still at"
        server.free.clear()
        monkeypatch.setattr(watch, "GENERATE_S", 0.1)
        (why,) = looking.look(f"3-{RUN}", [server.url]).gone.values()
        assert "generates nothing" in why
        server.free.set()


def refuses(text: str) -> Callable[[], None]:
    def check() -> None:
        raise ConfigError(text)

    return check


def test_a_server_that_comes_back_as_another_one_stays_away(tmp_path: Path) -> None:
    said: list[str] = []

    def unfit(url: str) -> str:
        said.append(url)
        return another_server(refuses("holds another model"), seeded=True, url=url, key="")

    with StandIn(tmp_path) as server:
        server.version = f"3-{RUN}"
        looking = Watchman([server.url], run=RUN, unfit=unfit)
        assert looking.look(f"3-{RUN}", ()).holding == (server.url,) and said == []
        server.version = "default"
        assert looking.look(f"3-{RUN}", ()).gone == {server.url: "holds another model"}
        server.version = f"3-{RUN}"  # whatever it says
        assert looking.look(f"3-{RUN}", ()).gone == {server.url: "holds another model"}


def test_seeds_need_servers_that_repeat(tmp_path: Path) -> None:
    with StandIn(tmp_path) as server:
        assert another_server(lambda: None, seeded=True, url=server.url, key="") == ""
        server.die()
        why = another_server(lambda: None, seeded=True, url=server.url, key="")
        assert why == f"{server.url} was started again without --enable-deterministic-inference"
        assert another_server(lambda: None, seeded=False, url=server.url, key="") == ""


def test_a_router_that_is_gone_is_named(tmp_path: Path) -> None:
    with StandIn(tmp_path) as server, StandIn(tmp_path) as router:
        looking = Watchman([server.url], run=RUN, router=router.url)
        assert looking.look("0", ()).router == ""
        router.die()
        assert looking.look("0", ()).router.startswith(f"rollout.router = {router.url}: ")
