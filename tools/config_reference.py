"""Writes ``docs/configuration.md`` from the configuration's own types and docstrings.

python tools/config_reference.py docs/configuration.md
"""

from __future__ import annotations

import json
import re
import sys
import types
import typing
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from annotated_types import Ge, Gt, Le, Lt
from pydantic.fields import FieldInfo

from megatron_gspo.config import RunConfig, Section

HEAD = """\
# Configuration

One TOML file; `section.key=value` on the command line replaces a setting. An unknown key, a value out of range and
settings that contradict each other are refused with one line that shows the values. A run keeps the configuration as
it was resolved in `config.toml` of its directory. This page is written from the code by `tools/config_reference.py`.
"""
NAMES = {bool: "true or false", int: "integer", float: "number", str: "string", dict: "table"}
BOUNDS = ((Ge, "≥", "ge"), (Gt, ">", "gt"), (Le, "≤", "le"), (Lt, "<", "lt"))


def reference() -> str:
    """The page: a table a section."""
    parts = [HEAD]
    for name, field in RunConfig.model_fields.items():
        section = typing.cast(type[Section], field.annotation)
        parts.append(f"## `[{name}]`\n\n{_prose(section.__doc__)}\n\n{_table(section)}")
    return "\n".join(parts)


def _table(section: type[Section]) -> str:
    rows = ["| setting | value | default | meaning |", "|---|---|---|---|"]
    for name, field in section.model_fields.items():
        cells = (f"`{name}`", _value(field), _default(field), _prose(field.description))
        rows.append(f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in cells)} |")
    return "\n".join(rows) + "\n"


def _value(field: FieldInfo) -> str:
    bounds = [bound for item in _metadata(field) for bound in _bounds(item)]
    return " ".join([_type(field.annotation), " and ".join(bounds)]).strip()


def _type(annotation: Any) -> str:
    origin, arguments = typing.get_origin(annotation), typing.get_args(annotation)
    if origin is typing.Annotated:
        return _type(arguments[0])
    if origin is typing.Literal:
        return ", ".join(f"`{json.dumps(value)}`" for value in arguments)
    if origin in (typing.Union, types.UnionType):
        return " or ".join(_type(part) for part in arguments if part is not type(None))
    if origin is tuple:
        return f"{'list of' if Ellipsis in arguments else len(arguments)} {_type(arguments[0])}s"
    return NAMES[origin or annotation]


def _metadata(field: FieldInfo) -> Iterator[Any]:
    """Bounds of the field, or of the type that it allows beside None."""
    yield from field.metadata
    for part in typing.get_args(field.annotation):
        for item in getattr(part, "__metadata__", ()):
            yield from getattr(item, "metadata", [item])


def _bounds(item: Any) -> Iterator[str]:
    for kind, sign, name in BOUNDS:
        if isinstance(item, kind):
            value = getattr(item, name)
            yield f"{sign} {'2^63' if value == 2**63 else f'{value:g}'}"


def _default(field: FieldInfo) -> str:
    if field.is_required():
        return "required"
    value = field.get_default(call_default_factory=True)
    return "absent" if value is None else f"`{json.dumps(value)}`"


def _prose(text: str | None) -> str:
    return re.sub(r"\s+", " ", (text or "").replace("``", "`")).strip()


if __name__ == "__main__":
    Path(sys.argv[1]).write_text(reference(), encoding="utf-8")
