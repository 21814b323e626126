"""How processes find each other: within one machine through a file that nobody else reads and sockets on loopback.

torch's TCP store listens on every interface and asks nobody who he is. Whoever reaches it can read and change what
ranks tell each other, and torchrun's rendezvous unpickles one of its values: that is running code as the user.
"""

from __future__ import annotations

import contextlib
import os
import secrets
import socket
import tempfile
import time
from collections.abc import Iterator, Sequence
from datetime import timedelta
from pathlib import Path
from urllib.parse import urlsplit

import torch.distributed as dist
from torch.distributed import PrefixStore, Store, TCPStore  # type: ignore[attr-defined]  # public, but not marked so
from torch.distributed.rendezvous import rendezvous

from megatron_gspo.supervise import OF_RANKS, STORE, locked, remove_afterwards

_STARTS, _POLL_S = "megatron_gspo/starts", 0.05
INTERFACES = ("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME")


@contextlib.contextmanager
def private_store() -> Iterator[Path]:
    """An empty directory that only this user can read, with ``STORE`` in the environment naming a file in it."""
    before = os.environ.get(STORE)
    with tempfile.TemporaryDirectory(prefix=OF_RANKS) as directory:  # 0700
        remove_afterwards(directory)
        lock = locked(directory)
        os.environ[STORE] = f"{directory}/store"
        try:
            yield Path(directory)
        finally:
            os.close(lock)
            os.environ.pop(STORE)
            if before is not None:
                os.environ[STORE] = before


def join_world(backend: str, timeout: timedelta) -> None:
    """``init_process_group``: through the file that ``STORE`` names, else as torchrun's variables say."""
    path = os.environ.get(STORE)
    if path is None and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True":
        store, rank, world = next(rendezvous("env://", timeout=timeout))
        own = PrefixStore(name_this_start(store, rank, world, timeout.total_seconds()), store)
        dist.init_process_group(backend, store=own, rank=rank, world_size=world, timeout=timeout)
        return
    if path is None:
        dist.init_process_group(backend, timeout=timeout)
        return
    rank, world = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    store = dist.FileStore(path, world)  # type: ignore[attr-defined]
    dist.init_process_group(backend, store=store, rank=rank, world_size=world, timeout=timeout)


def name_this_start(store: Store, rank: int, world: int, timeout_s: float) -> str:
    """A name that the ranks of this start agree on, and no start before had. Each rank calls it once.

    torchrun (2.13) starts ranks again over the store of those before them, in which these have left addresses that
    nobody answers at any more: gloo would connect to them, or nccl wait for them. And torch's own count of starts
    is another one on each node. So every rank shows a name of its own, which the first one answers with its.

    Raises TimeoutError with the ranks that do not come.
    """
    own = secrets.token_hex(8)
    if rank > 0:
        store.set(f"{_STARTS}/hello/{rank}", own)
        start: str = store.get(f"{_STARTS}/start/{own}").decode()  # which waits for it
        store.set(f"{_STARTS}/here/{start}/{rank}", "")
        return start
    missing, deadline = set(range(1, world)), time.monotonic() + timeout_s
    while missing:
        for other in [other for other in missing if store.check([f"{_STARTS}/hello/{other}"])]:
            shown = store.get(f"{_STARTS}/hello/{other}").decode()  # perhaps of the start before
            store.set(f"{_STARTS}/start/{shown}", own)
            if store.check([f"{_STARTS}/here/{own}/{other}"]):
                missing.remove(other)
        if time.monotonic() > deadline:
            raise TimeoutError(f"ranks {sorted(missing)} of {world} did not come within {timeout_s:g} s")
        time.sleep(_POLL_S)
    return own


def keep_to_loopback(urls: Sequence[str] = ()) -> None:
    """Makes gloo and nccl of this process and its children listen on loopback alone, unless the environment says
    otherwise or a server in ``urls`` is on another machine."""
    if all(is_loopback(urlsplit(url).hostname or "") for url in urls):
        for name in INTERFACES:
            os.environ.setdefault(name, "lo")


def is_loopback(host: str) -> bool:
    """Whether a host's name or address is this machine's own, which no other machine reaches."""
    return host in ("localhost", "::1") or host.startswith("127.")


def listening_store(address: str, world_size: int, timeout: timedelta) -> TCPStore:
    """A store that listens on ``address`` alone, at a free port (its ``port``); other processes join it there."""
    with contextlib.ExitStack() as stack:
        listener = stack.enter_context(socket.socket(socket.AF_INET6 if ":" in address else socket.AF_INET))
        listener.bind((address, 0))
        listener.listen(128)
        store = TCPStore(
            address,
            listener.getsockname()[1],
            world_size,
            True,
            timeout,
            wait_for_workers=False,
            master_listen_fd=listener.fileno(),
        )
        listener.detach()  # the store closes it
        stack.pop_all()
    return store


def exposed_store() -> str:
    """What to say of a store of torchrun's that other machines can reach though no rank is there; empty otherwise."""
    address, port = os.environ.get("MASTER_ADDR", ""), os.environ.get("MASTER_PORT", "")
    world, local = os.environ.get("WORLD_SIZE"), os.environ.get("LOCAL_WORLD_SIZE")
    if STORE in os.environ or world is None or world != local:
        return ""
    return (
        f"the store of this world ({address}:{port}) listens on all interfaces, without authentication, though all "
        f"{world} ranks are on this machine: `megatron-gspo train` without torchrun starts ranks without one"
    )
