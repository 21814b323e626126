"""The servers of a run's reward model or judge (``[reward_server]``): started beside its own, looked after, and ended
with it."""

from __future__ import annotations

import contextlib
import os
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from http.client import HTTPException
from pathlib import Path

import torch
import torch.distributed as dist

from megatron_gspo.config import Placement, RolloutConfig, RunConfig
from megatron_gspo.config.servers import SHARE, SIZES, server_sizes
from megatron_gspo.errors import ConfigError
from megatron_gspo.parallel.exchange import agree, broadcast_object
from megatron_gspo.platforms import CUDA, here
from megatron_gspo.rewards.interface import RewardServers
from megatron_gspo.rollout.engine import local_servers
from megatron_gspo.rollout.sglang.launcher import LocalServers
from megatron_gspo.rollout.sglang.probe import get
from megatron_gspo.rollout.sglang.purpose import PURPOSES
from megatron_gspo.runs.waiting import starting_servers

LOOK_S = 5.0
"""Seconds between looks at them."""
ANSWER_S = 30.0
"""Seconds for an answer to ``/health_generate``: SGLang itself waits 20 for what it computes."""
MISSES = 3
"""Questions in a row that are not answered, after which one is given up and started again."""
DIRECTORY = "reward_servers"
"""Of their logs and their key, in a run's directory."""


class Guard:
    """Looks after them in a thread, as a run looks after its rollout servers: one that has died, or answers nothing, is
    started again. ``say`` hears of it, in lines."""

    def __init__(self, servers: LocalServers, say: Callable[[str], None]) -> None:
        self.say = say
        self._servers = servers
        self._missed: Counter[str] = Counter()
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)

    def __enter__(self) -> Guard:
        self._thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._over.set()
        self._thread.join()  # a server that it starts is ended with the others

    def look(self) -> None:
        """Once at all of them."""
        gone = self._servers.mend([url for url, count in self._missed.items() if count >= MISSES])
        there = [url for url in self._servers.urls if url not in gone]
        for url in gone:
            self._missed.pop(url, None)
        with ThreadPoolExecutor(max(1, len(there))) as pool:
            for url, answers in zip(there, pool.map(_answers, there), strict=True):
                self._missed[url] = 0 if answers else self._missed[url] + 1
        while self._servers.said:
            self.say(self._servers.said.pop(0))

    def _watch(self) -> None:
        said = ""
        while not self._over.wait(LOOK_S):
            try:
                self.look()
            except Exception as error:  # a full disk, say: perhaps not for long, and nobody else looks after them
                failure = f"warning: reward servers are not looked after: {type(error).__name__}: {error}"
                if failure != said:
                    self.say(failure)
                said = failure
            else:
                said = ""


def _answers(url: str) -> bool:
    try:
        get(f"{url}/health_generate", ANSWER_S)
    except (OSError, HTTPException):
        return False
    return True


@contextlib.contextmanager
def reward_servers(
    config: RunConfig, world_group: dist.ProcessGroup, note: Callable[[str], None], later: Callable[[str], None]
) -> Iterator[RewardServers]:
    """What the first rank starts, as every rank is told. Collective.

    ``note`` says, on the first rank, that they are started; ``later``, from another thread, what becomes of one. Raises
    ConfigError for ranks on other machines, and what ``LocalServers`` raises.
    """
    world, local = dist.get_world_size(), int(os.environ.get("LOCAL_WORLD_SIZE", dist.get_world_size()))
    if local != world:
        raise ConfigError(
            f"reward_server: {world} ranks, {local} of them on this machine, and a server that is started here is not "
            f"reached by the others: start it where all reach it, and name it in the reward's url (docs/rewards.md)"
        )
    found, error = None, None
    with contextlib.ExitStack() as stack:
        if dist.get_rank() == 0:
            try:
                logs = Path(config.train.run_dir) / DIRECTORY
                found = stack.enter_context(started(config, logs, ranks=world, say=note, later=later))
            except Exception as caught:
                error = caught
        agree(error, world_group)
        yield broadcast_object(found, 0, world_group)


@contextlib.contextmanager
def started(
    config: RunConfig,
    logs: Path,
    *,
    ranks: int,
    say: Callable[[str], None],
    later: Callable[[str], None] | None = None,
) -> Iterator[RewardServers]:
    """Those of ``[reward_server]`` on this machine, healthy and looked after; ``ranks`` train here. ``later``: as in
    ``reward_servers``, by default ``say``."""
    settings, device = config.reward_server, here().device_type
    rollout = as_rollouts(config)
    servers: LocalServers = local_servers(rollout)(
        rollout,
        settings.model,
        logs,
        device=device,
        dtype=dtype_of(config, device),
        seed=config.train.seed,
        placement=placed(config, ranks=ranks, cards=torch.cuda.device_count() if here() is CUDA else 0),
        purpose=PURPOSES[settings.kind],
    )
    with contextlib.ExitStack() as stack:
        with starting_servers(rollout, device, say, f"for {settings.model}"):
            stack.enter_context(servers)
        stack.enter_context(Guard(servers, later or say))
        yield RewardServers(servers.urls, servers.key)


def dtype_of(config: RunConfig, device: str) -> str:
    """What they compute in on a device, "cpu" or "cuda"."""
    return config.reward_server.dtype or ("float32" if device == "cpu" else "bfloat16")


def as_rollouts(config: RunConfig) -> RolloutConfig:
    """``[reward_server]`` as the launcher of local servers reads its settings."""
    settings = config.reward_server
    update = {
        "servers": (),
        "servers_from": "",
        "router": "",
        "local_servers": settings.count,
        "server_args": settings.args,
        "server_start_s": settings.start_s,
        "server_restarts": settings.restarts,
        "seeded": False,
    }
    return config.rollout.model_copy(update=update)


def placed(config: RunConfig, *, ranks: int, cards: int) -> Placement:
    """Where they lie on a machine with so many ranks and GPUs: on the last of these. Raises ConfigError."""
    settings, begin = config.reward_server, config.cards_left(ranks=ranks, cards=cards)
    args = [SHARE, f"{settings.memory:g}"] if cards else []
    if settings.tensor > 1:
        args += [SIZES["tensor"][0], str(settings.tensor)]
    first = tuple(begin + index * settings.tensor if cards else 0 for index in range(settings.count))
    return Placement(False, "reward_server.model", first, server_sizes([*args, *settings.args]), tuple(args))
