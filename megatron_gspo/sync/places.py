"""Whose memory a server can open: that of trainer ranks on its machine, and on GPUs that of the rank on its card."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from megatron_gspo.errors import SyncError
from megatron_gspo.sync.backend import is_here, tensor_cards

ServerRank = tuple[int, int]
"""A server's index, and one of its tensor-parallel ranks."""


@dataclass(frozen=True)
class ServerPlace:
    """Where a server's tensor-parallel ranks are."""

    url: str
    device: str
    """ "cpu" or "cuda", as the server says."""
    cards: tuple[int, ...]
    """GPU of each tensor-parallel rank, as its machine numbers them; on a CPU only their number counts."""
    stages: int = 1
    """Pipeline-parallel size: ranks of several stages read the same handle."""


def places(urls: Sequence[str], infos: Sequence[Mapping[str, Any]]) -> list[ServerPlace]:
    """Of servers with these settings (``/server_info``)."""
    return [
        ServerPlace(url, str(info.get("device")), tensor_cards(info), int(info.get("pp_size") or 1))
        for url, info in zip(urls, infos, strict=True)
    ]


def within_reach(servers: Sequence[ServerPlace], card: int | None) -> list[ServerRank]:
    """Server ranks that can open this trainer rank's memory: a GPU server's on ``card`` of this machine (None: this
    rank has no GPU), a CPU server's anywhere on it."""
    return [
        (index, rank)
        for index, server in enumerate(servers)
        if is_here(server.url)
        for rank, its_card in enumerate(server.cards)
        if server.device != "cuda" or its_card == card
    ]


def assign(reach: Sequence[Sequence[ServerRank]]) -> dict[ServerRank, int]:
    """The trainer rank that shares its memory with each server rank: of ``reach[trainer rank]``, the first. Server
    ranks that nobody reaches are left out."""
    first: dict[ServerRank, int] = {}
    for trainer, ranks in enumerate(reach):
        for server_rank in ranks:
            first.setdefault(server_rank, trainer)
    return first


def out_of_reach(servers: Sequence[ServerPlace], assigned: Mapping[ServerRank, int]) -> list[str]:
    """In words, the server ranks that no trainer rank shares memory with."""
    return [
        f"{server.url} (tensor rank {rank}{f', GPU {card}' if server.device == 'cuda' else ''})"
        for index, server in enumerate(servers)
        for rank, card in enumerate(server.cards)
        if (index, rank) not in assigned
    ]


def check_readers(servers: Sequence[ServerPlace]) -> None:
    """Raises SyncError for servers that handles are not for."""
    for server in servers:
        if server.stages > 1:
            raise SyncError(
                f"{server.url} has {server.stages} pipeline stages, which would open each handle several times: "
                f'sync.method = "distributed"'
            )
        if server.device != servers[0].device:
            raise SyncError(
                f"{servers[0].url} computes on {servers[0].device!r} and {server.url} on {server.device!r}: handles of "
                f'one kind of memory reach one of them (sync.method = "distributed" reaches both)'
            )


def check_reach(servers: Sequence[ServerPlace], assigned: Mapping[ServerRank, int]) -> None:
    """Raises SyncError for server ranks that no trainer rank shares memory with."""
    if missing := out_of_reach(servers, assigned):
        raise SyncError(
            f"{missing[0]} and {len(missing) - 1} more share no memory with a trainer rank: on GPUs a server's rank "
            f"opens memory of the trainer rank on its own card, on CPUs of one on its machine "
            f'(sync.method = "distributed" reaches servers anywhere)'
        )
