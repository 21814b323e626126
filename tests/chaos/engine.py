"""A rollout server without a model, as a process of its own that can be killed: ``python engine.py MODEL``.

Its tokens and logprobs are a pure function of the weights that the last sync brought, the request's seed, the prompt
and the position. Responses drawn with other weights than those of the undisturbed run are others, and so is all that
is trained on them. Weights come through files (``sync.method = "disk"``) or HTTP ("tensor"): here they are bytes.
"""

from __future__ import annotations

import hashlib
import json
import math
import sys
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

VOCABULARY = 13
TORN = "torn"
"""What is held between the begin and the end of a sync: responses drawn meanwhile come from no version."""
A_PROMPT_S, A_SYNC_S = 0.05, 0.2
"""That answers take, so that faults strike within them."""


class Weights:
    """What a server holds: a digest of the bytes it was sent, and the version that they have."""

    def __init__(self) -> None:
        self.digest, self.version = "none", "0"
        self._buckets: list[str] = []
        self._one = threading.Lock()

    def begin(self) -> None:
        """A sync over HTTP begins."""
        self.digest, self._buckets = TORN, []

    def take(self, payload: str) -> None:
        """A bucket; ranks send theirs at the same time, so their order is chance."""
        with self._one:
            self._buckets.append(hashlib.sha256(payload.encode()).hexdigest())

    def end(self) -> None:
        """The sync is over."""
        self.digest = hashlib.sha256("".join(sorted(self._buckets)).encode()).hexdigest()

    def read(self, directory: Path) -> None:
        """All of a sync through files."""
        self.digest = TORN
        files = sorted(directory.glob("*.safetensors"))
        contents = "".join(hashlib.sha256(path.read_bytes()).hexdigest() for path in files)
        self.digest = hashlib.sha256(contents.encode()).hexdigest()


def draw(digest: str, prompt: list[int], parameters: dict[str, Any]) -> list[tuple[int, float]]:
    """(token, logprob) by position, up to a stop token or the limit."""
    drawn: list[tuple[int, float]] = []
    while len(drawn) < parameters["max_new_tokens"]:
        place = f"{digest} {prompt} {parameters.get('sampling_seed')} {len(drawn)}".encode()
        first, second = hashlib.sha256(place).digest()[:2]
        token = first % VOCABULARY
        drawn.append((token, -math.log(VOCABULARY) - second / 1024))
        if token in parameters["stop_token_ids"]:
            break
    return drawn


def answer(weights: Weights, request_id: str, prompt: list[int], parameters: dict[str, Any]) -> dict[str, Any]:
    """One response, as SGLang writes it."""
    drawn = draw(weights.digest, prompt, parameters)
    last = drawn[-1][0]
    ended = last in parameters["stop_token_ids"]
    return {
        "output_ids": [token for token, _ in drawn],
        "meta_info": {
            "id": request_id,
            "finish_reason": {"type": "stop", "matched": last} if ended else {"type": "length", "length": len(drawn)},
            "prompt_tokens": len(prompt),
            "completion_tokens": len(drawn),
            "weight_version": weights.version,
            "output_token_logprobs": [[logprob, token, None] for token, logprob in drawn],
        },
    }


class Handler(BaseHTTPRequestHandler):
    """SGLang's endpoints that a run needs."""

    protocol_version = "HTTP/1.1"
    weights: Weights
    model: str

    def do_GET(self) -> None:
        """What the server is."""
        known = {
            "/server_info": {"version": "0.5.23", "enable_deterministic_inference": True, "tp_size": 1},
            "/model_info": {"model_path": self.model, "weight_version": self.weights.version},
        }
        self._send(known.get(self.path.partition("?")[0], {}))

    def do_POST(self) -> None:
        """Weights and generation."""
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])) or b"{}")
        path = self.path.partition("?")[0]
        if path == "/generate":
            time.sleep(A_PROMPT_S)
            requests = zip(body["rid"], body["input_ids"], body["sampling_params"], strict=True)
            self._send([answer(self.weights, *request) for request in requests])
            return
        if path == "/begin_weight_update":
            self.weights.begin()
        elif path == "/update_weights_from_tensor":
            time.sleep(A_SYNC_S / 4)
            self.weights.take(body["serialized_named_tensors"][0])
        elif path == "/end_weight_update":
            self.weights.end()
        elif path == "/update_weights_from_disk":
            time.sleep(A_SYNC_S)
            self.weights.read(Path(body["model_path"]))
        self.weights.version = str(body.get("weight_version", body.get("new_version", self.weights.version)))
        self._send({"success": True})

    def log_message(self, *args: object) -> None:
        """Says nothing."""

    def _send(self, value: object) -> None:
        content = json.dumps(value).encode()
        self.send_response(200)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)


def main() -> None:
    """Serves until it is killed; its port is the first line of its output."""
    Handler.weights, Handler.model = Weights(), sys.argv[1]
    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    print(server.server_port, flush=True)
    server.serve_forever()


if __name__ == "__main__":
    main()
