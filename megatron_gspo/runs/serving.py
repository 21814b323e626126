"""The rollout servers of a run: those that the configuration names, or local ones that come and go with it."""

from __future__ import annotations

import contextlib
import os
import secrets
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch.distributed as dist

from megatron_gspo.config import Placement, RunConfig
from megatron_gspo.errors import ConfigError
from megatron_gspo.megatron.groups import Groups
from megatron_gspo.parallel.exchange import agree, broadcast_object, together
from megatron_gspo.runs.nodes import named_servers, servers_of
from megatron_gspo.runs.recording import Recorder
from megatron_gspo.train.models import placed_here
from megatron_gspo.train.watch import Local
from megatron_gspo.types import ServerAccess


@dataclass(frozen=True)
class Serving:
    """The rollout servers of a run, on every rank."""

    urls: tuple[str, ...]
    access: ServerAccess
    check: Callable[[], None]
    """Collective: raises EngineUnavailableError when a local server has died or lost its port."""
    placement: Placement
    local: Local | None = None
    """On the first rank, those that it has started."""


@contextlib.contextmanager
def rollout_servers(config: RunConfig, groups: Groups, recorder: Recorder) -> Iterator[Serving]:
    """The servers of the configuration, or local ones that the first rank starts. Collective.

    Raises ConfigError when local servers would have to serve ranks on other machines.
    """
    run = broadcast_object(secrets.token_hex(4), 0, groups.world)
    world, local = dist.get_world_size(), int(os.environ.get("LOCAL_WORLD_SIZE", dist.get_world_size()))
    placement = together(lambda: placed_here(config, ranks=local), groups.world)
    placement = broadcast_object(placement, 0, groups.world)  # one for all, whatever another machine looks like
    if config.rollout.named:
        urls, key = named_servers(config, groups, recorder)
        yield Serving(urls, ServerAccess(key, run), nothing, placement)
        return
    if local != world:
        raise ConfigError(
            f"{world} ranks, {local} of them on this machine: servers started here would not be reached by the others; "
            f"start servers on their nodes with `megatron-gspo serve`, and name them in rollout.servers_from"
        )
    with contextlib.ExitStack() as stack:
        urls, key, error = (), "", None
        check: Callable[[], None] = nothing
        started: Local | None = None
        if dist.get_rank() == 0:
            recorder.phase("waiting for the servers")
            try:
                logs = Path(config.train.run_dir) / "servers"
                servers = stack.enter_context(servers_of(config, placement, logs, recorder.note))
                urls, key, check, started = servers.urls, servers.key, servers.check, servers
            except Exception as caught:
                error = caught
        agree(error, groups.world)
        urls, key = broadcast_object((urls, key), 0, groups.world)
        yield Serving(urls, ServerAccess(key, run), lambda: together(check, groups.world), placement, started)


def nothing() -> None:
    """What there is to check of servers that somebody else has started, and on other ranks than the first."""
