"""Runs a checker program: its arguments are files with the input, a right output, and the output that is judged.

Its input is a JSON list of the three texts; what the checker prints is its output.
"""

from __future__ import annotations

import json
import os
import sys
import tempfile

CHECKER = "CHECKER"


def main() -> None:
    texts = json.loads(sys.stdin.buffer.read())
    directory = tempfile.mkdtemp()
    os.chdir(directory)
    names = ["input.txt", "correct_output.txt", "solution_output.txt"]
    for name, text in zip(names, texts, strict=True):
        with open(name, "w", encoding="utf-8", errors="surrogatepass", newline="") as file:
            file.write(text)
    sys.argv = ["checker.py", *names]
    exec(compile(CHECKER, "checker.py", "exec", dont_inherit=True), {"__name__": "__main__", "__file__": "checker.py"})


if __name__ == "__main__":
    main()
