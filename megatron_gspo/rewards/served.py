"""Whom a reward asks: servers at addresses that its options name, or those that the run has started."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from megatron_gspo.config import RewardConfig
from megatron_gspo.config.reward_server import JUDGE_NAME
from megatron_gspo.errors import ConfigError
from megatron_gspo.rewards.asking import Service, check_urls, read_key
from megatron_gspo.rewards.interface import RewardContext

KINDS = {"reward_model": "reward_model", "judge": "judge", "judge_ranking": "judge"}
"""A reward's name -> the ``reward_server.kind`` that it asks."""


PATHS = {"reward_model": "/classify", "judge": "/v1/chat/completions"}
"""``reward_server.kind`` -> where a server that the run has started takes questions."""


@dataclass(frozen=True)
class Place:
    """Where the questions of a reward go."""

    urls: tuple[str, ...]
    """As they were given, or ``http://HOST:PORT`` of what the run has started; none where it is still to start them."""
    model: str
    """A reward model's directory, or a judge's name in requests."""
    key: str = field(default="", repr=False)
    own: bool = False
    """Whether the run starts them."""
    patience_s: float = 0.0
    """Seconds in which one that is lost may be there again."""

    def service(self, urls: Sequence[str], timeout_s: float, retries: int) -> Service:
        """A service at addresses of theirs."""
        return Service(urls, key=self.key, timeout_s=timeout_s, retries=retries, patience_s=self.patience_s)

    def chat(self, timeout_s: float, retries: int) -> Service:
        """That of chat completions, whose whole address is given where it is."""
        urls = [f"{url}{PATHS['judge']}" for url in self.urls] if self.own else self.urls
        return self.service(urls, timeout_s, retries)


def find_place(name: str, url: Any, model: Any, key_variable: str, key_file: str, context: RewardContext) -> Place:
    """Where the reward ``name`` asks: at its ``url``, or at what the run starts. Raises ConfigError where it names no
    address and the run starts no server for it."""
    if url:
        return Place(tuple(check_urls(name, url)), model, read_key(name, key_variable, key_file))
    server, kind = context.server, KINDS[name]
    if server is None or not server.model:
        raise ConfigError(
            f"reward {name!r} needs url, the address of its server, or a list of them; or reward_server.model, the "
            f"directory of what the run is to serve by itself"
        )
    if server.kind != kind:
        raise ConfigError(f'reward {name!r} asks what reward_server.kind = "{kind}" serves, and it is "{server.kind}"')
    given = {"model": model, "key_variable": key_variable, "key_file": key_file}
    if named := [option for option, value in given.items() if value]:
        raise ConfigError(f"reward {name!r}: {named[0]} is about the server at url, and no url is given: leave it out")
    found, known_as = context.servers, JUDGE_NAME if kind == "judge" else server.model
    patience_s = server.start_s if server.restarts else 0.0
    return Place(found.urls if found else (), known_as, found.key if found else "", True, patience_s)


def asks_own_servers(reward: RewardConfig) -> bool:
    """Whether a built-in reward asks the servers of ``[reward_server]``."""
    return reward.function in KINDS and not reward.options.get("url")
