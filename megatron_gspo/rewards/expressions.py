r"""Exact values of expressions: rational arithmetic here, roots and logarithms left to math-verify.

The grammar that is read::

    sum      := product (("+" | "-") product)*
    product  := signed (("*" | "/") signed)*
    signed   := ("-" | "+")? power
    power    := atom "!"? ("^" signed)?
    atom     := number | mixed number | (sum) | {sum} | \frac | \binom | \sqrt | \log | \ln | \pi ...

Fields and methods are named after it.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from fractions import Fraction

from megatron_gspo.rewards.tokens import Token

MAX_DEPTH = 12
"""Parentheses, braces, signs and exponents inside one another."""
MAX_BITS = 4096
"""Of a numerator or a denominator."""
MAX_TOKENS = 120
MAX_FACTORIAL = 300
MAX_IRRATIONAL_POWER = 10
MAX_LATEX = 300
"""Characters of an expression that math-verify is asked about."""

_CLOSING = {"(": ")", "{": "}"}
_ONE_ARGUMENT = {r"\ln": math.log, r"\sin": math.sin, r"\cos": math.cos, r"\tan": math.tan}
_FUNCTIONS = {r"\sqrt", r"\pi", r"\log", *_ONE_ARGUMENT}


class UnreadableError(Exception):
    """No expression, one that has no value, or one beyond the limits above."""


@dataclass(frozen=True)
class Value:
    """What an expression is worth."""

    exact: Fraction | None
    """None for what rational arithmetic cannot tell: math-verify is asked."""
    latex: str
    """The expression again, well-formed, with exact fractions for its numbers."""
    approximate: float
    """What it is about; NaN when that is not known."""

    @classmethod
    def of(cls, exact: Fraction) -> Value:
        """From what an expression gave."""
        if max(exact.numerator.bit_length(), exact.denominator.bit_length()) > MAX_BITS:
            raise UnreadableError
        whole = exact.denominator == 1
        latex = f"({exact.numerator})" if whole else rf"(\frac{{{exact.numerator}}}{{{exact.denominator}}})"
        return cls(exact, latex, _about(float, exact))

    @classmethod
    def irrational(cls, latex: str, function: Callable[..., float], *arguments: Value) -> Value:
        """``function`` computes it about from what the arguments are about."""
        if len(latex) > MAX_LATEX:
            raise UnreadableError
        return cls(None, latex, _about(function, *(argument.approximate for argument in arguments)))


def _about(function: Callable[..., float], *arguments: float | Fraction) -> float:
    try:
        return float(function(*arguments))
    except (ArithmeticError, ValueError, TypeError):  # overflow, a logarithm of 0, a complex power
        return math.nan


def evaluate(tokens: Sequence[Token]) -> Value:
    """The value of the expression that these tokens are, all of them.

    Time and memory are bounded by the limits above. Raises UnreadableError.
    """
    if not 0 < len(tokens) <= MAX_TOKENS:
        raise UnreadableError
    parser = _Parser(tokens)
    value = parser.sum(0)
    if parser.next is not None:
        raise UnreadableError
    return value


class _Parser:
    """Reads an expression from left to right; each method takes what it names, and the depth that it is at."""

    def __init__(self, tokens: Sequence[Token]) -> None:
        self.tokens = tokens
        self.at = 0

    @property
    def next(self) -> Token | None:
        return self.tokens[self.at] if self.at < len(self.tokens) else None

    def is_next(self, *kinds: str) -> bool:
        return self.next is not None and self.next.kind in kinds

    def take(self, *kinds: str) -> Token:
        token = self.next
        if token is None or token.kind not in kinds:
            raise UnreadableError
        self.at += 1
        return token

    def sum(self, depth: int) -> Value:
        if depth > MAX_DEPTH:
            raise UnreadableError
        value = self.product(depth)
        while self.is_next("+", "-"):
            sign = self.take("+", "-").kind
            value = _combine(value, sign, self.product(depth))
        return value

    def product(self, depth: int) -> Value:
        value = self.signed(depth)
        while self.next is not None:
            if self.is_next("*", "/"):
                sign = self.take("*", "/").kind
            elif self.next.kind in _FUNCTIONS or (self.next.kind == "(" and not self.next.spaced):
                sign = "*"  # 2\pi, and 6(7); "6 (7)" is a remark
            else:
                break
            value = _combine(value, sign, self.signed(depth))
        return value

    def signed(self, depth: int) -> Value:
        if self.is_next("-", "+"):
            sign = self.take("-", "+").kind
            value = self.power(depth)
            return value if sign == "+" else _combine(Value.of(Fraction(0)), "-", value)
        return self.power(depth)

    def power(self, depth: int) -> Value:
        if depth > MAX_DEPTH:
            raise UnreadableError
        base = self.atom(depth)
        if self.is_next("!"):
            self.take("!")
            base = _factorial(base)
        if not self.is_next("^"):
            return base
        self.take("^")
        return _power(base, self.signed(depth + 1))

    def atom(self, depth: int) -> Value:
        token = self.take("number", "(", "{", r"\frac", r"\binom", r"\sqrt", r"\pi", r"\log", *_ONE_ARGUMENT)
        if token.kind == "number":
            assert token.value is not None
            return self.mixed(token.value, depth)
        if token.kind in _CLOSING:
            return self.closed(token.kind, depth)
        if token.kind == r"\pi":
            return Value(None, r"\pi", math.pi)
        if token.kind == r"\frac":
            above = self.braces(depth)
            return _combine(above, "/", self.braces(depth))
        if token.kind == r"\binom":
            above = self.braces(depth)
            return _binomial(above, self.braces(depth))
        if token.kind == r"\sqrt":
            return _root(self.argument(depth), token.text)
        if token.kind == r"\log":
            return self.logarithm(depth)
        return _function(token.kind, self.argument(depth))

    def closed(self, opening: str, depth: int) -> Value:
        """What stands between an opening that was taken and its end."""
        value = self.sum(depth + 1)
        self.take(_CLOSING[opening])
        return value

    def braces(self, depth: int) -> Value:
        self.take("{")
        return self.closed("{", depth)

    def argument(self, depth: int) -> Value:
        """Of a function: {x}, (x) or a number."""
        token = self.take("(", "{", "number")
        if token.kind == "number":
            assert token.value is not None
            return Value.of(token.value)
        return self.closed(token.kind, depth)

    def logarithm(self, depth: int) -> Value:
        base = Value.of(Fraction(10))
        if self.is_next("_"):
            self.take("_")
            base = self.argument(depth)
        value = self.argument(depth)
        if base.exact is None or base.exact <= 0 or base.exact == 1 or value.exact is None or value.exact <= 0:
            raise UnreadableError
        return Value.irrational(rf"(\log_{{{base.latex}}}{{{value.latex}}})", lambda x, b: math.log(x, b), value, base)

    def mixed(self, whole: Fraction, depth: int) -> Value:
        r"""A number, and what makes it a mixed one: 1 1/2, 1\frac{1}{2}."""
        if self.is_next(r"\frac"):
            self.take(r"\frac")
            above = self.braces(depth).exact
            below = self.braces(depth).exact
        elif self.is_next("number"):
            above = self.take("number").value
            self.take("/")
            below = self.take("number").value
        else:
            return Value.of(whole)
        if above is None or below is None or not 0 < above < below:
            raise UnreadableError
        if not whole.denominator == above.denominator == below.denominator == 1:
            raise UnreadableError
        return Value.of(whole + above / below)


_OPERATORS = {"+": operator.add, "-": operator.sub, "*": operator.mul, "/": operator.truediv}


def _combine(left: Value, sign: str, right: Value) -> Value:
    if sign == "/" and right.exact == 0:
        raise UnreadableError
    if left.exact is not None and right.exact is not None:
        return Value.of(_OPERATORS[sign](left.exact, right.exact))
    latex = {"/": r"(\frac{%s}{%s})", "*": r"(%s\cdot %s)"}.get(sign, f"(%s{sign}%s)") % (left.latex, right.latex)
    return Value.irrational(latex, _OPERATORS[sign], left, right)


def _power(base: Value, exponent: Value) -> Value:
    if exponent.exact is None or base.exact == 0:
        raise UnreadableError
    power = exponent.exact
    if base.exact is not None and power.denominator == 1:
        bits = max(base.exact.numerator.bit_length(), base.exact.denominator.bit_length())
        if abs(power) * bits > MAX_BITS:
            raise UnreadableError
        return Value.of(base.exact**power.numerator)
    if max(abs(power.numerator), power.denominator) > MAX_IRRATIONAL_POWER:
        raise UnreadableError
    if base.exact is not None and base.exact < 0:
        raise UnreadableError
    return Value.irrational(f"{base.latex}^{{{exponent.latex}}}", operator.pow, base, exponent)


def _factorial(value: Value) -> Value:
    if value.exact is None or value.exact.denominator != 1 or not 0 <= value.exact <= MAX_FACTORIAL:
        raise UnreadableError
    return Value.of(Fraction(math.factorial(value.exact.numerator)))


def _binomial(above: Value, below: Value) -> Value:
    n, k = above.exact, below.exact
    if n is None or k is None or n.denominator != 1 or k.denominator != 1 or not 0 <= k <= n <= MAX_FACTORIAL:
        raise UnreadableError
    return Value.of(Fraction(math.comb(n.numerator, k.numerator)))


def _root(value: Value, command: str) -> Value:
    r"""\sqrt{x} and \sqrt[3]{x}; exact where a square root is."""
    if value.exact is not None and value.exact < 0:
        raise UnreadableError
    if command == r"\sqrt" and value.exact is not None:
        above, below = math.isqrt(value.exact.numerator), math.isqrt(value.exact.denominator)
        if Fraction(above**2, below**2) == value.exact:
            return Value.of(Fraction(above, below))
    degree = int(command[6:-1] or 2) if command != r"\sqrt" else 2
    if degree == 0:
        raise UnreadableError
    return Value.irrational(f"{command}{{{value.latex}}}", lambda x: x ** (1 / degree), value)


def _function(name: str, value: Value) -> Value:
    if name == r"\ln" and (value.exact is None or value.exact <= 0):
        raise UnreadableError
    return Value.irrational(f"({name}{{{value.latex}}})", _ONE_ARGUMENT[name], value)
