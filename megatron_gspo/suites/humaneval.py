"""HumanEval (Chen et al. 2021, arXiv 2107.03374): 164 functions to complete."""

from __future__ import annotations

from megatron_gspo.suites.base import Draw, Fields, Problem, Source, Suite, text

INSTRUCTION = "Complete the following Python function. Answer with the whole function in one fenced block."


def read(fields: Fields) -> Problem:
    """``task_id``, ``prompt``, ``test`` and ``entry_point``; the row goes to the grader without its solution."""
    statement = text(fields, "prompt")
    for name in ("test", "entry_point"):
        text(fields, name)
    kept = {name: value for name, value in fields.items() if name != "canonical_solution"} | {"code_prompt": statement}
    question = f"{INSTRUCTION}\n\n```python\n{statement.rstrip()}\n```"
    return Problem(text(fields, "task_id"), statement, question, "", kept)


HUMANEVAL = Suite(
    "humaneval",
    "HumanEval",
    (
        Source("openai/openai_humaneval", {"test-*.parquet": 164}),
        Source("openai/human-eval", {"HumanEval.jsonl.gz": 164}, where="data/ of that repository"),
    ),
    read,
    Draw(1, 0.0, max_tokens=4096, source="one greedy response"),
    "code",
)
