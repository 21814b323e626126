r"""Answers of mathematics, held to what public graders' tests say of them, and to what competitions' answers look like.

``data/graded_answers.jsonl`` has a row for each pair: where it is from, the reference, what a model wrote ("response"),
or the answer alone, which is put into a box ("answer"); "theirs", the verdict of that source; "equal", ours; and where
the two differ "why". Its pairs are facts taken from the tests of:

Math-Verify 5d148cf, hendrycks/math 985bdc1, NeMo-Skills, miles, AReaL, open-instruct, TRL, MindSpeed-RL. Rows of the
source "own" are ours.
"""

from __future__ import annotations

import json
import time
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings

from megatron_gspo.config import RewardConfig
from megatron_gspo.rewards import verifier
from megatron_gspo.rewards.choice import choice
from megatron_gspo.rewards.interface import Stopped
from megatron_gspo.rewards.math import math, reference
from megatron_gspo.rewards.references import ReferenceCheck
from megatron_gspo.rewards.registry import resolve_reward
from megatron_gspo.rewards.stated import stated_answer
from megatron_gspo.rewards.tidy import tidy
from megatron_gspo.rewards.verifier import StoppedError
from megatron_gspo.types import Prompt, Rollout
from tests.unit.test_rewards_grading import HOSTILE

TABLE = [
    json.loads(line)
    for line in (Path(__file__).parent / "data" / "graded_answers.jsonl").read_text(encoding="utf-8").splitlines()
]


def grade(answer: str, text: str, prompt_text: str = "?") -> float:
    prompt = Prompt("p", prompt_text, (1,), answer)
    return math(prompt, Rollout(prompt, 0, np.ones(1, np.int32), np.zeros(1, np.float32), "stop", (0,), text))


def response(row: dict[str, Any]) -> str:
    answer = str(row.get("answer", "")).strip()
    answer += " " if answer.endswith("\\") else ""  # or it would hide the brace
    return str(row["response"]) if "response" in row else rf"\boxed{{{answer}}}"


@pytest.mark.parametrize("source", sorted({row["source"] for row in TABLE}))
def test_every_pair_of_the_table_is_graded_as_it_says(source: str) -> None:
    rows = [row for row in TABLE if row["source"] == source]
    wrong = [row for row in rows if grade(row["reference"], response(row)) != row["equal"]]
    assert wrong == []


def test_where_we_differ_from_a_source_the_row_says_why() -> None:
    differing = [row for row in TABLE if row.get("theirs", row["equal"]) != row["equal"]]
    assert all(row.get("why") for row in differing)
    rows = Counter(row["source"] for row in TABLE)
    assert sum(rows.values()) - rows["own"] >= 350 and len(differing) <= 40
    page = (Path(__file__).parents[2] / "docs" / "grading.md").read_text(encoding="utf-8")
    assert f"has {len(TABLE)} pairs with verdicts, {len(TABLE) - rows['own']} of them" in page
    assert f"On {len(differing)} of those we hold otherwise" in page
    differ = Counter(row["source"] for row in differing)
    assert differ["trl tests/test_rewards.py"] == differ["NeMo-Skills tests/test_math_equal.py"] == 0


@pytest.mark.parametrize("answer", [row["reference"] for row in TABLE if row["source"] == "own"])
def test_a_reference_answers_itself(answer: str) -> None:
    assert grade(answer, rf"\boxed{{{answer}}}") == 1
    assert grade(answer, answer) == 1, "so that references can be checked before training"


