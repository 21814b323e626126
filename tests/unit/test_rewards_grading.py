r"""What a model may write: every dress of a right answer, every way to be wrong, and text that means harm."""

from __future__ import annotations

import re
import time
from collections.abc import Callable
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_gspo.rewards.arithmetic import arithmetic
from megatron_gspo.rewards.choice import choice
from megatron_gspo.rewards.exact import exact
from megatron_gspo.rewards.expressions import MAX_BITS, UnreadableError, evaluate
from megatron_gspo.rewards.gsm8k import gsm8k
from megatron_gspo.rewards.math import math
from megatron_gspo.rewards.tokens import tokenize
from megatron_gspo.types import Prompt, Rollout

PAGE = Path(__file__).parents[2] / "docs" / "grading.md"
ROW = re.compile(r"^\| (\S+) \| `(.+)` \| ([01]) \|$", re.MULTILINE)
SECTIONS = {"mathematics": math, "multiple choice": choice}


def case(answer: str, text: str) -> tuple[Prompt, Rollout]:
    prompt = Prompt("p", "?", (1,), answer)
    return prompt, Rollout(prompt, 0, np.ones(1, np.int32), np.zeros(1, np.float32), "stop", (0,), text)


def grade(answer: object, text: str) -> float:
    return gsm8k(*case(str(answer), text))


def rows() -> list[tuple[str, str, str, str]]:
    """(section, reference, response, reward) of each row of the page's tables."""
    found = []
    for section in PAGE.read_text(encoding="utf-8").split("\n## "):
        name = section.partition("\n")[0].lower()
        for answer, text, reward in ROW.findall(section):
            text = re.sub(r"<U\+(\w+)>", lambda m: chr(int(m[1], 16)), text).replace("⏎", "\n")
            found.append((name, answer, text, reward))
    return found


def test_every_row_of_the_page_is_read() -> None:
    lines = [line for line in PAGE.read_text(encoding="utf-8").split("\n") if line.startswith("| ")]
    assert len(rows()) == len([line for line in lines if not line.startswith("| reference")]) >= 75


@pytest.mark.parametrize(("section", "reference", "text", "reward"), rows())
def test_an_answer_gets_what_the_page_says(section: str, reference: str, text: str, reward: str) -> None:
    assert SECTIONS.get(section, gsm8k)(*case(reference, text)) == int(reward)


DRESS: dict[str, Callable[[int], str]] = {
    "marked": lambda n: f"so\n#### {n:,}",
    "marked in bold": lambda n: f"#### **{n}**.",
    "marked with a name": lambda n: f"#### Final answer: {n}",
    "marked on the next line": lambda n: f"####\n\n{n}",
    "boxed": lambda n: rf"That is \boxed{{{n}}} after 3 days.",
    "boxed in TeX": lambda n: rf"\[ \fbox{{$x = \mathbf{{{n}}}$}} \]",
    "boxed with a unit": lambda n: rf"\boxed{{{n}\,\text{{ km}}^2}}",
    "dollars": lambda n: f"It costs ${n:,}.00 in total.",
    "TeX dollars": lambda n: rf"\boxed{{\${n}}}",
    "euros behind": lambda n: f"{n}\u00a0€",
    "pounds": lambda n: f"It is £{n:,}!",
    "percent": lambda n: rf"\boxed{{{n}\%}}",
    "degrees": lambda n: rf"${n}^\circ$C",
    "apples": lambda n: f"So they have {n} red apples.",
    "thin spaces": lambda n: f"{n:,}".replace(",", "\u202f"),
    "TeX thousands": lambda n: f"${n:,}$".replace(",", r"\,"),
    "braced commas": lambda n: rf"\boxed{{{n:,}}}".replace(",", "{,}"),
    "Unicode minus": lambda n: f"{n}".replace("-", "\u2212"),
    "en dash as minus": lambda n: f"#### {n}".replace("-", "\u2013"),
    "full width": lambda n: "".join(chr(ord(c) + 0xFEE0) if c.isdigit() else c for c in str(n)),
    "a fraction": lambda n: rf"\boxed{{\dfrac{{{n * 6}}}{{6}}}}",
    "a mixed number that is doubled": lambda n: rf"\boxed{{2 \times {abs(n) // 2}\frac{{1}}{{2}} \times {_sign(n)}}}",
    "scientific": lambda n: f"{n / 1000}e3" if n % 10 else f"{n // 10}e1",
    "TeX scientific": lambda n: rf"${n / 100:.2f}\times 10^{{2}}$",
    "an equation": lambda n: f"**Total:** {n - 5} + 5 = **{n}**",
    "after thinking": lambda n: f"<think>maybe {n + 1}</think>{n}",
    "HTML": lambda n: f"<answer><b>{n}</b></answer>",
    "decimals": lambda n: f"{n}.0",
}


def _sign(n: int) -> str:
    return "(-1)" if n < 0 else "1"


@pytest.mark.parametrize("dress", DRESS)
def test_a_right_answer_in_any_dress_gets_1_and_a_wrong_one_0(dress: str) -> None:
    draw = np.random.default_rng(len(dress))
    right = wrong = 0
    for n in [int(n) * 2 + 1 for n in draw.integers(-40_000, 40_000, 40)]:  # odd: for the mixed number
        right += grade(n, DRESS[dress](n)) == 1
        other = n + 2 * int(draw.choice([-50, -1, 1, 10, -n]))
        wrong += grade(other, DRESS[dress](n)) == 0
    assert (right, wrong) == (40, 40)


