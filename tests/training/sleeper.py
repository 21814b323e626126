"""A stand-in for a server that takes turns with a trainer: it dies of what kills SGLang 0.5.23, and remembers every
wrong that a real one would do without a word."""

from __future__ import annotations

import threading
from http.server import BaseHTTPRequestHandler
from pathlib import Path
from typing import Any

from tests.training.stand_in import Answer, StandIn

UPDATES = ("/update_weights_from_tensor", "/update_weights_from_disk", "/end_weight_update", "/begin_weight_update")
PARTS = {"weights", "kv_cache"}


class Sleeper(StandIn):
    """``calls`` are the paths it was asked for, ``wrongs`` what it should never have been asked.

    ``fault``: (number of a call, how it fails): "refused" answers 500 and does nothing, "unheard" closes the connection
    and does nothing, "unsaid" does it and closes the connection.
    """

    def __init__(
        self,
        model: Path,
        answer: Answer = lambda reply, request, count: reply,
        *,
        fault: tuple[int, str] | None = None,
        asleep: bool = False,
    ) -> None:
        super().__init__(model, answer)
        self.fault = fault
        self.calls: list[str] = []
        self.wrongs: list[str] = []
        self.awake: set[str] = set() if asleep else set(PARTS)
        self.paused, self.dead, self.idle = asleep, False, True
        self.filled = not asleep
        """Whether the weights are those that ``version`` names, when it names some."""
        self._one = threading.Lock()

    def reply(self, handler: BaseHTTPRequestHandler, body: dict[str, Any]) -> None:
        path = handler.path.partition("?")[0]
        with self._one:
            number = len(self.calls)
            self.calls.append(path if not (tags := body.get("tags")) else f"{path} {'+'.join(tags)}")
            how = self.fault[1] if self.fault and self.fault[0] == number else ""
            if self.dead or how == "unheard":
                self._hang_up(handler)
                return
            status = 500 if how == "refused" else self._take(path, body)
            if self.dead or how == "unsaid":
                if path == "/update_weight_version":
                    self.version = body["new_version"]
                self._hang_up(handler)
                return
        if status == 200:
            super().reply(handler, body)
        else:
            handler.send_response(status)
            handler.send_header("Content-Length", "0")
            handler.end_headers()

    def _take(self, path: str, body: dict[str, Any]) -> int:
        """Does what a path says; the status of the answer."""
        tags = set(body.get("tags", ()))
        if path == "/pause_generation":
            self.paused = True
        elif path == "/flush_cache":
            self.idle = True
        elif path == "/continue_generation":
            self.paused = False
        elif path == "/release_memory_occupation":
            if not (self.paused and self.idle):
                self._die("went to sleep while it was busy, or could be")
            if tags - self.awake:
                self._die(f"was sent to sleep twice ({tags - self.awake})")
            self.awake -= tags
            self.filled &= "weights" not in tags
        elif path == "/resume_memory_occupation":
            if tags & self.awake:
                self._die(f"was woken twice ({tags & self.awake})")
            if "kv_cache" in tags and not self.filled:
                self.wrongs.append("the cache was woken before the weights were filled")
            self.awake |= tags
        elif path in UPDATES:
            if "weights" not in self.awake:
                self._die(f"{path} while the weights were asleep")
            self.filled = path in ("/end_weight_update", "/update_weights_from_disk")
        elif path == "/generate":
            return self._may_generate()
        return 200

    def _may_generate(self) -> int:
        if self.paused:
            return 503  # a real one lets it wait
        self.idle = False
        if self.awake != PARTS:
            self._die("generated while asleep")
        if not self.filled and self.version.partition("-")[2].count("-") == 0:
            self.wrongs.append(f"generated as version {self.version} with other weights")
        return 200

    def _die(self, why: str) -> None:
        self.wrongs.append(why)
        self.dead = True

    def _hang_up(self, handler: BaseHTTPRequestHandler) -> None:
        handler.close_connection = True
        handler.connection.close()
