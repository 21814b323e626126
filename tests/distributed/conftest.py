"""The ranks that every test of this directory runs on."""

from __future__ import annotations

import pytest

from tests.pool import RankPool


@pytest.fixture(scope="session")
def ranks() -> RankPool:
    return RankPool()
