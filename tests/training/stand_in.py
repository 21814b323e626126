"""A stand-in for a rollout server, for the faults that a real one will not show on demand.

It takes every weight sync, and answers ``/generate`` with a seeded draw, or with whatever a test asks for.
"""

from __future__ import annotations

import base64
import contextlib
import json
import math
import pickle
import random
import threading
import time
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, Self

Answer = Callable[[dict[str, Any], dict[str, Any], int], Any]
"""(a sound reply, the request, requests before it) -> what is sent: JSON or bytes; None drops the connection."""
VOCABULARY = 13


class StandIn:
    """Serves on a port of its own as long as the block lasts. ``answered`` counts requests to ``/generate``."""

    def __init__(
        self,
        model: Path,
        answer: Answer = lambda reply, request, count: reply,
        at: tuple[str, int] = ("127.0.0.1", 0),
    ) -> None:
        self.model, self.version, self.answered = model, "0", 0
        self.received: dict[str, Any] = {}
        """Name -> the tensor of the last sync, of those over HTTP."""
        self._answer, self._counting = answer, threading.Lock()
        stand_in = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_GET(self) -> None:
                stand_in.reply(self, {})

            def do_POST(self) -> None:
                stand_in.reply(self, json.loads(self.rfile.read(int(self.headers["Content-Length"])) or b"{}"))

            def log_message(self, *args: object) -> None: ...

        self._server = ThreadingHTTPServer(at, Handler)
        self._server.daemon_threads = True
        self.url = f"http://{at[0]}:{self._server.server_port}"

    def __enter__(self) -> Self:
        threading.Thread(target=self._server.serve_forever, args=(0.02,), daemon=True).start()
        return self

    def __exit__(self, *error: object) -> None:
        self._server.shutdown()
        self._server.server_close()

    def die(self) -> None:
        """No further connection is taken, as if the process were gone."""
        self._server.socket.close()

    def reply(self, handler: BaseHTTPRequestHandler, body: dict[str, Any]) -> None:
        path = handler.path.partition("?")[0]
        self.version = str(body.get("weight_version", body.get("new_version", self.version)))
        answer: Any = {"success": True}
        if path == "/server_info":
            answer = {"version": "0.5.23", "enable_deterministic_inference": True, "tp_size": 1}
        elif path == "/model_info":
            answer = {"model_path": str(self.model), "weight_version": self.version}
        elif path == "/update_weights_from_tensor":
            self.received |= dict(pickle.loads(base64.b64decode(body["serialized_named_tensors"][0])))
        elif path == "/generate":
            answer = self._generate(body)
        if answer is None:
            handler.close_connection = True
            handler.connection.close()
            return
        content = answer if isinstance(answer, bytes) else json.dumps(answer).encode()
        handler.send_response(200)
        handler.send_header("Content-Length", str(len(content)))
        handler.end_headers()
        handler.wfile.write(content)

    def _generate(self, body: dict[str, Any]) -> Any:
        """A list of the replies to each response that is asked for; what is no reply takes the list's place."""
        answers = []
        for rid, prompt, parameters in zip(body["rid"], body["input_ids"], body["sampling_params"], strict=True):
            one = body | {"rid": rid, "input_ids": prompt, "sampling_params": parameters}
            with self._counting:
                count, self.answered = self.answered, self.answered + 1
            answers.append(self._answer(sound(one, self.version), one, count))
        strange = [answer for answer in answers if answer is None or isinstance(answer, bytes)]
        return strange[0] if strange else answers


class Mortal(StandIn):
    """Dies once, at a request, and comes back with nothing of what it was sent. ``unfilled``: the versions, none of a
    run's, under which it was asked for responses."""

    def __init__(self, model: Path) -> None:
        super().__init__(model)
        self.dead, self.deaths = False, 0
        self.unfilled: list[str] = []
        self.dies_at: Callable[[str, dict[str, Any]], bool] = lambda path, body: False
        self.comes_back_at: Callable[[], bool] = lambda: False
        self.hangs = False
        """Whether it says nothing while it is dead, and closes no connection."""
        self._one = threading.Lock()

    def reply(self, handler: BaseHTTPRequestHandler, body: dict[str, Any]) -> None:
        path = handler.path.partition("?")[0]
        with self._one:  # of two leaders' requests at once neither would see what the other was answered
            if self.dead and self.comes_back_at():
                self.dead, self.version = False, "default"
                self.received.clear()
            if not self.deaths and self.dies_at(path, body):
                self.dead, self.deaths = True, 1
            if not self.dead:
                if path == "/generate" and "-" not in self.version:
                    self.unfilled.append(self.version)
                with contextlib.suppress(OSError):  # whoever asked may have given it up
                    super().reply(handler, body)
                return
        if self.hangs:
            time.sleep(20)
        handler.close_connection = True
        handler.connection.close()


def sound(body: dict[str, Any], version: str) -> dict[str, Any]:
    """A response drawn uniformly by the request's own seed, which ends in a stop token or at the limit."""
    parameters = body["sampling_params"]
    stops, most = parameters["stop_token_ids"], parameters["max_new_tokens"]
    draw = random.Random(parameters.get("sampling_seed", 0))
    ids: list[int] = []
    while len(ids) < most and ids[-1:] not in [[stop] for stop in stops]:
        ids.append(draw.randrange(VOCABULARY))
    ended = ids[-1] in stops
    return {
        "output_ids": ids,
        "meta_info": {
            "id": body["rid"],
            "finish_reason": {"type": "stop", "matched": ids[-1]} if ended else {"type": "length", "length": len(ids)},
            "prompt_tokens": len(body["input_ids"]),
            "completion_tokens": len(ids),
            "weight_version": version,
            "output_token_logprobs": [[-math.log(VOCABULARY), token, None] for token in ids],
        },
    }
