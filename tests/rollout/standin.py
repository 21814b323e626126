"""A stand-in for a server's side of weight sync: it joins real gloo groups, and dies, hangs or refuses on demand.

A real server (test_sglang.py) shows neither several tensor ranks on this machine nor a death at a given bucket.
"""

from __future__ import annotations

import base64
import contextlib
import hashlib
import io
import json
import multiprocessing as mp
import os
import pickle
import threading
import time
import urllib.request
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from datetime import timedelta
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from multiprocessing.connection import Connection
from typing import Any, ClassVar

import torch
import torch.distributed as dist

from tests.pool import PRELOAD

TIMEOUT = timedelta(seconds=20)
FAULTS = ("dies", "hangs", "refuses")


class State:
    """What SGLang keeps of an update, for each of ``tensor_ranks``."""

    def __init__(self, tensor_ranks: int, fault: str | None) -> None:
        self.tensor_ranks, self.fault = tensor_ranks, fault
        self.version = "0"
        self.open = False
        self.groups: list[Any] = []
        self.buckets = 0
        self.received: list[dict[str, str]] = [{} for _ in range(tensor_ranks)]

    def post(self, path: str, body: dict[str, Any]) -> tuple[int, dict[str, Any]]:
        if path == "/update_weight_version":
            self.version = body["new_version"]
        elif path in ("/begin_weight_update", "/end_weight_update"):
            opening = path.startswith("/begin")
            if self.open == opening:
                return 400, {"message": "already so"}
            self.open = opening
        elif path == "/init_weights_update_group":
            self.groups = self._on_ranks(lambda rank: join(body, body["rank_offset"] + rank))
        elif path == "/destroy_weights_update_group":
            self.groups = []
        elif path == "/update_weights_from_distributed":
            return self._receive(lambda rank: self._load(rank, body))
        elif path == "/update_weights_from_tensor":
            if not self.open or body["load_format"] != "flattened_bucket":
                return 400, {"message": "this stand-in takes flattened buckets alone, in a session"}
            return self._receive(lambda rank: self._open_handle(rank, body["serialized_named_tensors"][rank]))
        return 200, {}

    def _receive(self, load: Any) -> tuple[int, dict[str, Any]]:
        self.buckets += 1
        if self.fault and self.buckets == 2:
            if self.fault == "dies":
                os._exit(9)
            if self.fault == "hangs":
                time.sleep(600)  # it is killed in the end
            return 400, {"message": "not now"}
        try:
            self._on_ranks(load)
        except Exception as error:
            return 400, {"message": f"Failed to receive weights: {error}"}
        return 200, {}

    def _load(self, rank: int, body: dict[str, Any]) -> None:
        dtypes = [getattr(torch, name) for name in body["dtypes"]]
        sizes = [
            torch.Size(shape).numel() * dtype.itemsize for shape, dtype in zip(body["shapes"], dtypes, strict=True)
        ]
        flat = torch.empty(sum(sizes), dtype=torch.uint8)
        options = dist.BroadcastOptions()
        options.rootRank = options.rootTensor = 0
        self.groups[rank].broadcast([flat], options).wait()
        for name, dtype, shape, data in zip(body["names"], dtypes, body["shapes"], flat.split(sizes), strict=True):
            self.received[rank][name] = digest(data.view(dtype).reshape(shape))

    def _open_handle(self, rank: int, handle: str) -> None:
        read = Allowed(io.BytesIO(base64.b64decode(handle, validate=True))).load()
        for entry in read["metadata"]:
            data = read["flattened_tensor"][entry.start_idx : entry.end_idx]
            self.received[rank][entry.name] = digest(data.view(entry.dtype).reshape(entry.shape))

    def _on_ranks(self, action: Any) -> list[Any]:
        results: list[Any] = [None] * self.tensor_ranks
        failures: list[Exception] = []

        def run(rank: int) -> None:
            try:
                results[rank] = action(rank)
            except Exception as error:
                failures.append(error)

        threads = [threading.Thread(target=run, args=(rank,)) for rank in range(self.tensor_ranks)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        if failures:
            raise failures[0]
        return results


class Allowed(pickle.Unpickler):
    """Reads what SGLang 0.5.23 allows of a handle in shared memory (srt/utils/common.py, ``SafeUnpickler``)."""

    NAMES: ClassVar = {
        ("types", "SimpleNamespace"),
        *(("torch.multiprocessing.reductions", f"rebuild_{what}") for what in ("tensor", "typed_storage")),
        ("torch.multiprocessing.reductions", "rebuild_storage_filename"),
        ("torch", "Tensor"),
        ("torch.storage", "UntypedStorage"),
        *(("torch", name) for name in ("uint8", "bfloat16", "float32", "float64", "float8_e4m3fn")),
    }

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in self.NAMES:
            raise RuntimeError(f"Blocked unsafe global ({module}.{name})")
        return super().find_class(module, name)


def digest(tensor: torch.Tensor) -> str:
    """Of dtype, shape and bytes."""
    content = tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()
    return hashlib.sha256(f"{tensor.dtype}{list(tensor.shape)}".encode() + content).hexdigest()


def join(body: dict[str, Any], rank: int) -> Any:
    store = dist.TCPStore(body["master_address"], body["master_port"], body["world_size"], False, TIMEOUT)
    name = body["group_name"]
    prefixed = dist.PrefixStore("cpu/", dist.PrefixStore(f"{name}/", dist.PrefixStore(name, store)))
    return dist.ProcessGroupGloo(prefixed, rank, body["world_size"], TIMEOUT)


def serve(connection: Connection, tensor_ranks: int, fault: str | None, info: dict[str, Any]) -> None:
    torch.set_num_threads(1)
    state = State(tensor_ranks, fault)

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            known = {"tp_size": tensor_ranks, "device": "cpu", "weight_version": state.version, **info}
            self._answer(200, known | {"received": state.received, "open": state.open, "buckets": state.buckets})

        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            self._answer(*state.post(self.path.partition("?")[0], body))

        def _answer(self, status: int, value: dict[str, Any]) -> None:
            content = json.dumps(value).encode()
            self.send_response(status)
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            with contextlib.suppress(BrokenPipeError):  # nobody waits for it any more
                self.wfile.write(content)

        def log_message(self, *_: Any) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    connection.send(server.server_address[1])
    server.serve_forever()


@contextmanager
def stand_ins(*servers: tuple[int, str | None], info: dict[str, Any] | None = None) -> Iterator[list[str]]:
    """URLs of a stand-in for each (tensor ranks, one of ``FAULTS`` or None); each is a process. ``info``: what they say
    of themselves besides."""
    context = mp.get_context("forkserver")
    context.set_forkserver_preload(PRELOAD)  # one server forks these and the ranks of the pool
    with ExitStack() as stack:
        urls = []
        for tensor_ranks, fault in servers:
            ours, theirs = context.Pipe()
            process = context.Process(target=serve, args=(theirs, tensor_ranks, fault, info or {}), daemon=True)
            process.start()
            stack.callback(process.join)
            stack.callback(process.kill)
            urls.append(f"http://127.0.0.1:{ours.recv()}")
        yield urls


def state_of(url: str) -> dict[str, Any]:
    with urllib.request.urlopen(f"{url}/server_info", timeout=60) as response:
        return json.load(response)
