"""A checksum's word that a push reached every parameter of every server."""

from __future__ import annotations

from collections.abc import Sequence

from megatron_gspo.errors import SyncError
from megatron_gspo.sync.servers import Servers

Checksums = list[dict[str, str]]
"""Of a server's tensor-parallel ranks: parameter, as the server fuses and names them -> hash of its bytes."""


class Reset:
    """Random numbers in place of a server's weights, made before a push, and what they hash to.

    Equal checksums alone would say nothing of one server, and a version says nothing of tensors. After a reset, a
    parameter that keeps its hash was not reached, and one that was reached in part differs between servers.
    """

    def __init__(self, servers: Servers) -> None:
        """Overwrites the weights. Raises SyncError when a server cannot."""
        self._servers = servers
        servers.post("/weights_checker", {"action": "reset_tensors"})
        self._before = servers.checksums()

    def check(self) -> None:
        """Raises SyncError for parameters that the push did not reach, or that servers hold differently."""
        after = self._servers.checksums()
        for url, old, new in zip(self._servers.urls, self._before, after, strict=True):
            check_reached(url, old, new)
        check_same(self._servers.urls, after)


def check_reached(url: str, before: Checksums, after: Checksums) -> None:
    """Raises SyncError unless every parameter's hash has changed."""
    if not all(after) or not after:
        raise SyncError(f"{url}/weights_checker gave no checksums, which sync.verify needs")
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