@pytest.mark.parametrize(
    ("text", "stated"),
    [
        ("no answer here", None),
        (r"\boxed{1}, then \boxed{2}", "2"),
        (r"\boxed{1}, \boxed{2} and $\boxed{3}$", "1, 2, 3"),
        (r"\boxed{1} and \boxed{1}", "1"),
        (r"\boxed{\frac{1}{2}} or so", r"\frac{1}{2}"),
        ("The answer is $x+1$, I think.", "x+1"),
        ("The answer is 3. The answer is 4.", "4"),
        ("Final Answer: The final answer is $[0,1)$. I hope it is correct.", "[0,1)"),
        ("The answer is $1$ or $2$.", "$1$ or $2$"),
        ("#### **x+1**\n", "x+1"),
        (r"#### 7" + "\n" + r"\boxed{8}", "8"),
        ("<answer> x + 1 </answer>", "x + 1"),
    ],
)
def test_where_a_text_states_its_answer(text: str, stated: str | None) -> None:
    assert stated_answer(text) == stated


@pytest.mark.parametrize(
    ("text", "form"),
    [
        (r"\dfrac12", r"\frac{1}{2}"),
        (r"\tfrac 3{4}", r"\frac{3}{4}"),
        (r"½", r"\frac{1}{2}"),
        (r"\left( 1 , 2 \right]", "( 1 , 2 ]"),
        (r"1{,}080", "1,080"),
        (r"14,\!916", "14,916"),
        (r"\mbox{ cm}^2", r"\text{ cm}^2"),
        (r"90^{\circ}", "90"),
        (r"x \leq 3", r"x \le 3"),
        (r"0.1\overline{6}", r"\frac{15}{90}"),
        (".5", ".5"),
        (r"\\frac{1}{2}", r"\frac{1}{2}"),
    ],
)
def test_spellings_of_one_answer_have_one_form(text: str, form: str) -> None:
    assert tidy(text) == form


@pytest.mark.parametrize(
    ("answer", "problem"),
    [
        ("", "empty"),
        (r"\boxed{}", None),
        ("1+" * 600, "has 1200 characters"),
        (",".join("1" * 200), "more than 120 parts"),
    ],
)
def test_a_reference_that_cannot_be_read_is_an_error_of_the_data(answer: str, problem: str | None) -> None:
    if problem is None:
        reference(answer)
    else:
        with pytest.raises(ValueError, match=problem):
            grade(answer, r"\boxed{1}")


def test_a_solution_as_reference_stands_for_its_box() -> None:
    solution = r"We have $x^2 = 4$ and $x > 0$, so $x = \boxed{2}$, as was to be shown after 3 steps."
    assert grade(solution, r"\boxed{2}") == 1 and grade(solution, r"\boxed{3}") == 0
    assert grade("6 times 7 is <<6*7=42>>42.\n#### 42", "It is 42.") == 1


def test_a_template_that_opens_the_thinking_asks_for_its_end() -> None:
    assert grade("7", r"so \boxed{7}", "Q?<think>\n") == 0
    assert grade("7", r"so \boxed{8}</think>\boxed{7}", "Q?<think>\n") == 1


class NeverEnds:
    def equal(self, expected: str, found: str) -> bool:
        raise StoppedError


def test_an_answer_that_math_verify_takes_too_long_over_is_stopped_and_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("megatron_gspo.rewards.equivalence.shared_verifier", NeverEnds)
    assert isinstance(grade("(x+1)^2", r"\boxed{x^2+2x+1}"), Stopped)
    assert not isinstance(grade("(x+1)^2", r"\boxed{(x+1)^2}"), Stopped)


@pytest.mark.parametrize(
    ("expected", "found", "equal"),
    [
        (r"1-\frac{1}{e}", r"1+\frac{1}{e}", False),
        ("x^2+2x+1", "(x+1)^2", True),
        (r"\frac{1}{3}", "0.333333", False),
        ("x+y", "y+x", True),
        ("x+1", "y+1", False),
    ],
)
def test_what_math_verify_finds_equal_has_equal_values(expected: str, found: str, equal: bool) -> None:
    assert verifier.shared_verifier().equal(expected, found) is equal


class Knows:
    """Nothing: so that what is measured is our own reading."""

    def equal(self, expected: str, found: str) -> bool:
        return False


