r"""What an answer is made of: numbers, expressions, words, tuples and intervals, sets and lists, matrices, equations.

An answer is read from the outside in. What is left where nothing can be split further is a number, whose value is
computed exactly; an expression, which math-verify is asked about; or words, which are compared as they stand.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass

from megatron_gspo.rewards.expressions import Value
from megatron_gspo.rewards.reading import read_strictly
from megatron_gspo.rewards.tidy import key, tidy

MAX_DEPTH = 6
"""Of tuples, sets and matrices inside one another."""
MAX_ITEMS = 120
"""Parts of one answer, all of them."""

_PIECE = re.compile(r"\\begin\{[a-z]*\*?\}|\\end\{[a-z]*\*?\}|\\[A-Za-z]+|\\.|.", re.DOTALL)
_OPENING = {"(", "[", "{", r"\{"}
_CLOSING = {")", "]", "}", r"\}"}
_MATRIX = re.compile(
    r"\\begin\{(?P<kind>[pbB]?matrix|smallmatrix|array)\}(?:\{[^{}]*\})?(?P<inside>(?:(?!\\end\{).)*)\\end\{(?P=kind)\}",
    re.DOTALL,
)
_OR = re.compile(r"\s*,?\s*(?:\\text\s*\{\s*,?\s*or\s*\}|(?<![A-Za-z\\])or(?![A-Za-z]))\s*")
_JOINING = re.compile(r"\s*,?\s*(?:\\text\s*\{\s*,?\s*(?:and|or)\s*\}|(?<![A-Za-z\\])(?:and|or)(?![A-Za-z]))\s*")
_NAME = re.compile(
    r"(?:\\text\s*\{[^{}]*\}\s*)?(?:\\angle|\\triangle|\\vec|\\overline|\\overrightarrow|\\bar|\\hat|\\Delta)?\s*"
    r"(?:[A-Za-z]|\\(?!in(?![A-Za-z])|pi(?![A-Za-z])|sqrt|frac|infty)[A-Za-z]+)'*"
    r"(?:\s*_\s*(?:\{[^{}]{1,20}\}|\\text\{[^{}]{1,20}\}|[A-Za-z0-9]))?(?:\s*\([A-Za-z](?:\s*,\s*[A-Za-z])*\))?'*"
)
_LETTERS = re.compile(r"[A-Z]{2,5}")
_RELATION = re.compile(r"\\(?:le|ge|ne)(?![A-Za-z])|[<>]")
_UNIT = re.compile(
    r"(?P<rest>.*[\d})\]A-Za-z])\s*\\text\s*\{[^{}]*\}(?:\s*\^\s*(?:\{\d\}|\d))?\s*(?:\([^()]*\))?", re.DOTALL
)
_FUNCTIONS = frozenset({"sin", "cos", "tan", "cot", "sec", "csc", "log", "exp", "min", "max", "gcd", "lcm", "det"})
_SHORT_UNITS = frozenset(
    {"cm", "mm", "km", "kg", "mg", "ml", "mL", "ft", "in", "yd", "mi", "hr", "oz", "lb", "Hz", "kJ", "kW", "eV", "st"}
)
_BASED = re.compile(r"\d\s*_")
"""204_5 is written in base 5."""
_ENVIRONMENT = re.compile(r"\\(?:begin|end)\{[a-z]*\*?\}")
_WORD = re.compile(r"(?<![A-Za-z\\])[A-Za-z]{3,}")


class UnreadableError(Exception):
    """An answer that is deeper or has more parts than is read here."""


@dataclass(frozen=True)
class Leaf:
    """What is not split further."""

    text: str
    """Tidied TeX."""
    value: Value | None = None
    """Of a number."""
    words: bool = False
    """Whether it holds prose, which is compared as it stands alone."""


@dataclass(frozen=True)
class Many:
    """Several answers: a bare list, a set, a tuple, an interval, a union, a ratio, or a matrix of rows."""

    items: tuple[Node, ...]
    ordered: bool
    brackets: str = ""
    """Of a tuple or an interval, "(]"; of a set "{}"; of a union "u"; of a ratio ":"; of a matrix "m"; else none."""
    text: str = ""
    """Of an inequality or a matrix: all of it, for math-verify."""


@dataclass(frozen=True)
class Named:
    """ "x = 3"."""

    name: str
    """Its key."""
    value: Node
    text: str
    """All of it."""


Node = Leaf | Many | Named


class _Count:
    def __init__(self) -> None:
        self.items = 0

    def add(self) -> None:
        self.items += 1
        if self.items > MAX_ITEMS:
            raise UnreadableError(f"more than {MAX_ITEMS} parts")


def read(text: str) -> Node:
    """The structure of an answer. Raises UnreadableError."""
    return _read(tidy(text), 0, _Count())


def _read(text: str, depth: int, count: _Count) -> Node:
    if depth > MAX_DEPTH:
        raise UnreadableError(f"more than {MAX_DEPTH} deep")
    count.add()
    text = _ungrouped(text.strip())
    number = read_number(text)
    if number is not None:
        return Leaf(text, number)
    for attempt in (_either, _list, _relation, _union, _bracketed, _matrix, _plus_minus, _ratio):
        found = attempt(text, depth, count)
        if found is not None:
            return found
    return _leaf(text)


def read_number(text: str) -> Value | None:
    """The value of a number or of an expression of numbers, with its unit; None for equations and anything else."""
    if "=" in text or r"\approx" in text or ":" in text or (text[:1] in "([" and "," in text):
        return None
    if _BASED.search(text) or _has_unknowns(text):
        return None
    return read_strictly(text, boxed=True)


def _has_unknowns(text: str) -> bool:
    """Whether letters stand in it that are no unit: 4 x^2 is no 4, and 4 apples and 4 cm are."""
    bare = re.sub(r"\\text\s*\{[^{}]*\}|\\[A-Za-z]+|(?<=\d)[eE](?=[+-]?\d)", " ", text)
    return any(len(word) < 3 and word not in _SHORT_UNITS for word in re.findall(r"[A-Za-z]+", bare))


def _leaf(text: str) -> Leaf:
    unit = _UNIT.fullmatch(text)
    if unit:
        text = unit["rest"].strip()
        number = read_number(text)
        if number is not None:
            return Leaf(text, number)
    is_based = _BASED.search(text) is not None  # math-verify would pass over the base
    return Leaf(text, None, words=_is_prose(text) or is_based)


def _is_prose(text: str) -> bool:
    """Whether words stand in it, which math-verify would pass over."""
    words = [word for word in _WORD.findall(_ENVIRONMENT.sub("", text)) if word not in _FUNCTIONS]
    return r"\text" in text or bool(words)


def _either(text: str, depth: int, count: _Count) -> Node | None:
    """ "x <= 2 or x >= 3" is the union of two intervals, where both are about one unknown."""
    sides = _OR.split(text) if depth == 0 else []
    unknowns = [set(re.findall(r"[A-Za-z]+", re.sub(r"\\[A-Za-z]+", " ", side))) for side in sides]
    if len(sides) < 2 or len(unknowns[0]) != 1 or any(names != unknowns[0] for names in unknowns):
        return None
    intervals = [_inequality(side, depth + 1, count) for side in sides]
    found = tuple(interval for interval in intervals if isinstance(interval, Many))
    return Many(found, ordered=False, brackets="u") if len(found) == len(sides) else None


def _list(text: str, depth: int, count: _Count) -> Node | None:
    """Parts with commas, semicolons, "and" or "or" between them."""
    groups = [_commas(part) for part in split(text, (";",)) if part]
    if len(groups) > 1 and all(len(group) > 1 and all(map(_names, group)) for group in groups):
        rows = [tuple(_read(part, depth + 2, count) for part in group) for group in groups]
        return Many(tuple(Many(row, ordered=True, brackets="()") for row in rows), ordered=False)
    parts = split(_JOINING.sub(" ; ", text), (";",)) if depth == 0 else split(text, (";",))
    parts = [piece for part in parts if part for piece in _commas(part)]
    if len(parts) < 2:
        return None
    items: list[Node] = []
    for part in parts:
        node = _read(part, depth + 1, count)
        items += node.items if isinstance(node, Many) and not node.brackets else [node]
    return _named_together(items)


def _names(text: str) -> bool:
    """Whether it is "p = 5"."""
    sides = split(text, ("=",))
    return len(sides) == 2 and is_name(sides[0])


def _named_together(items: list[Node]) -> Many:
    """ "a = 4, -8, -10" and "p = 1, p = 2" are the values of one name, in no order."""
    names = [item.name for item in items if isinstance(item, Named)]
    one_for_all = isinstance(items[0], Named) and len(names) == 1
    if one_for_all or (len(names) == len(items) and len(set(names)) == 1):
        items = [item.value if isinstance(item, Named) else item for item in items]
        items = [
            part for item in items for part in (item.items if isinstance(item, Many) and not item.brackets else [item])
        ]
    return Many(tuple(items), ordered=False)


def _commas(text: str) -> list[str]:
    """Split at commas, where those between thousands are none: 10,000, 20,000 are two numbers."""
    if not re.search(r"\d,\d{3}(?!\d)", text) or not re.search(r",(?!\d{3}(?!\d))", text):
        return [part for part in split(text, (",",)) if part]
    kept = re.sub(r"(?<=\d),(?=\d{3}(?!\d))", "\x01", text)
    return [part.replace("\x01", ",") for part in split(kept, (",",)) if part]


def _relation(text: str, depth: int, count: _Count) -> Node | None:
    """Equations, inequalities and "x in S"."""
    inside = [part for part in split(text, (r"\in", r"\colon")) if part]
    if len(inside) == 2 and is_name(inside[0]):
        return _read(inside[1], depth + 1, count)
    about = [part for part in split(text, (r"\approx",)) if part]
    if len(about) > 1:
        return _read(about[1] if is_name(about[0]) else about[0], depth + 1, count)
    sides = [part for part in split(text, ("=",)) if part]
    if len(sides) > 1:
        return _equation(text, sides, depth, count)
    return _inequality(text, depth, count)


def _equation(text: str, sides: list[str], depth: int, count: _Count) -> Node | None:
    """ "x = 1/2 = 0.5" is worth its last side, unless another number stands between; "2x + y = 1" is not split."""
    first, last = sides[0], sides[-1]
    if not is_name(first) and is_name(last) and len(sides) == 2:
        first, last, sides = last, first, sides[::-1]  # 42 = x
    if not is_name(first):
        values = [read_number(side) for side in sides]
        known = [value for value in values if value is not None and value.exact is not None]
        is_computation = values[-1] is not None and not any(_has_letters(side) for side in sides)
        if is_computation and all(value.exact == known[-1].exact for value in known):
            return _read(last, depth + 1, count)
        return Leaf(text, None, words=_is_prose(text))
    between = [read_number(side) for side in sides[1:-1]]
    value = _read(last, depth + 1, count)
    own = value.value if isinstance(value, Leaf) else None
    if own is not None and any(
        other and own.exact is not None and other.exact not in (None, own.exact) for other in between
    ):
        return Leaf(text, None, words=True)  # x = 41 = 42
    return Named(key(first), value, text)


def _has_letters(text: str) -> bool:
    return re.search(r"(?<![A-Za-z\\])[A-Za-z]", re.sub(r"\\[A-Za-z]+|\\text\{[^{}]*\}", "", text)) is not None


def is_name(text: str) -> bool:
    """Whether it names a value: x, f(x), a_{37}, |AB|, (x, y), "V_1 : V_2"."""
    text = _ungrouped(text.strip())
    if text.startswith("|") and text.endswith("|") and len(text) > 2:
        text = text[1:-1].strip()
    if text.startswith("(") and text.endswith(")"):
        parts = [part for part in split(text[1:-1], (",",)) if part]
        return len(parts) > 1 and all(map(is_name, parts))
    sides = split(text, (":", "/"))
    if len(sides) == 2:
        return all(map(is_name, sides))
    fraction = re.fullmatch(r"\\frac\{([^{}]+)\}\{([^{}]+)\}", text)
    if fraction:
        return is_name(fraction[1]) and is_name(fraction[2])
    words = re.fullmatch(r"\\text\s*\{[^{}]*\}|[A-Za-z]+(?: [A-Za-z]+){0,5}", text)
    return bool(_NAME.fullmatch(text) or _LETTERS.fullmatch(text) or words)


def _inequality(text: str, depth: int, count: _Count) -> Node | None:
    """ "1 <= x < 3" is the interval [1, 3), and "x > 5" is (5, oo)."""
    sides = split(text, (r"\le", r"\ge", r"\ne", "<", ">"))
    if len(sides) < 2:
        return None
    signs = [part for part in _pieces(text) if _RELATION.fullmatch(part)]
    if len(sides) != len(signs) + 1 or not all(sides) or r"\ne" in signs or len(signs) > 2:
        return Leaf(text, None, words=_is_prose(text))
    upwards = [sign in ("<", r"\le") for sign in signs]
    if len(set(upwards)) == 2:
        return Leaf(text, None, words=_is_prose(text))
    if not upwards[0]:
        sides, signs = sides[::-1], signs[::-1]
    closed = [sign in (r"\le", r"\ge") for sign in signs]
    if len(signs) == 2 and is_name(sides[1]):
        low, high = sides[0], sides[2]
        brackets = "(["[closed[0]] + ")]"[closed[1]]
    elif len(signs) == 1 and is_name(sides[0]) and not is_name(sides[1]):
        low, high, brackets = r"-\infty", sides[1], "(" + ")]"[closed[0]]
    elif len(signs) == 1 and is_name(sides[1]) and not is_name(sides[0]):
        low, high, brackets = sides[0], r"\infty", "(["[closed[0]] + ")"
    else:
        return Leaf(text, None, words=_is_prose(text))
    ends = (_read(low, depth + 1, count), _read(high, depth + 1, count))
    return Many(ends, ordered=True, brackets=brackets, text=text)


def _union(text: str, depth: int, count: _Count) -> Node | None:
    parts = split(text, (r"\cup",))
    if len(parts) < 2:
        return None
    return Many(tuple(_read(part, depth + 1, count) for part in parts if part), ordered=False, brackets="u")


def _bracketed(text: str, depth: int, count: _Count) -> Node | None:
    """Tuples, intervals, points and sets; parentheses around one thing are taken off."""
    pieces = _pieces(text)
    if len(pieces) < 2 or pieces[0] not in _OPENING or pieces[-1] not in _CLOSING or not _is_whole(pieces):
        return None
    inside = "".join(pieces[1:-1]).strip()
    if pieces[0] in ("{", r"\{"):
        builder = [part for part in split(inside, ("|", r"\mid", ":")) if part]
        if len(builder) == 2 and is_name(builder[0]):
            return _read(builder[1], depth + 1, count)  # {x | -2 <= x < 1}
        items = _items(inside, depth, count)
        return Many(items, ordered=False, brackets="{}")
    parts = [piece for part in split(inside, (";",)) for piece in _commas(part)]
    if len(parts) < 2:
        is_one = (pieces[0] == "(" and pieces[-1] == ")") or _MATRIX.fullmatch(inside) is not None
        return _read(inside, depth + 1, count) if is_one else None
    items = tuple(_read(part, depth + 1, count) for part in parts)
    return Many(items, ordered=True, brackets=pieces[0] + pieces[-1])


def _items(inside: str, depth: int, count: _Count) -> tuple[Node, ...]:
    """Of a set."""
    if not inside:
        return ()
    node = _read(inside, depth + 1, count)
    return node.items if isinstance(node, Many) and not node.brackets else (node,)


def _matrix(text: str, depth: int, count: _Count) -> Node | None:
    match = _MATRIX.fullmatch(text)
    if match is None:
        return None
    rows = [row for row in match["inside"].split("\x00") if row.strip()]
    cells = [Many(tuple(_read(cell, depth + 2, count) for cell in row.split("&")), True, "m") for row in rows]
    return Many(tuple(cells), ordered=True, brackets="m", text=text)


def _plus_minus(text: str, depth: int, count: _Count) -> Node | None:
    r"""1 \pm \sqrt{2} is two values."""
    if r"\pm" not in text or r"\text" in text:
        return None
    readings = [("+", "-"), ("-", "+")]
    both = [re.sub(r"\\mp(?![A-Za-z])", mp, re.sub(r"\\pm(?![A-Za-z])", pm, text)) for pm, mp in readings]
    values = tuple(_read(re.sub(r"^\s*\+\s*", "", one), depth + 1, count) for one in both)
    return Many(values, ordered=False)


def _ratio(text: str, depth: int, count: _Count) -> Node | None:
    parts = [part for part in split(text, (":",)) if part]
    if len(parts) < 2 or r"\text" in text:
        return None
    return Many(tuple(_read(part, depth + 1, count) for part in parts), ordered=True, brackets=":")


def split(text: str, separators: tuple[str, ...]) -> list[str]:
    """The parts of a text between separators that stand in no brackets."""
    parts: list[str] = []
    depth, begin, at = 0, 0, 0
    for piece in _pieces(text):
        if piece in _OPENING or piece.startswith(r"\begin{"):
            depth += 1
        elif piece in _CLOSING or piece.startswith(r"\end{"):
            depth -= 1
        elif piece in separators and depth == 0:
            parts.append(text[begin:at].strip())
            begin = at + len(piece)
        at += len(piece)
    return [*parts, text[begin:].strip()]


def _pieces(text: str) -> list[str]:
    return _PIECE.findall(text)


def _is_whole(pieces: list[str]) -> bool:
    """Whether the first bracket closes with the last piece."""
    return all(depth > 0 for depth in list(_depths(pieces))[:-1])


def _depths(pieces: list[str]) -> Iterator[int]:
    depth = 0
    for piece in pieces:
        depth += (piece in _OPENING or piece.startswith(r"\begin{")) - (piece in _CLOSING or piece.startswith(r"\end{"))
        yield depth


def _ungrouped(text: str) -> str:
    """Without TeX's braces around all of it, and without brackets that do not close."""
    for _ in range(MAX_DEPTH):
        pieces = _pieces(text)
        if len(pieces) < 2 or pieces[0] != "{" or pieces[-1] != "}" or not _is_whole(pieces):
            return text
        if len([part for part in split(text[1:-1], (",",)) if part]) > 1:
            return text  # {1, 2} without its backslashes is a set
        text = text[1:-1].strip()
    return text
