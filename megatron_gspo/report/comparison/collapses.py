"""When a cell has collapsed."""

from __future__ import annotations

from megatron_gspo.algorithm.comparison import collapse_index
from megatron_gspo.report.comparison.cells import Cell


def collapse_step(cell: Cell) -> int | None:
    """The outer step at which the cell's reward had collapsed; None when it never did."""
    places = [
        (step, value)
        for step, value in zip(cell.outer_step, cell.series("reward/mean"), strict=False)
        if value is not None
    ]
    index = collapse_index([value for _, value in places])
    return None if index is None else places[index][0]
