"""The suites by name, and how one is asked for: ``lcb``, ``lcb:window=202408..202501:k=4``."""

from __future__ import annotations

import difflib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from megatron_gspo.errors import ConfigError
from megatron_gspo.named import find_named
from megatron_gspo.suites.base import Draw, Suite

SUITES: dict[str, str] = {
    "aime24": "megatron_gspo.suites.aime:AIME24",
    "aime25": "megatron_gspo.suites.aime:AIME25",
    "math500": "megatron_gspo.suites.math500:MATH500",
    "gsm8k": "megatron_gspo.suites.gsm8k:GSM8K",
    "gpqa-diamond": "megatron_gspo.suites.gpqa:GPQA_DIAMOND",
    "lcb": "megatron_gspo.suites.lcb:LCB",
    "codeforces": "megatron_gspo.suites.codeforces:CODEFORCES",
    "humaneval": "megatron_gspo.suites.humaneval:HUMANEVAL",
    "mbpp": "megatron_gspo.suites.mbpp:MBPP",
}
"""Name -> ``module:Suite``. Adding a suite is one file here and one entry."""

WHOLE = ("k", "max_tokens", "top_k", "limit")
REAL = ("temperature", "top_p")


@dataclass(frozen=True)
class Asked:
    """A suite as somebody asks for it."""

    suite: Suite
    draw: Draw
    """The suite's, with what was named in its place."""
    limit: int | None = None
    """The first so many problems alone."""
    options: Mapping[str, str] = field(default_factory=dict)
    """Of ``Suite.options``, defaults included."""


def read_asked(text: str) -> Asked:
    """From ``NAME`` or ``NAME:option=value:...``. The options of every suite: k, temperature (0: greedy), top_p, top_k,
    max_tokens, limit; more are the suite's own. Raises ConfigError."""
    name, *words = text.split(":")
    suite = find_suite(name.strip())
    asked = Asked(suite, suite.draw, options=dict(suite.options))
    for word in words:
        option, equals, value = word.partition("=")
        if not equals:
            raise ConfigError(f"suite {text!r}: {word!r} is no option=value")
        asked = _with(asked, option.strip(), value.strip(), text)
    return _checked(asked, text)


def read_all_asked(texts: Sequence[str]) -> list[Asked]:
    """Several, none of them twice. Raises ConfigError."""
    found = [read_asked(text) for text in texts]
    names = [asked.suite.name for asked in found]
    if twice := sorted({name for name in names if names.count(name) > 1}):
        raise ConfigError(f"suite {twice[0]!r} is asked for twice")
    return found


def find_suite(name: str) -> Suite:
    """An entry of the catalog. Raises ConfigError."""
    if name not in SUITES:
        close = difflib.get_close_matches(name, SUITES, n=1)
        meant = f" (did you mean {close[0]}?)" if close else ""
        raise ConfigError(f"no suite {name!r}{meant}: there are {', '.join(SUITES)}")
    suite: Suite = find_named(SUITES[name], "suite")
    return suite


def _with(asked: Asked, option: str, value: str, text: str) -> Asked:
    if option in asked.suite.options:
        return replace(asked, options={**asked.options, option: value})
    if option not in (*WHOLE, *REAL):
        known = ", ".join((*WHOLE, *REAL, *asked.suite.options))
        raise ConfigError(f"suite {text!r}: no option {option!r} (there are {known})")
    try:
        number = int(value) if option in WHOLE else float(value)
    except ValueError:
        kind = "a whole number" if option in WHOLE else "a number"
        raise ConfigError(f"suite {text!r}: {option} = {value!r} is not {kind}") from None
    if option == "limit":
        return replace(asked, limit=int(number))
    named: dict[str, Any] = {option: number, "source": "as asked"}
    return replace(asked, draw=replace(asked.draw, **named))


def _checked(asked: Asked, text: str) -> Asked:
    asked.suite.check_options(asked.options)
    draw = asked.draw
    bounds = {
        "k": draw.k >= 1,
        "max_tokens": draw.max_tokens >= 1,
        "temperature": 0.0 <= draw.temperature <= 100.0,
        "top_p": 0.0 < draw.top_p <= 1.0,
        "top_k": draw.top_k == -1 or draw.top_k >= 1,
        "limit": asked.limit is None or asked.limit >= 1,
    }
    if wrong := [name for name, holds in bounds.items() if not holds]:
        value = asked.limit if wrong[0] == "limit" else getattr(draw, wrong[0])
        raise ConfigError(f"suite {text!r}: {wrong[0]} = {value} is out of range")
    if draw.temperature == 0.0 and draw.k > 1:
        raise ConfigError(f"suite {text!r}: k = {draw.k} with temperature 0: the responses would all be the same")
    return asked
