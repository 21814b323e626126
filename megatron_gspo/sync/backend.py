"""Over what the process group with the servers goes: nccl wants a GPU of its own for each of its members."""

from __future__ import annotations

import os
import socket
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from typing import Any, Literal
from urllib.parse import urlsplit

import torch

from megatron_gspo import platforms
from megatron_gspo.errors import SyncError

Backend = Literal["gloo", "nccl"]


def choose(
    urls: Sequence[str], infos: Sequence[Mapping[str, Any]], *, ours: bool, cards: Collection[int]
) -> tuple[Backend, str]:
    """What "auto" is, and why; no reason where trainer and servers have no GPU to share.

    Args:
        urls: Of the servers.
        infos: Their settings (``/server_info``), in the same order.
        ours: Whether this run has started them, so that they count GPUs as it does.
        cards: GPUs of this machine's trainer ranks; empty on a CPU.
    """
    if not cards:
        return "gloo", ""
    taken = Counter[tuple[str, int]]()
    for url, info in zip(urls, infos, strict=True):
        if info.get("device") != "cuda":
            return "gloo", f"{url} computes on {info.get('device')!r}"
        here, own = is_here(url), server_cards(info)
        if here and not ours:
            return "gloo", (
                f"{url} is on this machine and was not started by this run: it may share a GPU with the trainer, which "
                f'nccl refuses (sync.backend = "nccl" if it does not)'
            )
        if shared := sorted(own & set(cards)) if here else []:
            return "gloo", f"{url} shares GPU {', '.join(map(str, shared))} with the trainer, which nccl refuses"
        taken.update((urlsplit(url).hostname or "", card) for card in own)
    if twice := [f"GPU {card} of {host}" for (host, card), count in taken.items() if count > 1]:
        return "gloo", f"two servers may share {twice[0]}, which nccl refuses"
    return "nccl", "trainer and servers compute on GPUs of their own"


def trainer_cards() -> range:
    """GPUs of this machine's ranks: each has the one of its local rank (``megatron.groups``)."""
    if not platforms.here().one_rank_a_device:
        return range(0)
    return range(int(os.environ.get("LOCAL_WORLD_SIZE", "1")))


def server_cards(info: Mapping[str, Any]) -> set[int]:
    """GPUs of a server, as SGLang 0.5.23 numbers them from its settings."""
    size = {name: int(info.get(f"{name}_size") or 1) for name in ("tp", "pp", "dp")}
    first, step = int(info.get("base_gpu_id") or 0), int(info.get("gpu_id_step") or 1)
    return {first + step * rank for rank in range(size["tp"] * size["pp"] * size["dp"])}


def tensor_cards(info: Mapping[str, Any]) -> tuple[int, ...]:
    """The GPU of each tensor-parallel rank of a server with one pipeline stage, in their order."""
    first, step = int(info.get("base_gpu_id") or 0), int(info.get("gpu_id_step") or 1)
    return tuple(first + step * rank for rank in range(int(info.get("tp_size") or 1)))


def this_card() -> torch.device:
    """The GPU of this rank. (Not run on a GPU yet.) Raises SyncError where it has none."""
    if not platforms.here().one_rank_a_device:
        raise SyncError("the trainer computes on a CPU: it has no GPU memory to send from")
    return torch.device("cuda", torch.cuda.current_device())


def is_here(url: str) -> bool:
    """Whether a server's address is one of this machine: a socket can be bound to those alone."""
    try:
        found = socket.getaddrinfo(urlsplit(url).hostname or "", 0, type=socket.SOCK_DGRAM)
        family, kind, protocol, _, address = found[0]
        with socket.socket(family, kind, protocol) as probe:
            probe.bind(address)
    except OSError:
        return False
    return True
