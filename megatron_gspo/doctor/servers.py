"""Checks of the rollout servers: running ones that the configuration names, or what local ones need."""

from __future__ import annotations

import json
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from megatron_gspo.doctor.check import Check, error, ok, warning
from megatron_gspo.doctor.facts import Facts
from megatron_gspo.doctor.lengths import fit_into, kept_positions
from megatron_gspo.errors import ConfigError, MegatronGspoError
from megatron_gspo.hf.catalog import read_config
from megatron_gspo.rollout.addresses import named
from megatron_gspo.rollout.sglang.cards import check_cards
from megatron_gspo.rollout.sglang.launcher import free_ports
from megatron_gspo.rollout.sglang.probe import get, started_from
from megatron_gspo.train.engine_dtype import check_eight_bits, check_form
from megatron_gspo.train.models import check_engine, first_difference
from megatron_gspo.versions import untested

TIMEOUT_S = 10.0
SLOW_S = 1.0
"""Seconds for a status page above which a server is busy, or far away."""
FIX = "rollout.servers"


@dataclass(frozen=True)
class Server:
    """What one server said."""

    url: str
    seconds: float = 0.0
    """Of the slower of its two pages."""
    model: dict[str, Any] = field(default_factory=dict)
    """/model_info."""
    info: dict[str, Any] = field(default_factory=dict)
    """/server_info."""
    problem: str = ""
    """Why it said nothing that can be used."""


def check_servers(facts: Facts) -> list[Check]:
    """Whether each named server answers, with which model and version."""
    rollout = facts.config.rollout
    if facts.supervised:
        return [ok("supervised fine-tuning needs none")]
    check_engine(facts.config.rollout.engine, facts.config.model.path, facts.shape)
    check_eight_bits(rollout, facts.config.model.path, facts.family, facts.shape, facts.config.placement.sizes(rollout))
    if not rollout.named:
        check_cards(rollout.engine_dtype)
        ports = free_ports(facts.local_servers)
        return [ok(f"{facts.local_servers} to be started here; ports are free ({', '.join(map(str, ports))})")]
    try:
        urls, key = named(rollout)
    except ConfigError as caught:
        return [error(str(caught), "rollout.servers_from")]
    with ThreadPoolExecutor(min(32, len(urls))) as pool:
        servers = list(pool.map(lambda url: ask(url, key), urls))
    checks = [check for server in servers for check in _judge(facts, server)]
    versions = {server.url: server.model.get("weight_version") for server in servers if not server.problem}
    if len(set(map(str, versions.values()))) > 1:
        held = ", ".join(f"{url} holds {version!r}" for url, version in versions.items())
        checks.append(warning(f"weight versions differ: {held}; the run's first sync makes them one"))
    return checks


def ask(url: str, key: str) -> Server:
    """Health, model and settings of one server, each page within ``TIMEOUT_S``. Never raises."""
    url = url.rstrip("/")
    start = time.monotonic()
    try:
        get(f"{url}/health", TIMEOUT_S)
        pages = []
        slowest = 0.0
        for path in ("/model_info", "/server_info"):
            start = time.monotonic()
            page = json.loads(get(url + path, TIMEOUT_S, key))
            slowest = max(slowest, time.monotonic() - start)
            if not isinstance(page, dict):
                return Server(url, problem=f"{path} is a {type(page).__name__}, not an object: no SGLang server")
            pages.append(page)
    except ValueError as caught:
        return Server(url, problem=f"answers, but not with JSON: no SGLang server ({caught})")
    except Exception as caught:  # whatever sockets, HTTP and TLS raise
        seconds = time.monotonic() - start
        return Server(url, problem=f"did not answer: {type(caught).__name__}: {caught} (after {seconds:.1f} s)")
    return Server(url, slowest, model=pages[0], info=pages[1])


def _judge(facts: Facts, server: Server) -> list[Check]:
    """A line of what one server is, and a line for each thing that is wrong with it."""
    if server.problem:
        return [error(f"{server.url} {server.problem}", f"{FIX}: start the server, or name another")]
    info, model = server.info, server.model
    text = (
        f"{server.url}: sglang {info.get('version')}, {model.get('model_path')}, weight version "
        f"{model.get('weight_version')!r}, tp {info.get('tp_size')} dp {info.get('dp_size')}, "
        f"routed experts {'returned' if info.get('enable_return_routed_experts') else 'not returned'}, "
        f"{server.seconds * 1000:.0f} ms"
    )
    problems = [*_version_problems(server), *_model_problems(facts, server), *_setting_problems(facts, server)]
    if server.seconds > SLOW_S:
        problems.append(warning(f"{server.url} took {server.seconds:.1f} s for a status page: busy, or far away", FIX))
    return problems or [ok(text)]


def _version_problems(server: Server) -> list[Check]:
    version = server.info.get("version")
    line = untested("sglang", version if isinstance(version, str) else None)
    return [error(f"{server.url}: {line}", f"{FIX}: a server of that version")] if line else []


def _model_problems(facts: Facts, server: Server) -> list[Check]:
    """Another architecture or vocabulary; the server's own config.json is read where its path can be, from here."""
    path, names = started_from(server.model), server.model.get("architectures")
    own = read_config(facts.config.model.path)
    theirs: dict[str, Any] = {"architectures": names} if names else {}
    try:
        if (Path(path) / "config.json").is_file():
            theirs |= read_config(path)
    except MegatronGspoError:
        pass
    if difference := first_difference(own, theirs):
        fix = f"{FIX}: a server that was started from model.path"
        return [error(f"{server.url} holds another model ({path}): its {difference}", fix)]
    read = theirs if theirs.keys() - {"architectures"} else {}
    try:
        check_form(facts.config.rollout.engine_dtype, server.url, read, server.info.get("quantization"))
    except ConfigError as caught:
        return [error(str(caught), "rollout.engine_dtype, or rollout.servers")]
    return []


def _setting_problems(facts: Facts, server: Server) -> list[Check]:
    """What the run asks of its servers, and a server must have been started with."""
    config, info = facts.config, server.info
    problems = []
    seeded = config.rollout.is_seeded(on_gpu=bool(facts.machine.gpus))
    if seeded and info.get("enable_deterministic_inference") is not True:
        problems.append(
            error(
                f"{server.url} was started without --enable-deterministic-inference, and rollouts are seeded",
                "restart it with the flag, or rollout.seeded = false",
            )
        )
    if config.replay.uses_engine_routes and not info.get("enable_return_routed_experts"):
        name = "mode" if config.replay.mode == "r3" else "engine_routes_every"
        value = getattr(config.replay, name)
        problems.append(
            error(
                f"{server.url} was started without --enable-return-routed-experts, and replay.{name} = {value!r} asks "
                f"for routes",
                f"restart it with the flag, or replay.{name}",
            )
        )
    length, limit = config.rollout.max_prompt_tokens + config.rollout.max_response_tokens, info.get("context_length")
    if isinstance(limit, int) and length > limit:
        problems.append(
            error(
                f"{server.url} has a context of {limit} tokens, prompt + response may have {length}",
                f"{fit_into(facts, limit - kept_positions(facts))}; or the server's --context-length",
            )
        )
    return problems
