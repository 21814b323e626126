"""Tests of programs: one noun, and a reader for each published layout of them."""

from megatron_gspo.rewards.cases.formats import FORMATS, TestsFormat, read_problem
from megatron_gspo.rewards.cases.tests import Asserts, Call, Calls, Problem, Row, Stdin

__all__ = ["FORMATS", "Asserts", "Call", "Calls", "Problem", "Row", "Stdin", "TestsFormat", "read_problem"]
