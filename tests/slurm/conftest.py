"""What these tests share with those of whole runs."""

from tests.training.conftest import quickstart, ranks

__all__ = ["quickstart", "ranks"]