MATHEMATICS = (
    r"#### @\boxed{@\fbox{@{@}@(@)@[@\frac{@\sqrt{@\sqrt[3]{@\text{@\log_{@\pi@^@^{@_@_{@**@*@__@!@%@\%@$@\$@=@<@>@~@&"
    r"@|@+@-@/@\times @\cdot @\\@\@,@{,}@\,@.@:@;@ @ or @ and @ is @x@e@k@ million@<think>@</think>@<sup>@</sup>@<<@>>"
    r"@4@42@0@9@1/2@1e308@1e999@9^9@.5@\left(@\right)@\begin{a}@\binom{@\circ"
)
UNICODE = (
    "\n\x00\ud800\u202f\u2212\u2013\u00bd\u00b2\u2082\u221a\u00d7\u0300\u0664\U0001d7d2\u56db\u2461\u2779\u200b"
    "\U0001f600"
)
PIECES = st.sampled_from([*MATHEMATICS.split("@"), *UNICODE])
HOSTILE = st.builds(
    lambda start, pieces, times, end: start + "".join(pieces) * times + end,
    st.sampled_from(["", "#### ", r"\boxed{", "42 ", "<think>", "a" * 999]),
    st.lists(PIECES, min_size=1, max_size=12),
    st.sampled_from([1, 1, 2, 3, 20, 100, 1000, 20_000]),
    st.sampled_from(["", "42", "}", "}" * 50, ")" * 50, "\n#### 7", " 42 x"]),
) | st.text(max_size=200)


@settings(max_examples=1000)
@given(HOSTILE)
def test_no_text_raises_or_takes_long(text: str) -> None:
    for reward in (gsm8k, arithmetic, exact):
        start = time.thread_time()
        assert reward(*case("42", text)) in (0, 1)
        assert time.thread_time() - start < 0.2


@pytest.mark.parametrize(
    "text",
    ["4" * 1_000_000, "#### " + "4" * 1_000_000, r"\boxed{" * 140_000, "#### " + "1+" * 400_000, "(" * 999_999,
     "<" * 999_999,
     "<<" * 499_999, "9," * 499_999, "####\n" * 199_999, "a1\n" * 333_333, "42" + " " * 999_997 + "x", "^2" * 499_999,
     "<|channel|>" * 90_000, "\ud800" * 999_999, "42" * 5_000_000, "x" + "\n" * 999_000 + "#### 4_", "٤" * 999_999,
     "#### 1" + "\n" * 999_000, "#### " + "1 or " * 190_000, "\\" * 999_999, r"\boxed{" + "{" * 999_000],
    ids=lambda text: f"{text[:12]!r} {len(text)}",
)  # fmt: skip
def test_a_long_text_is_graded_in_linear_time(text: str) -> None:
    for reward in (gsm8k, arithmetic, exact):
        start = time.thread_time()
        assert reward(*case("43", text)) == 0
        assert time.thread_time() - start < 0.2


numbers = st.fractions(min_value=-999, max_value=999, max_denominator=99)


@settings(max_examples=50)
@given(
    st.recursive(
        numbers.map(lambda n: (f"({n.numerator}/{n.denominator})", n)),
        lambda inner: st.tuples(inner, st.sampled_from("+-*/"), inner).map(lambda parts: combine(*parts)),
        max_leaves=8,
    )
)
def test_rational_arithmetic_is_exact(case: tuple[str, Fraction | None]) -> None:
    text, value = case
    if value is None:
        with pytest.raises(UnreadableError):
            evaluate(tokenize(text))
    else:
        assert evaluate(tokenize(text)).exact == value


def combine(
    left: tuple[str, Fraction | None], sign: str, right: tuple[str, Fraction | None]
) -> tuple[str, Fraction | None]:
    text = f"({left[0]}{sign}{right[0]})"
    (_, a), (_, b) = left, right
    if a is None or b is None or (sign == "/" and b == 0):
        return text, None
    return text, {"+": a + b, "-": a - b, "*": a * b, "/": a / b if b else None}[sign]


@pytest.mark.parametrize("text", ["2^2047", "(1/2)^2000", "300!", "2^(2^3)^2"])
def test_what_fits_the_limits_has_a_value(text: str) -> None:
    assert evaluate(tokenize(text)).exact is not None


@pytest.mark.parametrize(
    "text",
    [
        f"2^{MAX_BITS + 1}",
        "9^9^9^9",
        "301!",
        "3!!",
        "1e400*1e999",
        "(" * 14 + "1" + ")" * 14,
        "1/0",
        "0^-1",
        "1+" * 80 + "1",
        "2^2^2^2^2^2",
        "(-1)^(1/2)",
        r"\sqrt{-4}",
        r"\sqrt[0]{4}",
        r"\ln{0}",
        "--1",
    ],
)
def test_what_exceeds_them_or_has_no_value_is_unreadable(text: str) -> None:
    with pytest.raises(UnreadableError):
        evaluate(tokenize(text))


@pytest.mark.parametrize(
    ("reference", "text", "reward"),
    [
        *[(42, "|-42|", 1), (-42, "|-42|", 0), (42, r"\boxed{\left|-42\right|}", 1)],
        *[(-42, "| total | -42 |", 1), (-42, "|total|-42|", 1)],
    ],
)
def test_bars_around_a_number_take_its_sign_and_those_of_a_table_do_not(reference: int, text: str, reward: int) -> None:
    assert grade(reference, text) == reward


@pytest.mark.parametrize(
    "text",
    [
        "\\boxed{41}, no: \\boxed{42}",
        "\\boxed{41}\n\nWait. \\boxed{42}",
        "\\boxed{42}\\boxed{42}",
        r"\boxed{\boxed{42}}",
        "It must be equal to 42.",
        "50-8",
        r"\boxed{50-8}",
        "42 oranges",
    ],
)
def test_a_correction_an_equality_and_a_difference_are_answers(text: str) -> None:
    assert grade(42, text) == 1
