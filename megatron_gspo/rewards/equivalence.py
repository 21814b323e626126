"""Whether two answers are the same, whatever they are made of."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence

from megatron_gspo.rewards.expressions import Value
from megatron_gspo.rewards.structure import Leaf, Many, Named, Node, read, split
from megatron_gspo.rewards.tidy import key
from megatron_gspo.rewards.verifier import shared_verifier

NEAR = 1e-6
"""Relative distance of two computed values below which math-verify is asked."""
MAX_LATEX = 300
"""Characters of an expression that math-verify is asked about."""
_DECIMAL = re.compile(r"(?<![\d.])(\d*)\.(\d+)")


def same(expected: Node, found: Node) -> bool:
    """Whether ``found`` is the reference ``expected``. Raises StoppedError when math-verify took too long over it."""
    if isinstance(expected, Named) or isinstance(found, Named):
        return _same_named(expected, found)
    if isinstance(expected, Many) and isinstance(found, Many):
        return _same_many(expected, found)
    if isinstance(expected, Leaf) and isinstance(found, Leaf):
        return _same_leaf(expected, found)
    return _same_as_text(expected, found)


def _same_as_text(expected: Node, found: Node) -> bool:
    """A matrix and a sum of matrices, x < 1 and -x > -1: of two kinds here, for math-verify to say."""
    many, leaf = (expected, found) if isinstance(expected, Many) else (found, expected)
    if not isinstance(many, Many) or not isinstance(leaf, Leaf) or leaf.words or not many.text:
        return False
    comparable = re.search(r"[<>]|\\(?:le|ge) " if many.brackets != "m" else r"\\begin\{", leaf.text) is not None
    return comparable and _asked(expected.text, found.text)


def _same_named(expected: Node, found: Node) -> bool:
    """A name counts where both have one."""
    if isinstance(expected, Named) and isinstance(found, Named):
        if expected.name == found.name:
            return same(expected.value, found.value)
        return _asked(expected.text, found.text) if _are_equations(expected, found) else False
    if isinstance(expected, Named):
        if isinstance(found, Leaf) and "=" in found.text:
            return _same_leaf(Leaf(expected.text), found)
        return same(expected.value, found)
    assert isinstance(found, Named)
    if isinstance(expected, Leaf) and "=" in expected.text:
        return _same_leaf(expected, Leaf(found.text))
    return same(expected, found.value)


def _are_equations(expected: Named, found: Named) -> bool:
    """Whether the values have unknowns: y = 2x is x = y/2, and x = 3 is not y = 3."""
    return all(
        isinstance(side.value, Leaf) and side.value.value is None and not side.value.words for side in (expected, found)
    )


def _same_many(expected: Many, found: Many) -> bool:
    bare = {"", "{}"}
    if len(expected.items) != len(found.items):
        return False
    named = _has_names(expected.items) and not _has_names(found.items)
    if named and expected.brackets == "" and found.brackets in ("", "()"):  # x = 5, y = 2: given without their names
        return all(same(one, other) for one, other in zip(expected.items, found.items, strict=True))
    if expected.brackets != found.brackets and not {expected.brackets, found.brackets} <= bare:
        return False
    if expected.ordered:
        return all(same(one, other) for one, other in zip(expected.items, found.items, strict=True))
    return _same_set(expected.items, list(found.items))


def _has_names(items: Sequence[Node]) -> bool:
    return any(isinstance(item, Named) for item in items)


def _same_set(expected: Sequence[Node], left: list[Node]) -> bool:
    """Each item of one is one of the other, once."""
    for item in expected:
        place = next((at for at, other in enumerate(left) if same(item, other)), None)
        if place is None:
            return False
        left.pop(place)
    return True


def _same_leaf(expected: Leaf, found: Leaf) -> bool:
    if expected.value is not None and found.value is not None:
        return same_value(expected.value, found.value)
    if key(expected.text) == key(found.text):
        return True
    if expected.words or found.words or (_is_plain(expected) and _is_plain(found)):
        return False
    (*left, value), (*other, its) = (split(leaf.text, ("=",)) for leaf in (expected, found))
    if left and list(map(key, left)) == list(map(key, other)):  # math-verify would take ln(e^5) = 1 for ln(e^5) = 5
        return same(read(value), read(its))
    return _asked(expected.text, found.text)


def _is_plain(leaf: Leaf) -> bool:
    """Whether nothing but its spelling could make it equal to another: a number, a letter or two."""
    exact = leaf.value is not None and leaf.value.exact is not None
    return exact or re.fullmatch(r"[A-Za-z]{0,2}", leaf.text) is not None


def same_value(expected: Value, found: Value) -> bool:
    """Whether two computed values are the same; exactly, not about. Raises StoppedError."""
    if expected.exact is not None and found.exact is not None:
        return expected.exact == found.exact
    distance = abs(expected.approximate - found.approximate)
    if not math.isnan(distance) and distance > NEAR * max(1.0, abs(expected.approximate)):
        return False
    return _asked(expected.latex, found.latex)


def _asked(expected: str, found: str) -> bool:
    """math-verify's judgement."""
    if max(len(expected), len(found)) > MAX_LATEX:
        return False
    return shared_verifier().equal(_exactly(expected), _exactly(found))


def _exactly(text: str) -> str:
    """With fractions for decimals, which would be compared about."""
    text = _DECIMAL.sub(
        lambda m: rf"(\frac{{{int(m[1] + m[2])}}}{{{10 ** len(m[2])}}})" if len(m[2]) <= 40 else m[0], text
    )
    return text.replace("\x00", r"\\")
