"""How large a rollout server is, by its command line: ``rollout.server_args`` behind what ``[placement]`` asks for."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from megatron_gspo.errors import ConfigError

SIZES = {
    "tensor": ("--tp-size", "--tensor-parallel-size", "--tp"),
    "pipeline": ("--pp-size", "--pipeline-parallel-size", "--pp"),
    "data": ("--dp-size", "--data-parallel-size", "--dp"),
    "attention_data": ("--attn-dp-size", "--attention-data-parallel-size"),
    "expert": ("--ep-size", "--expert-parallel-size", "--ep"),
    "step": ("--gpu-id-step",),
}
BASE, SHARE = "--base-gpu-id", "--mem-fraction-static"
SAVER = "--enable-memory-saver"


@dataclass(frozen=True)
class ServerSizes:
    """What a command line says of a server's ranks.

    >>> server_sizes(["--tp-size", "4", "--attn-dp-size=2"]).cards
    4
    """

    tensor: int = 1
    pipeline: int = 1
    data: int = 1
    attention_data: int = 1
    """Of the tensor ranks, groups that each attend to other requests."""
    expert: int = 1
    step: int = 1
    """Distance of the cards of neighbouring ranks."""
    base: int | None = None
    """Its first card, where the user names it."""
    share: float | None = None
    """Of each card's memory, for weights and cache, where somebody names it."""

    @property
    def cards(self) -> int:
        """GPUs from its first to its last rank."""
        return (self.tensor * self.pipeline * self.data - 1) * self.step + 1


def server_sizes(server_args: Sequence[str]) -> ServerSizes:
    """Reads a command line as SGLang 0.5.23 does: of a flag that stands twice, the last one counts. Raises ConfigError
    for what is no size, and for a flag that it has deprecated."""
    return ServerSizes(**named_sizes(server_args))


def named_sizes(server_args: Sequence[str]) -> dict[str, Any]:
    """Field of ``ServerSizes`` -> value, of those that a command line names. Raises ConfigError."""
    if "--enable-dp-attention" in server_args:
        raise ConfigError(
            "rollout.server_args: SGLang has deprecated --enable-dp-attention; --attn-dp-size N says it alone, and "
            "--dp-size N then starts N copies of the server"
        )
    parser = argparse.ArgumentParser(
        add_help=False, allow_abbrev=False, exit_on_error=False, argument_default=argparse.SUPPRESS
    )
    for name, flags in SIZES.items():
        parser.add_argument(*flags, dest=name, type=int)
    parser.add_argument(BASE, dest="base", type=int)
    parser.add_argument(SHARE, dest="share", type=float)
    try:
        named = vars(parser.parse_known_args(list(server_args))[0])
    except argparse.ArgumentError as error:
        raise ConfigError(f"rollout.server_args: {error}") from None
    for name, flags in SIZES.items():
        if named.get(name, 1) < 1:
            raise ConfigError(f"rollout.server_args: {flags[0]} {named[name]} is no number of ranks")
    return named
