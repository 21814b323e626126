"""Programs that are run in the sandbox around or instead of the one that a model wrote."""

from __future__ import annotations

import functools
import json
from pathlib import Path
from typing import Any

from megatron_gspo.rewards.inside.values import dumps
from megatron_gspo.sandbox import Program

INSIDE = Path(__file__).with_name("inside")
SHARED = "from megatron_gspo.rewards.inside.values import"


@functools.cache
def harness(name: str) -> str:
    """The source of ``inside/NAME.py`` as a file that needs no other one."""
    lines = [line for part in ("values", name) for line in (INSIDE / f"{part}.py").read_text("utf-8").splitlines()]
    dropped = ("from __future__", SHARED)
    return "from __future__ import annotations\n" + "\n".join(line for line in lines if not line.startswith(dropped))


def caller(source: str, preamble: str, calls: list[Any], seconds: float) -> bytes:
    """The input of ``harness("call")``: ``calls`` are [name, encoded arguments, encoded keyword arguments]."""
    return dumps({"source": source, "preamble": preamble, "calls": calls, "seconds": seconds})


def results_of(output: bytes) -> tuple[bool, list[dict[str, Any]]]:
    """(whether the program was ready, one result a call) of that harness' output, up to the first line that is none.

    The program may have written lines of its own; none of them is trusted, or can do more than be wrong.
    """
    found: list[dict[str, Any]] = []
    for line in output.split(b"\n"):
        try:
            result = json.loads(line)
        except (ValueError, RecursionError):
            break
        if not isinstance(result, dict):
            break
        found.append(result)
    ready = bool(found) and found[0].get("ready") is True
    return ready, found[1:] if ready else []


def checking(checker: str) -> Program:
    """A checker program in open-r1's way, for inputs that ``judged`` makes: its arguments are three files."""
    return Program("python", harness("check").replace('"CHECKER"', repr(checker)))


def judged(given: str, expected: str, found: str) -> bytes:
    """The input of a checker: what the program was given, a right output, and its own."""
    return dumps([given, expected, found])


def by_files(language: str, source: str) -> str:
    """A program that reads ``input.txt`` and writes ``output.txt``, made into one for standard input and output."""
    if language == "cpp":
        return (INSIDE / "files.cpp").read_text("utf-8") + source
    return harness("files").replace('"SOURCE"', repr(source))
