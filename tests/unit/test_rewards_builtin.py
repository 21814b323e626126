"""The built-in rewards: what is right, what is wrong, what is well-formed."""

from __future__ import annotations

import json
import os
from dataclasses import replace
from decimal import Decimal
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from megatron_gspo.rewards.answers import final_answer
from megatron_gspo.rewards.arithmetic import arithmetic
from megatron_gspo.rewards.exact import exact
from megatron_gspo.rewards.gsm8k import gsm8k, is_well_formed
from megatron_gspo.rewards.numbers import parse_number
from megatron_gspo.types import Prompt, Rollout

GSM8K = Path(
    os.environ.get("MEGATRON_GSPO_GSM8K", Path(__file__).parents[3] / "shared" / "data" / "gsm8k" / "train.jsonl")
)


def case(answer: str, text: str) -> tuple[Prompt, Rollout]:
    prompt = Prompt("p", "?", (1,), answer)
    return prompt, Rollout(prompt, 0, np.ones(1, np.int32), np.zeros(1, np.float32), "stop", (0,), text)


@pytest.mark.parametrize(
    ("text", "number"),
    [
        ("42", "42"), (" 42. ", "42"), ("$1,080", "1080"), ("-$1,080.50", "-1080.50"), ("\u22127", "-7"), ("25%", "25"),
        ("25 %", "25"), (".5", "0.5"), ("007", "7"), ("+3", "3"), ("109,200,000", "109200000"), ("1.5e3", "1500"),
        ("€1\u202f080", "1080"), ("\uff14\uff12", "42"), ("**42**", "42"), ("\u0664\u0662", "42"),
    ],
)  # fmt: skip
def test_numbers_are_read_as_people_write_them(text: str, number: str) -> None:
    assert parse_number(text) == Decimal(number)


@pytest.mark.parametrize(
    "text",
    ["", "x", "4 2", "12,34", "1,0800", "1.2.3", "42 apples", "--1", "nan", "9" * 500, "20+22", "84/2", "4\u00b2",
     "1 080", "1e9999", "4**2"],
)  # fmt: skip
def test_anything_else_is_no_number(text: str) -> None:
    assert parse_number(text) is None


def test_exact_compares_the_text_and_forgives_outer_space() -> None:
    assert exact(*case("ab c", " ab c\n")) == 1
    assert exact(*case("ab c", "ab  c")) == 0


def test_arithmetic_compares_values_of_whole_responses() -> None:
    assert arithmetic(*case("1080", "$1,080.0")) == 1
    assert arithmetic(*case("1080", "1081")) == 0
    assert arithmetic(*case("1080", "it is 1080")) == 0
    with pytest.raises(ValueError, match="'many' is not a number"):
        arithmetic(*case("many", "3"))


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        ("6 and 7\n#### 42", "42"),
        ("#### 1\n\\boxed{2} 3\n#### 42 apples\nso 5", "42"),
        (r"\boxed{1} then \boxed{\frac{84}{2}}, that is 9", "42"),
        (r"never closed \boxed{42 and then 7", "7"),
        ("so it costs $1,200.50 in total.", "1200.5"),
        ("from 45-3", "42"),
        ("it fell to -7", "-7"),
        ("#### ", None),
        ("no idea", None),
    ],
)
def test_the_final_answer_is_marked_else_boxed_else_the_last_number(text: str, answer: str | None) -> None:
    found = final_answer(text)
    assert (found and found.exact) == (Fraction(answer) if answer else None)


@pytest.mark.parametrize("reward", [exact, arithmetic, gsm8k])
@pytest.mark.parametrize(
    ("prompt", "text", "score"),
    [
        ("?", "<think>41</think>\n42", 1),
        ("?", "<think>42</think>\n41", 0),
        ("?", "<think>a</think><think>b</think>42", 1),
        ("?", "<think>42", 0),
        ("?<think>\n", "42", 0),
        ("?<think>\n", "41, no</think>42", 1),
        ("?<think></think>", "42", 1),
    ],
)
def test_only_what_follows_the_last_end_of_thinking_is_graded(reward: Any, prompt: str, text: str, score: int) -> None:
    asked, response = case("42", text)
    assert reward(replace(asked, text=prompt), response) == score


