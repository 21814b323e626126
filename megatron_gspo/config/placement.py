"""Where trainer and rollout servers lie: on GPUs of their own, or in turns on the same ones."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from megatron_gspo.config.rollouts import RolloutConfig
from megatron_gspo.config.servers import BASE, SAVER, SHARE, SIZES, ServerSizes, named_sizes, server_sizes
from megatron_gspo.errors import ConfigError
from megatron_gspo.section import Positive, Section

MEMORY = {"apart": 0.8, "colocated": 0.5}
"""Of a card, what a server's weights and cache take while it is awake. The rest of a card of its own is for what it
computes with and for CUDA graphs; beside a trainer, also for the trainer's weights."""
FLAGS = {
    "tensor": SIZES["tensor"][0],
    "expert": SIZES["expert"][0],
    "attention_data": SIZES["attention_data"][0],
    "memory": SHARE,
}
"""Setting -> its flag of a server's command line."""


@dataclass(frozen=True)
class Placement:
    """What ``[placement]`` comes to on a machine."""

    colocated: bool
    """Trainer and servers take turns on the same cards."""
    why: str
    """Why it is so, for a person."""
    first_cards: tuple[int, ...] = ()
    """Of each local server; zeros on a CPU, and none where running servers are named."""
    sizes: ServerSizes = field(default_factory=ServerSizes)
    """Of each local server."""
    server_args: tuple[str, ...] = ()
    """What a local server is told, before ``rollout.server_args``."""

    @property
    def mode(self) -> Literal["apart", "colocated"]:
        """In a word."""
        return "colocated" if self.colocated else "apart"

    def record(self) -> dict[str, Any]:
        """For the manifest."""
        return {"mode": self.mode, "why": self.why, "server_cards": sorted(self.cards)}

    @property
    def cards(self) -> frozenset[int]:
        """GPUs of the local servers, if they run on some."""
        size = self.sizes.cards
        return frozenset(first + card for first in self.first_cards for card in range(0, size, self.sizes.step))

    @property
    def share(self) -> float:
        """Of each of ``cards``, what a server's weights and cache take."""
        return MEMORY[self.mode] if self.sizes.share is None else self.sizes.share


