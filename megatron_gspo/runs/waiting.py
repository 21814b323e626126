"""What takes long before the first step, said while it lasts."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator

from megatron_gspo.config import RolloutConfig

NAMES = {"sglang": "SGLang"}
"""Engines as they write themselves."""


@contextlib.contextmanager
def starting_servers(
    config: RolloutConfig, device: str, say: Callable[[str], None], purpose: str = ""
) -> Iterator[None]:
    """Says that local servers are started (``purpose``: for what), and how long it took; nothing more when it
    raises."""
    number, name = config.local_servers or 1, NAMES.get(config.engine, config.engine)
    usual = "about a minute on a CPU" if device == "cpu" else "a minute, and longer for a large model"
    what = f"{number} {name} server{'' if number == 1 else 's'}" + f" {purpose}" * bool(purpose)
    say(f"starting {what} ({usual}) ...")
    begin = time.monotonic()
    yield
    say(f"ready after {time.monotonic() - begin:.0f} s")
