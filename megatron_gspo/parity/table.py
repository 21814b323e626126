"""The table of a check, as text."""

from __future__ import annotations

from collections.abc import Sequence

from megatron_gspo.parity.verdict import COLUMNS, Row

HEADINGS = ("layout", "ranks", *COLUMNS, "verdict")


def format_table(rows: Sequence[Row]) -> str:
    """A line a layout, errors relative; below it what failed, was refused, or fell on another side of a near-tie."""
    cells = [HEADINGS, *(_cells(row) for row in rows)]
    widths = [max(len(line[column]) for line in cells) for column in range(len(HEADINGS))]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip() for line in cells]
    notes = [f"{row.verdict}: {row.layout}: {row.reason}" for row in rows if row.reason]
    notes += [f"near-ties: {row.layout}: {', '.join(row.near_ties)}" for row in rows if row.near_ties]
    counts = {verdict: sum(row.verdict == verdict for row in rows) for verdict in ("held", "failed", "refused")}
    summary = ", ".join(f"{count} {verdict}" for verdict, count in counts.items() if count)
    return "\n".join([*lines, "", *notes, summary])


def _cells(row: Row) -> tuple[str, ...]:
    errors = (f"{row.columns[name].error:.1e}" if name in row.columns else "-" for name in COLUMNS)
    return (row.layout, str(row.ranks or "-"), *errors, row.verdict)
