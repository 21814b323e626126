"""The ranks that torchrun or Slurm started, under the interface of ``ranks.LocalRanks``."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from megatron_gspo.megatron.groups import start_distributed
from megatron_gspo.parallel.exchange import agree, broadcast_object, gather_objects
from megatron_gspo.parity.ranks import LocalRanks

PIECE = 1 << 26
"""Bytes of a file that a broadcast carries."""


class WorldRanks:
    """Every rank of the world makes one and calls the same methods; all get the same results."""

    def __init__(self, device: str) -> None:
        start_distributed()
        self._gloo = dist.new_group(backend="gloo")
        self.is_first = dist.get_rank() == 0
        self._local = LocalRanks(device) if self.is_first else None
        self.device = device

    def refusal(self, ranks: int) -> str:
        """Why a layout of so many ranks cannot run; empty when it can."""
        world = dist.get_world_size()
        return "" if ranks == world else f"needs {ranks} ranks, and the world has {world}"

    def run(self, world: int, function: Callable[..., Any], *args: Any) -> list[Any]:
        """Calls ``function`` on every rank; results in rank order. A failure is every rank's."""
        error: Exception | None = None
        result = None
        try:
            result = function(*args)
        except Exception as caught:
            error = caught
        agree(error, self._gloo)
        return gather_objects(result, self._gloo)

    def once(self, function: Callable[..., Any], *args: Any) -> Any:
        """Calls ``function`` in a process of its own beside rank 0, which needs no other rank."""
        error: Exception | None = None
        result = None
        if self._local:
            try:
                result = self._local.once(function, *args)
            except Exception as caught:
                error = caught
        agree(error, self._gloo)
        return broadcast_object(result, 0, self._gloo)

    @contextmanager
    def directory(self) -> Iterator[str]:
        """Rank 0's directory for files that all ranks read; ``share`` brings them to other machines."""
        with self._local.directory() if self._local else _nothing() as path:
            yield broadcast_object(path, 0, self._gloo)
            dist.barrier(self._gloo)

    def leave(self) -> None:
        """Waits for rank 0 to have printed: torchrun ends every rank as soon as one has ended with a failure."""
        dist.barrier(self._gloo)
        dist.destroy_process_group()

    def share(self, directory: str) -> None:
        """Sends rank 0's files to the machines that do not see its directory, through each one's first rank."""
        root = Path(directory)
        names = sorted(str(p.relative_to(root)) for p in root.rglob("*") if p.is_file()) if self.is_first else None
        missing = not root.exists()
        if not any(gather_objects(missing, self._gloo)):
            return
        writes = missing and os.environ.get("LOCAL_RANK", "0") == "0"
        for name in broadcast_object(names, 0, self._gloo):
            self._send_file(root / name, writes)
        dist.barrier(self._gloo)

    def _send_file(self, path: Path, writes: bool) -> None:
        size = broadcast_object(path.stat().st_size if self.is_first else None, 0, self._gloo)
        if writes:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(b"")
        for start in range(0, size, PIECE):
            piece = torch.empty(min(PIECE, size - start), dtype=torch.uint8)
            if self.is_first:
                with path.open("rb") as file:
                    file.seek(start)
                    piece = torch.frombuffer(bytearray(file.read(PIECE)), dtype=torch.uint8)
            dist.broadcast(piece, src=0, group=self._gloo)
            if writes:
                with path.open("ab") as file:
                    file.write(piece.numpy().tobytes())


@contextmanager
def _nothing() -> Iterator[str]:
    yield ""
