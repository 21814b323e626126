"""The run's latest numbers at ``http://train.metrics_address/metrics``, in Prometheus' text format.

Every metric of docs/metrics.md under ``megatron_gspo_`` and its own name; and how the run and its ranks are.
"""

from __future__ import annotations

import math
import re
import socket
import threading
import time
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import TYPE_CHECKING
from urllib.parse import urlsplit

from megatron_gspo.config import RunConfig
from megatron_gspo.errors import ConfigError
from megatron_gspo.report.metrics import INITIAL, LAYER, METRICS, clean
from megatron_gspo.report.ranks import ranks_of
from megatron_gspo.report.rundir import RunDirectory

if TYPE_CHECKING:
    from megatron_gspo.types import StepReport

PREFIX = "megatron_gspo_"
REQUEST_S = 5.0
"""Seconds that a request may take to arrive."""
OWN = {
    "info": "1, with what the run is as labels.",
    "optimizer_steps": "Optimizer steps done.",
    "outer_steps": "Outer steps done.",
    "outer_steps_planned": "Outer steps of the whole run.",
    "last_report_seconds": "When the last optimizer step was reported, in seconds since 1970.",
    "rank_up": "1 for a rank that lives, 0 for one that is gone, silent or missing.",
    "rank_heard_seconds": "Seconds since a rank last said that it lives.",
    "rank_in_phase_seconds": "Seconds since a rank entered the phase that it is in.",
}
"""Metrics of the run itself, by name without the prefix."""
Series = tuple[str, dict[str, str], float]


class PrometheusSink:
    """Answers while the run goes on. A ``MetricSink``. Raises ConfigError where it cannot listen."""

    def __init__(self, run: RunDirectory, config: RunConfig, world_size: int) -> None:
        self._run, self._config, self._world_size = run, config, world_size
        self._lock = threading.Lock()
        self._values: dict[str, float] = {}
        self._done = {"optimizer_steps": 0.0, "outer_steps": 0.0}
        self._server = _listen(config.train.metrics_address, self._page)
        threading.Thread(target=self._server.serve_forever, name="metrics", daemon=True).start()

    @property
    def address(self) -> str:
        """Where it listens, HOST:PORT."""
        host, port = self._server.server_address[:2]
        return f"[{host!s}]:{port}" if ":" in str(host) else f"{host!s}:{port}"

    def write(self, report: StepReport) -> None:
        """Takes one line: what it does not measure stays as it was."""
        with self._lock:
            self._values |= clean(report.metrics)
            if report.step != INITIAL:
                self._done = {"optimizer_steps": report.step + 1.0, "outer_steps": report.outer_step + 1.0}
            self._done["last_report_seconds"] = time.time()

    def close(self) -> None:
        """Ends the answers."""
        self._server.shutdown()
        self._server.server_close()

    def _page(self) -> str:
        with self._lock:
            values, done = dict(self._values), dict(self._done)
        series: list[Series] = [(*series_name(name), value) for name, value in values.items()]
        series += [(name, {}, value) for name, value in done.items()]
        train = self._config.train
        about = {"algorithm": self._config.algorithm.name, "run": train.run_dir, "model": self._config.model.path}
        series += [("info", about, 1.0), ("outer_steps_planned", {}, float(train.outer_steps))]
        return page([*series, *self._ranks()])

    def _ranks(self) -> Iterator[Series]:
        for entry in ranks_of(self._run.path, self._world_size):
            labels = {"rank": str(entry["rank"]), "host": entry["host"] or ""}
            yield "rank_up", labels, float(entry["state"] in ("alive", "ended"))
            if entry["heard_s"] is not None:
                yield "rank_heard_seconds", labels, entry["heard_s"]
                yield "rank_in_phase_seconds", labels, entry["in_phase_s"]


def series_name(metric: str) -> tuple[str, dict[str, str]]:
    """A metric's name and labels for Prometheus, without the prefix.

    >>> series_name("route/drift/layer_03")
    ('route_drift_layer', {'layer': '03'})
    """
    name, labels = metric, {}
    if found := re.fullmatch(r"(.*layer)_(\d+)", metric):
        name, labels = found[1], {"layer": found[2]}
    elif found := re.fullmatch(r"reward/component/(\w+)", metric):
        name, labels = "reward/component", {"component": found[1]}
    elif found := re.fullmatch(r"source/([^/]+)/(\w+)", metric):
        name, labels = f"source/{found[2]}", {"source": found[1]}
    elif found := re.fullmatch(r"eval/([^/]+)/(\w+)", metric):
        name, labels = f"eval/suite/{found[2]}", {"suite": found[1]}
    return re.sub(r"[^a-zA-Z0-9_]", "_", name), labels


def help_texts() -> dict[str, str]:
    """Name without the prefix -> what it is, of every metric there can be."""
    known = {
        series_name(name.replace(LAYER, "layer_00"))[0]: f"{metric.meaning} ({metric.unit})"
        for name, metric in METRICS.items()
    }
    return known | OWN


def page(series: list[Series]) -> str:
    """The text of an answer; series of one name stand together, each name with its help once."""
    texts = help_texts()
    lines: list[str] = []
    for name in dict.fromkeys(name for name, _, _ in series):
        said = texts.get(name, "").replace("\\", "\\\\").replace("\n", " ")
        lines += [f"# HELP {PREFIX}{name} {said}".rstrip(), f"# TYPE {PREFIX}{name} gauge"]
        lines += [f"{PREFIX}{name}{_labels(labels)} {_number(value)}" for each, labels, value in series if each == name]
    return "\n".join(lines) + "\n"


def _number(value: float) -> str:
    """As the format writes it: "NaN", "+Inf" and "-Inf" where it is no number."""
    if math.isnan(value):
        return "NaN"
    return repr(value) if math.isfinite(value) else f"{'+' if value > 0 else '-'}Inf"


def _labels(labels: dict[str, str]) -> str:
    pairs = (f'{name}="{_escaped(value)}"' for name, value in labels.items())
    return f"{{{','.join(pairs)}}}" if labels else ""


def _escaped(value: str) -> str:
    printable = value.encode(errors="replace").decode()
    return printable.replace("\\", "\\\\").replace('"', '\\"').replace("\n", "\\n")


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    block_on_close = False  # the end of a run waits for no reader

    def handle_error(self, request: object, client_address: object) -> None:
        """A reader that went away is no news."""


def _listen(address: str, content: Callable[[], str]) -> _Server:
    class Handler(BaseHTTPRequestHandler):
        timeout = REQUEST_S

        def do_GET(self) -> None:
            body = content().encode() if self.path == "/metrics" else b""
            self.send_response(200 if body else 404)
            self.send_header("Content-Type", "text/plain; version=0.0.4; charset=utf-8")
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *arguments: object) -> None:
            """The terminal is the run's."""

    parts = urlsplit(f"//{address}")
    host, port = parts.hostname or "127.0.0.1", parts.port or 0
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    kind = type("_Server", (_Server,), {"address_family": family})
    try:
        server: _Server = kind((host, port), Handler)
    except OSError as error:
        raise ConfigError(f'train.metrics_address = "{address}" cannot be listened on: {error}') from None
    return server
