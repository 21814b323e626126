"""A comparison of runs: what is kept of each cell, what may be said of them all, and the page that says it."""

from megatron_gspo.report.comparison.digests import digest
from megatron_gspo.report.comparison.page import draw

__all__ = ["digest", "draw"]
