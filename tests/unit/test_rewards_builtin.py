"""The built-in rewards: what is right, what is wrong, what is well-formed."""

from __future__ import annotations

import json
import os
import threading
from concurrent.futures import ThreadPoolExecutor
from decimal import Decimal
from pathlib import Path

import numpy as np
import pytest

from megatron_gspo.rewards.arithmetic import arithmetic
from megatron_gspo.rewards.exact import exact
from megatron_gspo.rewards.gsm8k import final_answer, gsm8k, is_well_formed
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
        ("25 %", "25"), (".5", "0.5"), ("007", "7"), ("+3", "3"), ("109,200,000", "109200000"),
    ],
)  # fmt: skip
def test_numbers_are_read_as_people_write_them(text: str, number: str) -> None:
    assert parse_number(text) == Decimal(number)


@pytest.mark.parametrize(
    "text", ["", "x", "4 2", "12,34", "1,0800", "1.2.3", "42 apples", "--1", "1e5", "nan", "9" * 500]
)
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
        ("#### 1\n\\boxed{2} 3\n#### 42 apples\nso 5", "42 apples"),
        (r"\boxed{1} then \boxed{\frac{84}{2}}, that is 9", r"\frac{84}{2}"),
        ("#### ", ""),
        (r"never closed \boxed{42 and 7", "7"),
        ("so it costs $1,200.50 in total.", "$1,200.50"),
        ("from 45-3 to 10 - 7", "7"),
        ("it fell to -7", "-7"),
        ("45-3", "3"),
        ("no idea", None),
    ],
)
def test_the_final_answer_is_marked_else_boxed_else_the_last_number(text: str, answer: str | None) -> None:
    assert final_answer(text) == answer


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
@pytest.mark.timeout(20)
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


def test_expressions_are_judged_in_threads_too() -> None:
    """math-verify's own timeouts use signals, which only the main thread can have."""
    texts = [rf"\boxed{{\frac{{{84 * i}}}{{{2 * i}}}}}" for i in range(1, 33)]
    with ThreadPoolExecutor(8) as threads:
        rewards = list(threads.map(lambda text: gsm8k(*case("#### 42", text)), texts))
    assert rewards == [1.0] * 32
    assert threading.active_count() < 9


@pytest.mark.skipif(not GSM8K.is_file(), reason="needs GSM8K's train.jsonl ($MEGATRON_GSPO_GSM8K)")
def test_each_gsm8k_reference_grades_1_and_a_wrong_number_0() -> None:
    rows = [json.loads(line) for line in GSM8K.read_text(encoding="utf-8").split("\n") if line]
    assert len(rows) == 7473
    for row in rows:
        reference = row["answer"]
        solution, _, number = reference.rpartition("#### ")
        right = Decimal(number.replace(",", ""))
        assert gsm8k(*case(reference, reference), format_reward=0.1) == 1, reference
        assert gsm8k(*case(reference, f"The answer is ${right:,}.")) == 1, reference
        assert gsm8k(*case(reference, rf"{solution}\boxed{{{number}}}")) == 1, reference
        for wrong in (right + 1, -right - 1, right * 10 + 1):
            assert gsm8k(*case(reference, f"{solution}#### {wrong}")) == 0, reference
            assert gsm8k(*case(reference, f"{solution}#### {wrong:,}"), format_reward=0.1) == 0.1, reference
        assert is_well_formed(reference)
