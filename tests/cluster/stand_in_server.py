"""A stand-in for SGLang as ``serve`` starts it: by its command line, through ``rollout.server_python``."""

from __future__ import annotations

import itertools
import os
import sys
import threading
import time
from pathlib import Path
from typing import Any

from megatron_gspo.rollout.sglang.server import PARENT
from megatron_gspo.supervise import die_with_parent
from tests.training.stand_in import StandIn

DELAY_S = "STAND_IN_DELAY_S"
"""Environment variable: seconds that a response takes."""


def main(words: list[str]) -> None:
    """Serves as SGLang's command line says, and logs each request for responses."""
    die_with_parent(int(os.environ[PARENT]))
    option = dict(itertools.pairwise(words))

    delay_s = float(os.environ.get(DELAY_S, 0))

    def log(reply: dict[str, Any], request: dict[str, Any], count: int) -> dict[str, Any]:
        print("generate", flush=True)
        time.sleep(delay_s)
        return reply

    with StandIn(Path(option["--model-path"]), log, (option["--host"], int(option["--port"]))):
        threading.Event().wait()


def python_of_stand_ins(directory: Path, root: Path) -> Path:
    """An executable that takes the place of the servers' Python: it runs this file whatever it is told to run."""
    python = directory / "python-of-stand-ins"
    python.write_text(f'#!/bin/sh\nPYTHONPATH={root} exec {sys.executable} -m tests.cluster.stand_in_server "$@"\n')
    python.chmod(0o755)
    return python


if __name__ == "__main__":
    main(sys.argv[1:])
