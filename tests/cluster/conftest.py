"""What these tests share with those of whole runs."""

from tests.training.conftest import quickstart, ranks, server

__all__ = ["quickstart", "ranks", "server"]
