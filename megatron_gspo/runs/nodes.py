"""The rollout servers of a node, for trainers on this one and on others (``megatron-gspo serve``)."""

from __future__ import annotations

import contextlib
import signal
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

import torch
import torch.distributed as dist

from megatron_gspo.config import Placement, RewardServerConfig, RunConfig
from megatron_gspo.errors import ConfigError
from megatron_gspo.parallel.exchange import broadcast_object, together
from megatron_gspo.platforms import here
from megatron_gspo.report.rundir import lock
from megatron_gspo.rollout.addresses import SETTING, announce, file_of, named, shared_key, wait_for
from megatron_gspo.rollout.engine import local_servers
from megatron_gspo.rollout.sglang.launcher import LocalServers
from megatron_gspo.runs.waiting import starting_servers
from megatron_gspo.storage import claiming
from megatron_gspo.train.engine_dtype import served_directory
from megatron_gspo.train.models import placed_here, served

if TYPE_CHECKING:  # serving needs no Megatron
    from megatron_gspo.megatron.groups import Groups
    from megatron_gspo.runs.recording import Recorder

LOOK_S = 1.0
"""Seconds between looks at the servers."""


@dataclass(frozen=True)
class Spread:
    """This node's part of a server that takes several (SGLang's ``--nnodes``). (Not run yet.)"""

    nodes: int
    rank: int
    address: str
    """HOST:PORT of the first of them, where they meet."""

    def arguments(self) -> tuple[str, ...]:
        """For SGLang's command line."""
        return ("--nnodes", str(self.nodes), "--node-rank", str(self.rank), "--dist-init-addr", self.address)


@dataclass(frozen=True)
class Node:
    """One node of those that serve."""

    name: str
    """Of its file."""
    host: str
    """Address at which its servers listen, and others reach them."""
    ranks: int = 0
    """Trainer ranks on it."""
    port: int | None = None
    """Of its first server; the others have the next ones. None: free ones."""
    spread: Spread | None = None
    """Where one server takes several nodes."""


def named_servers(config: RunConfig, groups: Groups, recorder: Recorder) -> tuple[tuple[str, ...], str]:
    """URLs and key of the running servers that the configuration names. Collective; the first rank waits for those of
    ``rollout.servers_from``, and its environment is what counts."""
    rollout = config.rollout

    def found() -> tuple[tuple[str, ...], str]:
        if not rollout.servers_from:
            return named(rollout)
        recorder.phase(f"waiting for servers in {rollout.servers_from}")
        return wait_for(rollout)

    first = dist.get_rank() == 0
    return broadcast_object(together(lambda: found() if first else None, groups.world), 0, groups.world)


def placed_on(config: RunConfig, node: Node, cards: int) -> Placement:
    """Where a node's servers lie, beside its trainer ranks; ``cards``: GPUs of the node. Raises ConfigError, also for a
    server over several nodes that does not take the same number of cards on each."""
    if not node.ranks:  # they are started where the first rank is
        config = config.model_copy(update={"reward_server": RewardServerConfig()})
    if node.spread is None:
        placement = placed_here(config, ranks=node.ranks)
        if placement.colocated and config.placement.mode != "colocated":
            raise ConfigError(
                f"the servers would share cards with --ranks {node.ranks} ({placement.why}): set placement.mode = "
                f'"colocated", here and for the trainer, or fewer ranks'
            )
        return placement
    sizes, nodes = config.placement.sizes(config.rollout), node.spread.nodes
    if node.ranks or sizes.step != 1 or sizes.cards % nodes or sizes.cards // nodes > cards:
        raise ConfigError(
            f"--nnodes {nodes}: a server of {sizes.cards} card(s) (placement.tensor, rollout.server_args) takes the "
            f"same number of cards on each node, at most the {cards} that this one has, and none of a trainer's ranks"
        )
    one = config.rollout.model_copy(update={"local_servers": 1})
    whole = config.placement.model_copy(update={"gpus": None})
    placement = whole.resolved(one, ranks=0, cards=sizes.cards)
    return replace(placement, server_args=(*placement.server_args, *node.spread.arguments()))


def as_started(config: RunConfig) -> RunConfig:
    """The configuration of servers that are started, where the trainer's names running ones."""
    rollout = config.rollout.model_copy(update={"servers": (), "servers_from": "", "server_nodes": 1})
    return config.model_copy(update={"rollout": rollout})


def serve(config: RunConfig, node: Node, say: Callable[[str], None]) -> None:
    """Starts a node's servers, says where they are in ``rollout.servers_from``, and stays until its file there is
    removed, or SIGTERM comes (SystemExit with 0). It starts none again.

    Raises ConfigError, and EngineUnavailableError when a server does not start or dies.
    """
    directory = Path(config.rollout.servers_from)
    file, place = file_of(directory, node.name), directory / node.name
    end_on_sigterm()
    with claiming(f"{SETTING} = {directory}", directory):
        place.mkdir(parents=True, exist_ok=True)
    with lock(place / ".lock", f"{SETTING} = {directory}, node {node.name},"), contextlib.ExitStack() as stack:
        started = as_started(config)
        placement = placed_on(started, node, torch.cuda.device_count() if here().device_type == "cuda" else 0)
        key = shared_key(directory)
        servers = stack.enter_context(
            servers_of(started, placement, place, say, key=key, host=node.host, port=node.port)
        )
        speaks = node.spread is None or node.spread.rank == 0
        if speaks:
            stack.callback(file.unlink, missing_ok=True)
            announce(directory, node.name, servers.urls)
            say(f"{', '.join(servers.urls)}: written to {file}; SIGTERM, or removing that file, ends them")
        while not speaks or _is_there(file):
            servers.check()
            time.sleep(LOOK_S)
    say(f"{file} was removed: the servers are ended")


@contextlib.contextmanager
def servers_of(
    config: RunConfig, placement: Placement, logs: Path, say: Callable[[str], None], **reached: Any
) -> Iterator[LocalServers]:
    """This machine's servers, healthy. ``reached``: ``LocalServers``' key, host and port."""
    device, rollout = here().device_type, served(config, placement)
    servers: LocalServers = local_servers(rollout)(
        rollout,
        served_directory(rollout, config.model.path, logs, placement.sizes),
        logs,
        device=device,
        dtype=config.rollout.engine_dtype or config.model.dtype,
        seed=config.train.seed,
        routes=config.replay.uses_engine_routes,
        placement=placement,
        **reached,
    )
    with contextlib.ExitStack() as stack:
        with starting_servers(rollout, device, say):
            stack.enter_context(servers)
        yield servers


def end_on_sigterm() -> None:
    """Has SIGTERM raise SystemExit, so that what was started is ended; and SIGUSR1, which asks trainers to save and
    which Slurm sends to all processes of a step, do nothing."""

    def end(number: int, frame: object) -> NoReturn:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        raise SystemExit(0)

    signal.signal(signal.SIGTERM, end)
    signal.signal(signal.SIGUSR1, signal.SIG_IGN)


def _is_there(file: Path) -> bool:
    try:
        file.stat()
    except FileNotFoundError:
        return False
    except OSError:  # a file system that does not answer has removed nothing
        return True
    return True
