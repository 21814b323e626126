"""What a run and its rollout servers share."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class ServerAccess:
    """What a run and its rollout servers share, and no bystander has.

    >>> access = ServerAccess(key="secret", run="4f1c09ab")
    >>> access.version_name(7), access.version_of("7-4f1c09ab"), access.version_of("7")
    ('7-4f1c09ab', 7, None)
    """

    key: str = field(default="", repr=False)
    """Sent with every request as ``Authorization: Bearer KEY``; none when empty."""
    run: str = ""
    """Ends the names of this run's weight versions (``version_name``): a server that somebody else has given weights,
    or has started again, does not hold what this run has sent, whatever number it says."""

    def version_name(self, version: int) -> str:
        """A weight version as a server names it: "7-4f1c09ab", or "7" without ``run``."""
        return f"{version}-{self.run}" if self.run else str(version)

    def version_of(self, name: Any) -> int | None:
        """The version that ``version_name`` has named so; None for any other value."""
        number = name.removesuffix(f"-{self.run}") if isinstance(name, str) else ""
        known = number.isdecimal() and number.isascii() and len(number) < 20
        return int(number) if known and name == self.version_name(int(number)) else None


def is_of_another_run(name: Any, own: str) -> bool:
    """Whether a weight version names a run, by ``ServerAccess.version_name``, and another one than ``own`` does."""
    shape = re.compile(r"[0-9]+-([0-9a-f]+)(-[a-z]+)?")
    found, ours = (shape.fullmatch(each) if isinstance(each, str) else None for each in (name, own))
    return found is not None and (ours is None or found[1] != ours[1])


OPEN = ServerAccess()
"""Servers that ask for no key, with plain versions."""
