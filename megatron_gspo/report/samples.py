"""Rollouts for the page's reader: saved responses as JSON values, with the differences of their logprobs.

What a run saved may be torn, of another version, or gigabytes: a value of the wrong type becomes None, and what is too
much is left out, counted, and said on the page.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from typing import Any

from megatron_gspo.report.metrics import Record, finite
from megatron_gspo.report.rundir import RunDirectory, read_lines

ROLLOUT_BYTES = 6_000_000
"""Of saved rollouts, what a page takes in, over all its runs; beyond it, outer steps are left out evenly."""
RESPONSE_TOKENS = 4000
"""Of a longer response, the page has the first and the last half of so many tokens."""
TEXT_CHARACTERS = 20_000
"""Of a longer prompt, and of a response without tokens, the page has the first so many characters."""

SHADES = {"new − old": ("new", "old"), "trainer − engine": ("old", "rollout")}
"""Name -> whose log-probabilities are subtracted: what the update did, and how far trainer and engine are apart."""
TEXTS = ("prompt_id", "prompt", "finish_reason")
NUMBERS = ("sample", "reward", "advantage", "ratio")


def rollouts(run: RunDirectory, share: int = 1) -> dict[str, Any]:
    """``groups`` of responses, one an outer step, and how many steps, and responses of kept steps, were left out.

    ``share``: among how many runs the page's bytes are divided. The last outer step always has a place.
    """
    budget = ROLLOUT_BYTES // share
    files = run.rollout_files()
    stride = max(1, math.ceil(sum(path.stat().st_size for path in files.values()) / budget))
    kept = list(files)[::-1][::stride][::-1]
    groups, dropped = [], 0
    for outer_step in kept:
        samples = [sample(line) for line in read_lines(files[outer_step])]
        fitting = _fitting(samples, budget)
        dropped += len(samples) - len(fitting)
        if fitting:
            groups.append({"outer_step": outer_step, "samples": fitting})
    return {"groups": groups, "steps_left_out": len(files) - len(kept), "responses_left_out": dropped}


def sample(line: Record) -> dict[str, Any]:
    """One saved response. ``length``: its tokens; ``gap``: (where, how many) tokens are missing from ``tokens``."""
    tokens, shades = _tokens(line), {}
    for name, (upper, lower) in SHADES.items():
        a, b = _list(line.get(f"{upper}_logprobs")), _list(line.get(f"{lower}_logprobs"))
        if len(a) == len(b) == len(tokens):
            shades[name] = _cut([_difference(x, y) for x, y in zip(a, b, strict=True)])
    clipped = line.get("clipped")
    return {
        **{name: None if line.get(name) is None else short(str(line[name])) for name in TEXTS},
        **{name: number(line.get(name)) for name in NUMBERS},
        "clipped": clipped if isinstance(clipped, bool) else None,
        "tokens": _cut(tokens),
        "shades": shades,
        "length": len(_list(line.get("tokens"))) or None,
        "gap": [RESPONSE_TOKENS // 2, len(tokens) - RESPONSE_TOKENS] if len(tokens) > RESPONSE_TOKENS else None,
    }


def number(value: Any, digits: int = 9) -> float | None:
    """A finite number to so many significant digits; None for anything else."""
    if not finite(value):
        return None
    return value if isinstance(value, int) else float(f"{value:.{digits}g}")


def short(text: str) -> str:
    """The text, or its beginning and how much of it is missing."""
    if len(text) <= TEXT_CHARACTERS:
        return text
    return f"{text[:TEXT_CHARACTERS]}… ({len(text) - TEXT_CHARACTERS:,} more characters)"


def _tokens(line: Record) -> list[str]:
    return [short(str(token)) for token in _list(line.get("tokens")) or [line.get("response", "")]]


def _cut(values: list[Any]) -> list[Any]:
    half = RESPONSE_TOKENS // 2
    return values if len(values) <= RESPONSE_TOKENS else values[:half] + values[-half:]


def _difference(upper: Any, lower: Any) -> float | None:
    return number(upper - lower, digits=4) if finite(upper) and finite(lower) else None


def _fitting(samples: Sequence[dict[str, Any]], budget: int) -> list[dict[str, Any]]:
    """The first responses, as many as fit; at least one."""
    fitting: list[dict[str, Any]] = []
    for one in samples:
        budget -= len(json.dumps(one))
        if budget < 0 and fitting:
            break
        fitting.append(one)
    return fitting


def _list(value: Any) -> list[Any]:
    return value if isinstance(value, list) else []
