"""What the slow tests share with quick ones."""

from tests.training.conftest import quickstart

__all__ = ["quickstart"]
