"""A thousand hostile programs."""

from __future__ import annotations

from tests.sandbox import hostile_cpp, hostile_reach, hostile_resources
from tests.sandbox.cases import Case


def all_cases() -> list[Case]:
    """All of them, each with a name of its own."""
    return [*hostile_resources.cases(), *hostile_reach.cases(), *hostile_cpp.cases()]
