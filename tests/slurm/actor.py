"""Takes the place of Python in a job, and of what the job script starts with it: servers, torchrun and its rank.

The servers die once on each node. A rank works until it is told to stop, which takes longer on the second node, or
until there is a file "finish".
"""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import FrameType

PLACE = "ACTOR_PLACE"
"""Environment variable: a directory."""
STOPPING_S = {"n1": 1, "n2": 5}


def serve(words: str, place: Path) -> int:
    """Dies the first time; then says where it is, until its file is gone."""
    (node,) = re.findall(r"--node (\S+)", words)
    (directory,) = re.findall(r'servers_from="([^"]+)"', words)
    died, file = place / f"died-{node}", Path(directory) / f"{node}.json"
    if not died.exists():
        died.touch()
        return 1
    file.parent.mkdir(exist_ok=True)
    file.write_text("{}")
    while file.exists():
        time.sleep(0.2)
    return 0


def rank(place: Path) -> int:
    """Ends with 0, as a rank that torchrun would start again."""
    asked = []

    def ask(number: int, frame: FrameType | None) -> None:
        asked.append(number)

    signal.signal(signal.SIGUSR1, ask)
    while not asked and not (place / "finish").exists():
        time.sleep(0.2)
    if asked:
        time.sleep(STOPPING_S[os.environ["SLURMD_NODENAME"]])
        print("saved", flush=True)
    return 0


def main(words: list[str]) -> int:
    """The exit status."""
    place, line = Path(os.environ[PLACE]), " ".join(words)
    if "megatron_gspo.cli serve" in line:
        return serve(line, place)
    if "torch.distributed.run" in line:
        print(f"torchrun {line}", flush=True)
        return subprocess.run([sys.executable, __file__, "rank"], check=False).returncode
    return rank(place)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
