"""Python values as JSON, and back: what crosses the wall of the sandbox is data, with no code and no class in it.

Runs on both sides. The text of this file stands in front of each harness, so it imports nothing of the package.

None, booleans, texts, floats, integers and lists are JSON's own; an integer of many digits, a tuple, a set, a
dictionary, bytes and complex numbers are an object of one key, their kind. A subclass is what it is derived from.
"""

from __future__ import annotations

import json
from typing import Any

MOST_DEPTH = 200
LONG = 10**1000
"""From here on an integer travels in hexadecimal: decimal digits take quadratic time, and Python refuses 4,300."""


class Opaque:
    """A value that could not travel; it equals nothing."""

    __hash__ = None  # type: ignore[assignment]

    def __init__(self, kind: str) -> None:
        self.kind = kind

    def __eq__(self, other: object) -> bool:
        return False

    def __repr__(self) -> str:
        return f"<a {self.kind}>"


def encode(value: Any, depth: int = 0) -> Any:
    """JSON of a value; {"opaque": its type} of what is no plain value, or nested more than ``MOST_DEPTH`` deep."""
    if value is None or isinstance(value, bool):
        return value
    if isinstance(value, int):
        number = int(value)
        return number if -LONG < number < LONG else {"int": hex(number)}
    if isinstance(value, float):
        return float(value)
    if isinstance(value, str):
        return str.__str__(value)
    if isinstance(value, (bytes, bytearray)):
        return {"bytes": bytes(value).decode("latin-1")}
    if isinstance(value, complex):
        return {"complex": [value.real, value.imag]}
    if depth < MOST_DEPTH and isinstance(value, list):
        return [encode(item, depth + 1) for item in value]
    if depth < MOST_DEPTH and isinstance(value, dict):
        return {"dict": [[encode(key, depth + 1), encode(item, depth + 1)] for key, item in value.items()]}
    for kind in (tuple, set, frozenset):
        if depth < MOST_DEPTH and isinstance(value, kind):
            return {kind.__name__: [encode(item, depth + 1) for item in value]}
    return {"opaque": type(value).__name__}


def decode(tree: Any) -> Any:
    """The value of what ``encode`` made. Raises ValueError or TypeError for what it cannot have made."""
    if isinstance(tree, list):
        return [decode(item) for item in tree]
    if not isinstance(tree, dict):
        return tree
    ((kind, inside),) = tree.items()
    if kind == "int":
        return int(inside, 16)
    if kind == "bytes":
        return str(inside).encode("latin-1")
    if kind == "complex":
        return complex(*inside)
    if kind == "dict":
        return {decode(key): decode(item) for key, item in inside}
    if kind in ("tuple", "set", "frozenset"):
        return {"tuple": tuple, "set": set, "frozenset": frozenset}[kind](decode(item) for item in inside)
    if kind == "opaque":
        return Opaque(str(inside))
    raise ValueError(f"no value: {kind!r:.40}")


def dumps(tree: Any) -> bytes:
    """One line of JSON."""
    return json.dumps(tree).encode() + b"\n"
