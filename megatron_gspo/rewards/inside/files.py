"""Runs a program that reads ``input.txt`` and writes ``output.txt``: they are this one's input and output."""

from __future__ import annotations

import gc
import os
import shutil
import sys

SOURCE = "SOURCE"


def main() -> None:
    channel = os.dup(1)  # the program may close or replace what it has
    with open("input.txt", "wb") as given:
        given.write(sys.stdin.buffer.read())
    try:
        exec(compile(SOURCE, "solution.py", "exec", dont_inherit=True), {"__name__": "__main__"})
    except SystemExit as end:
        if end.code not in (None, 0):
            raise
    gc.collect()  # closes the files that the program has left open
    if not sys.stdout.closed:
        sys.stdout.flush()
    if os.path.exists("output.txt"):
        with open("output.txt", "rb") as written, os.fdopen(channel, "wb") as output:
            shutil.copyfileobj(written, output)


if __name__ == "__main__":
    main()