@pytest.mark.parametrize(
    "text",
    ["#### 42", "#### $42.00", "#### 42 apples", "#### 42%", r"\boxed{42}", r"\boxed{42\text{ km}}", r"\boxed{\$42}",
     r"\boxed{x = 42}", r"\boxed{\frac{84}{2}}", r"\boxed{6 \times 7}", r"\boxed{84/2}", "It is 42.", "$42$"],
)  # fmt: skip
def test_a_right_answer_in_any_form_gets_1(text: str) -> None:
    assert gsm8k(*case("6x7\n#### 42", text)) == 1


@pytest.mark.parametrize(
    "text",
    ["", "#### ", "#### 43", "#### -42", "#### 42 or 43", "#### 4.2", "42\n#### 43", r"\boxed{\frac{84}{0}}",
     r"\boxed{2^{2^{2^{2^{2^{9}}}}}}", r"\boxed{9**9**9**9**9}", r"\boxed{99999999!}", r"\boxed{(((}",
     r"\boxed{" * 20_000, "#### " + "4" * 100_000, "#### " + "1+" * 200_000 + "1", "#### " + "a " * 50_000],
)  # fmt: skip
@pytest.mark.timeout(120)
def test_a_wrong_or_hostile_answer_gets_0_and_soon(text: str) -> None:
    assert gsm8k(*case("#### 42", text)) == 0


@pytest.mark.parametrize(
    ("text", "reward"),
    [
        ("6x8\n#### 48", 0.1),
        ("#### 48\n", 0.1),
        ("#### $1,048.50", 0.1),
        ("6x7\n#### 42", 1.0),
        ("it is 42", 1.0),
        ("so #### 48", 0.0),
        ("####48", 0.0),
        ("#### 48 or 49", 0.0),
        ("#### 48\nand on", 0.0),
        ("48", 0.0),
    ],
)
def test_a_wrong_answer_in_the_right_form_gets_the_format_reward(text: str, reward: float) -> None:
    assert gsm8k(*case("#### 42", text), format_reward=0.1) == reward
    assert is_well_formed(text) == (text in ("6x7\n#### 42",) or reward == 0.1)


def test_useless_references_and_options_are_errors() -> None:
    with pytest.raises(ValueError, match="'no number here' ends in no number"):
        gsm8k(*case("no number here", "42"))
    with pytest.raises(ValueError, match=r"format_reward = 1 is not in \[0, 1\)"):
        gsm8k(*case("#### 42", "42"), format_reward=1)


@pytest.mark.skipif(not GSM8K.is_file(), reason="needs GSM8K's train.jsonl ($MEGATRON_GSPO_GSM8K)")
def test_each_gsm8k_reference_grades_1_and_another_ones_0() -> None:
    rows = [json.loads(line)["answer"] for line in GSM8K.read_text(encoding="utf-8").split("\n") if line]
    assert len(rows) == 7473
    right = [Decimal(row.rpartition("#### ")[2].replace(",", "")) for row in rows]
    for row, other, mine, others in zip(rows, rows[1:] + rows[:1], right, right[1:] + right[:1], strict=True):
        assert gsm8k(*case(row, row), format_reward=0.1) == 1, row
        assert gsm8k(*case(row, other), format_reward=0.1) == (1 if mine == others else 0.1), (row, other)
        assert is_well_formed(row)
    for row, mine in zip(rows[::25], right[::25], strict=True):
        solution = row.rpartition("#### ")[0]
        assert gsm8k(*case(row, f"The answer is ${mine:,}.")) == 1, row
        assert gsm8k(*case(row, rf"{solution}\boxed{{{mine}}}")) == 1, row
        for wrong in (mine + 1, -mine - 1, mine * 10 + 1):
            assert gsm8k(*case(row, f"{solution}#### {wrong:,}"), format_reward=0.1) == 0.1, row
