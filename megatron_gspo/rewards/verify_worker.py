"""The process in which math-verify runs: a line of JSON in, a line of JSON out. Run as a file; see ``verifier``.

It stops itself, whatever it is doing and whether or not anybody still listens: the kernel ends it when an expression
has taken its processor time (``SIGPROF`` without a handler), and it returns when its input is closed.
"""

from __future__ import annotations

import json
import logging
import os
import resource
import signal
import sys

POINTS = (13, 29, -17)
"""Tenths, from which unknowns get values."""
STARTING_S = 120.0
"""Processor time for importing math-verify and sympy; about one second on an idle machine."""


def main(limit_s: float, memory_bytes: int) -> None:
    """Answers questions from standard input until it ends."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the trainer's to handle; it closes our input
    signal.signal(signal.SIGPROF, signal.SIG_DFL)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGPROF})
    signal.setitimer(signal.ITIMER_PROF, STARTING_S)
    replies = sys.stdout.buffer
    import math_verify

    for module in ("parser", "grader"):  # they warn that their own timeouts are off
        logging.getLogger(f"math_verify.{module}").setLevel(logging.ERROR)
    equal(math_verify, "(4)", r"(\sqrt{(2)}\cdot \sqrt{(8)})")  # its parser and sympy build tables on first use
    resource.setrlimit(resource.RLIMIT_AS, (memory_bytes, memory_bytes))
    os.dup2(os.open(os.devnull, os.O_WRONLY), 2)  # nobody reads on from the pipe, and a full one blocks
    replies.write(b"ready\n")
    replies.flush()
    for line in sys.stdin.buffer:
        expected, found = json.loads(line)
        signal.setitimer(signal.ITIMER_PROF, limit_s)
        try:
            answer = equal(math_verify, expected, found)
        except Exception:  # MemoryError and RecursionError among them: an expression that it cannot read is not equal
            answer = False
        signal.setitimer(signal.ITIMER_PROF, 0)
        replies.write(json.dumps(answer).encode() + b"\n")
        replies.flush()


def equal(math_verify, expected: str, found: str) -> bool:  # type: ignore[no-untyped-def]
    """math-verify's judgement of two pieces of LaTeX, without its timeouts, which are signals to Python code."""
    gold = math_verify.parse(f"${expected}$", parsing_timeout=None)
    target = math_verify.parse(f"${found}$", parsing_timeout=None)
    return bool(math_verify.verify(gold, target, timeout_seconds=None)) and agree(gold, target)


def agree(gold, target) -> bool:  # type: ignore[no-untyped-def]
    """Whether two expressions that math-verify found equal have equal values, at points drawn for their unknowns.

    It compares some pieces about, and parses others in part (1 - 1/e as 1). What has no value, a set or a relation,
    is left to it.
    """
    import sympy

    left, right = gold[0], target[0]
    if isinstance(left, sympy.MatrixBase) and isinstance(right, sympy.MatrixBase):
        return left.shape == right.shape and all(agree([a], [b]) for a, b in zip(left, right))  # noqa: B905
    if not (isinstance(left, sympy.Expr) and isinstance(right, sympy.Expr)):
        return True
    unknowns = sorted(left.free_symbols | right.free_symbols, key=str)
    for point in POINTS:
        values = {name: sympy.Rational(point + 7 * place, 10) for place, name in enumerate(unknowns)}
        a, b = (complex(side.subs(values).evalf(30)) for side in (left, right))
        if a == a and b == b and abs(a - b) > 1e-9 * max(1.0, abs(a)):
            return False
    return True


if __name__ == "__main__":
    main(float(sys.argv[1]), int(sys.argv[2]))