@settings(max_examples=400, deadline=None)
@given(HOSTILE)
def test_no_text_raises_or_takes_long(text: str) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("megatron_gspo.rewards.equivalence.shared_verifier", Knows)
        for answer in ("42", r"(1,\sqrt{2})", "x+1"):
            start = time.thread_time()
            assert grade(answer, text) in (0, 1)
            assert time.thread_time() - start < 0.3


LONG = [
    "4" * 1_000_000,
    r"\boxed{" * 140_000,
    r"\boxed{1}," * 90_000,
    "#### " + "1+" * 400_000,
    "the answer is " * 70_000,
    "<answer>" * 120_000,
    "(" * 999_999,
    r"\boxed{" + "(" * 990 + "}",
    r"\boxed{" + "1," * 490 + "}",
    r"\boxed{" + r"\pm" * 300 + "}",
    r"\boxed{" + "x=" * 490 + "}",
    r"\boxed{" + r"\text{" * 150 + "}" * 151,
    r"\boxed{" + r"\frac" * 190 + "}",
]


@pytest.mark.parametrize("text", LONG, ids=lambda text: f"{text[:14]!r} {len(text)}")
def test_a_long_text_is_graded_in_linear_time(text: str) -> None:
    start = time.thread_time()
    assert grade("43", text) == grade("(1,y)", text) == 0
    assert time.thread_time() - start < 0.5


OPTIONS = ["3", "4", "5", r"\frac{1}{2}"]


def chosen(answer: str, text: str, **metadata: Any) -> float:
    prompt = Prompt("p", "?", (1,), answer, metadata=metadata)
    return choice(prompt, Rollout(prompt, 0, np.ones(1, np.int32), np.zeros(1, np.float32), "stop", (0,), text))


@pytest.mark.parametrize(
    ("answer", "text", "metadata", "reward"),
    [
        ("B", "B. 4", {"options": OPTIONS}, 1),
        ("B", "4", {"options": OPTIONS}, 1),
        ("D", r"\boxed{0.5}", {"options": OPTIONS}, 0),
        ("D", r"\boxed{\dfrac12}", {"options": OPTIONS}, 1),
        ("B", "(B) 5", {"options": OPTIONS}, 0),
        ("1", "B", {"options": OPTIONS}, 1),
        ("4", "The answer is B", {"choices": ["x", "4", "y"]}, 1),
        ("C", r"\boxed{5}", {"options": ["A) 3", "B) 4", "C) 5"]}, 1),
        ("B", "B", {"choices": {"text": ["3", "4"], "label": ["A", "B"]}}, 1),
        ("2", "B", {"choices": {"text": ["3", "4"], "label": ["1", "2"]}}, 1),
        ("2", "A", {"choices": {"text": ["3", "4"], "label": ["1", "2"]}}, 0),
        ("E", "D", {"options": {"D": "x", "E": "y"}}, 0),
        ("D", "Answer: D. None of the above", {"options": ["1", "2", "3", "None of the above"]}, 1),
        ("A", "I am not sure.", {}, 0),
        ("I", "I", {}, 1),
    ],
)
def test_one_option_is_named_by_its_letter_or_its_text(
    answer: str, text: str, metadata: dict[str, Any], reward: int
) -> None:
    assert chosen(answer, text, **metadata) == reward


def test_a_reference_that_is_no_option_is_an_error_of_the_data() -> None:
    for answer, metadata in (("E", {"options": OPTIONS}), ("42", {}), ("7", {"options": OPTIONS}), ("A or B", {})):
        with pytest.raises(ValueError, match="is no letter from A to J and no option"):
            chosen(answer, "B", **metadata)


def test_options_of_another_row_make_another_reference() -> None:
    check = ReferenceCheck(resolve_reward(RewardConfig(function="choice")), lambda text: [1] * len(text), 0)
    rows = [Prompt(str(n), "?", (1,), "4", {"options": options}) for n, options in enumerate([OPTIONS, ["1", "2"]])]
    found = check.survey(rows, range(2))
    assert set(found.problems) == {1} and "no option (A, B)" in found.problems[1]