class PlacementConfig(Section):
    """Which GPUs train and which serve. On CPUs there is nothing to place, and ``gpus`` and ``memory`` do nothing."""

    mode: Literal["auto", "apart", "colocated"] = "auto"
    """"apart": servers on other GPUs than the trainer's ranks, or machines of their own. "colocated": on the ranks'
    GPUs, in turns: a server's weights and cache leave the GPU while the trainer computes, and the trainer's gradients
    and optimizer states go to host memory while the servers do. "auto": apart on CPUs, for servers that
    ``rollout.servers`` names, and where this machine has GPUs left for a server; else colocated. Named servers are
    colocated only where this says so, and must have been started with ``--enable-memory-saver``."""
    gpus: Positive | None = None
    """GPUs of this machine that local servers take, a multiple of a server's. Absent: those that the ranks leave, or,
    colocated, the ranks'; and with ``rollout.local_servers``, as many as these need."""
    tensor: Positive = 1
    """Tensor-parallel ranks of a local server, each on a GPU."""
    expert: Positive = 1
    """Of the tensor ranks, expert-parallel ones: each holds 1/expert of the experts whole."""
    attention_data: Positive = 1
    """Of the tensor ranks, groups that each attend to other requests: 1/attention_data of the keys and values each."""
    memory: Annotated[float, Field(gt=0.0, lt=1.0)] | None = None
    """Of a GPU's memory, what a local server's weights and cache take while it is awake. Absent: 0.8 apart, 0.5
    colocated, where the trainer's weights lie beside them."""

    @model_validator(mode="after")
    def _check(self) -> PlacementConfig:
        for name in ("expert", "attention_data"):
            if self.tensor % getattr(self, name):
                raise ValueError(
                    f"{name} = {getattr(self, name)} does not divide tensor = {self.tensor}: it is drawn from a "
                    f"server's tensor ranks"
                )
        return self

    def check_args(self, server_args: Sequence[str]) -> None:
        """Raises ConfigError, with both names, for a size that ``rollout.server_args`` contradict."""
        named = named_sizes(server_args)
        for name, flag in FLAGS.items():
            ours, theirs = getattr(self, name), named.get("share" if name == "memory" else name)
            if ours != type(self).model_fields[name].default and theirs not in (None, ours):
                raise ConfigError(
                    f"placement.{name} = {ours:g}, and rollout.server_args say {flag} {theirs:g}: keep one of them"
                )

    def resolved(self, rollout: RolloutConfig, *, ranks: int, cards: int, cpu_servers: int = 1) -> Placement:
        """What this comes to.

        Args:
            rollout: The section; its ``server_args`` win.
            ranks: Of this machine, each on a card if there are any; 0 where nothing is trained.
            cards: GPUs of this machine, 0 on a CPU.
            cpu_servers: As many are started on a CPU.

        Raises ConfigError for what is not there, or contradicts itself.
        """
        self.check_args(rollout.server_args)
        args, sizes = self._flags(), self.sizes(rollout)
        if rollout.named:
            colocated = self.mode == "colocated"
            why = 'placement.mode = "colocated"' if colocated else "running servers are named"
            return Placement(colocated, why)
        if not cards:
            colocated = self.mode == "colocated"
            why = 'placement.mode = "colocated"' if colocated else "there is no GPU to share"
            return Placement(colocated, why, (0,) * cpu_servers, sizes, tuple(args))
        colocated, why = self._mode(sizes, rollout.local_servers or 1, ranks, cards)
        first = self._first_cards(rollout, sizes, ranks if not colocated else 0, ranks if colocated else cards, cards)
        share = MEMORY["colocated" if colocated else "apart"] if self.memory is None else self.memory
        args += [SHARE, f"{share:g}", *([SAVER] if colocated else [])]
        return Placement(colocated, why, first, server_sizes([*args, *rollout.server_args]), tuple(args))

    def sizes(self, rollout: RolloutConfig) -> ServerSizes:
        """Of each local server; what ``rollout.server_args`` say wins. Raises ConfigError."""
        return server_sizes([*self._flags(), *rollout.server_args])

    def _flags(self) -> list[str]:
        return [word for name in ("tensor", "expert", "attention_data") for word in self._flag(name)]

    def _flag(self, name: str) -> list[str]:
        value = getattr(self, name)
        return [FLAGS[name], str(value)] if value > 1 else []

    def _mode(self, sizes: ServerSizes, servers: int, ranks: int, cards: int) -> tuple[bool, str]:
        """Whether servers share the ranks' cards, and why."""
        if sizes.base is not None:
            shared = sizes.base < ranks
            where = f"{BASE} {sizes.base} is {'one' if shared else 'none'} of the ranks' {ranks} cards"
            if self.mode == ("apart" if shared else "colocated"):
                raise ConfigError(
                    f'placement.mode = "{self.mode}", and in rollout.server_args {where}: keep one of them'
                )
            return shared, where
        if self.mode != "auto":
            return self.mode == "colocated", f'placement.mode = "{self.mode}"'
        left, needed = max(0, cards - ranks), self.gpus or sizes.cards * servers
        return left < needed, f"the ranks take {ranks} of {cards} cards, and the servers need {needed} at least"

    def _first_cards(
        self, rollout: RolloutConfig, sizes: ServerSizes, begin: int, end: int, cards: int
    ) -> tuple[int, ...]:
        """Of each server, one server's cards behind the other's, by default on those from ``begin`` to ``end``."""
        size, servers = sizes.cards, rollout.local_servers
        if self.gpus is not None:
            if self.gpus % size:
                raise ConfigError(f"placement.gpus = {self.gpus} is no multiple of a server's {size} card(s)")
            if servers not in (None, self.gpus // size):
                raise ConfigError(
                    f"placement.gpus = {self.gpus} are {self.gpus // size} server(s) of {size} card(s), and "
                    f"rollout.local_servers = {servers}: keep one of them"
                )
            servers = self.gpus // size
        if sizes.base is not None and (servers or 1) > 1:
            raise ConfigError(
                f"rollout.server_args: {BASE} {sizes.base} puts all {servers} local servers on the same cards: "
                f"leave it out, and each begins behind the one before"
            )
        first = begin if sizes.base is None else sizes.base
        servers = servers or (1 if sizes.base is not None else max(1, (end - first) // size))
        if first + servers * size > cards:
            raise ConfigError(_too_few(servers, size, first, cards))
        return tuple(first + index * size for index in range(servers))


def _too_few(servers: int, size: int, first: int, cards: int) -> str:
    begin, needed = f" from card {first} on" if first else "", first + servers * size
    return (
        f"rollout: {servers} local server(s) of {size} card(s) each{begin} need {needed} cards, and this "
        f"machine shows {cards}: fewer rollout.local_servers, a smaller placement.tensor, placement.mode = "
        '"colocated", or servers named in rollout.servers'
    )
