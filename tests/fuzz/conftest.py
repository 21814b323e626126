"""Says after `make fuzz` how many inputs of each kind were tried."""

from __future__ import annotations

from typing import Any

from tests.fuzz.mutations import COUNTS, TIMES


def pytest_terminal_summary(terminalreporter: Any) -> None:
    """Counts by file, and their sum."""
    if TIMES > 1:
        for kind, number in sorted(COUNTS.items()):
            terminalreporter.write_line(f"{number:>7,} {kind}")
        terminalreporter.write_line(f"{sum(COUNTS.values()):>7,} malformed inputs in all")
