"""A grader that stands in for the one that runs programs, where a test is about the suite."""

from __future__ import annotations

from megatron_gspo.rewards.cases import read_problem
from megatron_gspo.types import Prompt, Rollout


def code(prompt: Prompt, response: Rollout, language: str = "python", max_tests: int = 64) -> float:
    """Right when the program says so; the tests must be there to be read, all of them."""
    assert max_tests == 0 or "entry_point" in prompt.metadata
    assert len(read_problem({**prompt.metadata, "answer": prompt.answer}).tests) >= 1
    return float("```python\nright" in response.text)
