"""The card's ranks."""

from __future__ import annotations

import pytest
import torch

from tests import card
from tests.training.conftest import quickstart

__all__ = ["cards", "quickstart"]


@pytest.fixture(scope="session")
def cards() -> card.CardPool:
    if not torch.__version__.startswith(card.TRIED):
        pytest.skip(f"the device of tests/card is written against torch {', '.join(card.TRIED)}")
    card.library()
    return card.CardPool()
