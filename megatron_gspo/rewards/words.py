"""The words and symbols around a number that say what it is."""

from __future__ import annotations


def _set(text: str) -> frozenset[str]:
    return frozenset(text.split())


FUNCTIONS = _set(r"\frac \sqrt \log \ln \binom \sin \cos \tan")
MATHEMATICS = FUNCTIONS | _set(r"number + - * / ^ ! ( ) { } _ \pi")
"""Kinds of tokens that an expression is made of."""
IS = _set("is are was be equals equal makes gives becomes 是 为 ist est es")
HEADINGS = _set(
    "step note check verification part case example problem question hint remark section explanation method stage "
    "phase task option"
)
"""Words that a heading begins with, and not an answer."""
NOT_THE_VALUE = _set("not minus negative plus times than over log ln sin cos tan root")
"""Words before a number that say that it is not the value."""
NEGATIONS = _set("not cannot never")
EQUALS = _set("equal equals to be exactly")
"""Words that may stand between a negation and what it denies."""
JOINING = _set(
    "and or to of out through till until versus vs by times plus minus divided over per from between "
    "maybe perhaps possibly either"
)
"""With nothing but these between them, two numbers are not one answer."""
JOINING_SYMBOLS = _set(", ; : & | ' \" ( ) [ ] { } _ ~ % ° range dash . $ # @")
VARIABLES = _set("x y z n i j e pi M B T bn mn Bn Mn mln bln tn")
"""A number that one of these touches is not that number: 42x, 42M."""
CHANGING = _set("squared cubed plus minus point")
"""Words behind a number that change its value."""
PARTS = _set(
    "half halves third thirds quarter quarters fourth fourths fifth fifths sixth sixths eighth eighths tenth tenths"
)
"""What "and" adds to a number: 42 and a half."""
HARMLESS = _set(r"\square \blacksquare \checkmark \qed \_ \# \ ")
"""Commands that may stand behind a number."""
SCALES = {"hundred": 10**2, "thousand": 10**3, "million": 10**6, "billion": 10**9, "trillion": 10**12}
