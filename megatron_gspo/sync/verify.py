"""A checksum's word that a push reached every parameter of every server."""

from __future__ import annotations

import time
from collections.abc import Sequence

from megatron_gspo.errors import SyncError
from megatron_gspo.rollout.engine import Control

Checksums = list[dict[str, str]]
"""Of a server's tensor-parallel ranks: parameter, as the server fuses and names them -> hash of its bytes."""


class Reset:
    """Random numbers in place of a server's weights, made before a push, and what they hash to.

    Equal checksums alone would say nothing of one server, and a version says nothing of tensors. After a reset, a
    parameter that keeps its hash was not reached, and one that was reached in part differs between servers.
    """

    def __init__(self, servers: Control) -> None:
        """Overwrites the weights. Raises SyncError when a server cannot."""
        started = time.monotonic()
        self._servers = servers
        servers.overwrite()
        self._before = servers.checksums()
        for url, before in zip(servers.urls, self._before, strict=True):
            check_given(url, before)
        self._seconds = time.monotonic() - started

    def check(self) -> str:
        """What was checked and what it cost. Raises SyncError for parameters that the push did not reach, or that
        servers hold differently."""
        started = time.monotonic()
        after = self._servers.checksums()
        for url, old, new in zip(self._servers.urls, self._before, after, strict=True):
            check_reached(url, old, new)
        check_same(self._servers.urls, after)
        seconds = self._seconds + time.monotonic() - started
        count = len({name for ranks in after for rank in ranks for name in rank})
        return f"the sync reached each of the engine's {count} parameters (sync.verify took {seconds:.1f} s)"


def check_given(url: str, checksums: Checksums) -> None:
    """Raises SyncError for a server that has answered without checksums."""
    if not all(checksums) or not checksums:
        raise SyncError(f"{url}/weights_checker gave no checksums, which sync.verify needs")


def check_reached(url: str, before: Checksums, after: Checksums) -> None:
    """Raises SyncError unless every parameter's hash has changed."""
    check_given(url, after)
    stale = _names_where(before, after, equal=True)
    if stale:
        raise SyncError(f"{url}: the sync did not reach {len(stale)} of its parameters, first {stale[0]}")


def check_same(urls: Sequence[str], checksums: Sequence[Checksums]) -> None:
    """Raises SyncError when servers of the same tensor-parallel size hold different bytes."""
    first: dict[int, tuple[str, Checksums]] = {}
    for url, mine in zip(urls, checksums, strict=True):
        other, theirs = first.setdefault(len(mine), (url, mine))
        differ = _names_where(mine, theirs, equal=False)
        if differ:
            raise SyncError(f"{url} and {other} hold different values of {len(differ)} parameters, first {differ[0]}")


def _names_where(one: Checksums, other: Checksums, *, equal: bool) -> list[str]:
    """Parameters whose hashes on a rank are, or are not, equal in both."""
    ranks = zip(one, other, strict=True)
    return [name for mine, theirs in ranks for name in mine if (mine[name] == theirs.get(name)) is equal]
