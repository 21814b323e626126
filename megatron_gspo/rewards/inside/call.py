"""Calls functions of a program with given arguments, and says what they returned.

Its input is one JSON object: ``source``, ``preamble`` (imports that the program's dialect takes for granted),
``calls`` (each [name, arguments, keyword arguments]) and ``seconds`` of processor time for each call. Its output is a
line of JSON for each: {"ok": value} or {"raised": name of the exception}; before them one line, {"ready": true}, when
the program could be compiled and has run to its end. After a call that takes too long nothing follows: SIGPROF's
default is the end of the process.

What the program prints goes nowhere; lines go to a copy of the output that it has no name for. It can find that copy,
and write lines of its own. They are compared, outside, with values that were never here: whoever can write the right
ones has computed them.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import types
from functools import partial
from typing import Any

from megatron_gspo.rewards.inside.values import decode, dumps, encode  # this line is left out: they stand above

SYNTAX = 3
"""Exit status of a program that does not compile."""


def main() -> None:
    request = json.loads(sys.stdin.buffer.read())
    channel = os.dup(1)
    nowhere = os.open(os.devnull, os.O_RDWR)
    for descriptor in (0, 1):
        os.dup2(nowhere, descriptor)
    sys.setrecursionlimit(20_000)
    module = types.ModuleType("solution")
    sys.modules["solution"] = module
    try:
        code = compile(request["source"], "solution.py", "exec", dont_inherit=True)
    except (SyntaxError, ValueError, RecursionError, MemoryError, OverflowError):
        os._exit(SYNTAX)
    exec(request["preamble"], module.__dict__)
    lent = lend_again(module, [name for name, *_ in request["calls"]])
    exec(code, module.__dict__)
    send(channel, {"ready": True})
    for name, arguments, named in request["calls"]:
        signal.setitimer(signal.ITIMER_PROF, request["seconds"])
        send(channel, called(module, lent, name, decode(arguments), decode(named)))
    os._exit(0)  # without what the program has registered for its end


def lend_again(module: types.ModuleType, names: list[str]) -> dict[str, Any]:
    """What the preamble has lent under the names that will be called, in a form that nobody else can have: operator's
    ``add`` is no answer of a program that is asked for one."""
    lent = {name: partial(module.__dict__[name]) for name in names if callable(module.__dict__.get(name))}
    module.__dict__.update(lent)
    return lent


def called(
    module: types.ModuleType, lent: dict[str, Any], name: str, arguments: list[Any], named: dict[str, Any]
) -> dict[str, Any]:
    """What a call returned; a method of a fresh ``Solution``, where the program has that class and no such function."""
    try:
        return {"ok": encode(function_of(module, lent, name)(*arguments, **named))}
    except Exception as error:
        return {"raised": type(error).__name__}


def function_of(module: types.ModuleType, lent: dict[str, Any], name: str) -> Any:
    """A function of the program by its name, which is none that was lent. Raises AttributeError."""
    found = module.__dict__.get(name)
    if found is not None and found is not lent.get(name):
        return found
    if "Solution" in module.__dict__:
        return getattr(module.Solution(), name)
    raise AttributeError(name)


def send(channel: int, line: dict[str, Any]) -> None:
    """Writes a line, all of it."""
    left = dumps(line)
    while left:
        left = left[os.write(channel, left) :]


if __name__ == "__main__":
    main()
