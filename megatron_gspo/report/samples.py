"""Rollouts for the page's reader: saved groups as JSON values, with the differences of their responses' logprobs.

What a run saved may be torn, of another version, or gigabytes: a value of the wrong type becomes None, and what is too
much is left out, counted, and said on the page.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Sequence
from itertools import accumulate
from typing import Any

from megatron_gspo.report.metrics import Record, counted, finite
from megatron_gspo.report.rundir import RunDirectory, read_lines

ROLLOUT_BYTES = 6_000_000
"""Of saved rollouts, what a page takes in, over all its runs; beyond it, outer steps are left out evenly."""
RESPONSE_TOKENS = 4000
"""Of a longer response, the page has the first and the last half of so many tokens."""
MOST_COMPONENTS = 64
"""Of one response's reward."""
TEXT_CHARACTERS = 20_000
"""Of a longer prompt or reference, and of a response without tokens, the page has the first so many characters."""

SHADES = {"new − old": ("new", "old"), "trainer − engine": ("old", "rollout")}
"""Name -> whose log-probabilities are subtracted: what the update did, and how far trainer and engine are apart."""
OF_THE_GROUP = ("prompt_id", "prompt", "answer")
NUMBERS = ("sample", "reward", "advantage", "ratio")


def rollouts(run: RunDirectory, share: int = 1) -> dict[str, Any]:
    """``steps`` with their groups of responses, and how many steps, and responses of kept steps, were left out.

    ``share``: among how many runs the page's bytes are divided. The last outer step always has a place.
    """
    budget = ROLLOUT_BYTES // share
    files = run.rollout_files()
    stride = max(1, math.ceil(sum(path.stat().st_size for path in files.values()) / budget))
    kept = list(files)[::-1][::stride][::-1]
    steps, dropped = [], 0
    for outer_step in kept:
        found = groups(read_lines(files[outer_step]))
        fitting = _fitting(found, budget)
        dropped += _responses(found) - _responses(fitting)
        if fitting:
            steps.append({"outer_step": counted(outer_step), "file": files[outer_step].name, "groups": fitting})
    config = run.config()
    return {
        "steps": steps,
        "group_size": config.rollout.group_size if config else None,
        "steps_left_out": len(files) - len(kept),
        "responses_left_out": dropped,
    }


def groups(lines: Iterable[Record]) -> list[dict[str, Any]]:
    """The lines of one file by prompt, in the order in which prompts appear: what they are asked, and the responses.

    An earlier version wrote no ``group``: there the prompt tells groups apart.
    """
    found: dict[str, dict[str, Any]] = {}
    for line in lines:
        key = json.dumps([line.get(name) for name in ("group", "prompt_id", "prompt")], default=str)
        if key not in found:
            found[key] = {name: _text(line.get(name)) for name in OF_THE_GROUP} | {"samples": []}
        found[key]["samples"].append(sample(line))
    return list(found.values())


def sample(line: Record) -> dict[str, Any]:
    """One saved response. ``length``: its tokens; ``gap``: (where, how many) tokens are missing from ``tokens``."""
    tokens, shades = _tokens(line), {}
    for name, (upper, lower) in SHADES.items():
        a, b = _list(line.get(f"{upper}_logprobs")), _list(line.get(f"{lower}_logprobs"))
        if len(a) == len(b) == len(tokens):
            shades[name] = _cut([_difference(x, y) for x, y in zip(a, b, strict=True)])
    clipped = line.get("clipped")
    return {
        "finish_reason": _text(line.get("finish_reason")),
        **{name: number(line.get(name)) for name in NUMBERS},
        "components": components(line.get("components")),
        "clipped": clipped if isinstance(clipped, bool) else None,
        "tokens": _cut(tokens),
        "shades": shades,
        "length": len(_list(line.get("tokens"))) or None,
        "gap": [RESPONSE_TOKENS // 2, len(tokens) - RESPONSE_TOKENS] if len(tokens) > RESPONSE_TOKENS else None,
    }


def components(value: Any) -> dict[str, float | None] | None:
    """A response's components by name; None where it has none."""
    if not isinstance(value, dict) or not value:
        return None
    return {short(str(name)): number(part) for name, part in list(value.items())[:MOST_COMPONENTS]}


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


def _fitting(found: Sequence[dict[str, Any]], budget: int) -> list[dict[str, Any]]:
    """The first groups, as many as fit whole; of a first one that is too much by itself, the first responses."""
    fitting: list[dict[str, Any]] = []
    for group in found:
        sizes = [len(json.dumps(one)) for one in group["samples"]]
        if sum(sizes) > budget:
            return fitting or [group | {"samples": group["samples"][: _first_within(sizes, budget)]}]
        budget -= sum(sizes)
        fitting.append(group)
    return fitting


def _first_within(sizes: Sequence[int], budget: int) -> int:
    """How many of the first ones are within it; at least one."""
    return max(1, sum(total <= budget for total in accumulate(sizes)))


def _responses(found: Sequence[dict[str, Any]]) -> int:
    return sum(len(group["samples"]) for group in found)


def _text(value: Any) -> str | None:
    return None if value is None else short(str(value))


def _list(value: Any) -> list[Any]:
    return value if isinstance(value, list) else []
