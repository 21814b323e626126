"""Sandboxes for tests."""

from __future__ import annotations

import os
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from megatron_gspo.sandbox import local
from tests.sandbox.world import OTHERS, World, descendants, draw

NAMESPACES = ("bwrap", "--unshare-all", "--ro-bind", "/", "/", "--proc", "/proc", "true")


@pytest.fixture(scope="session")
def namespaces() -> None:
    """Skips where programs cannot be isolated; where CI=true they must be."""
    lacks = "no bwrap" if shutil.which("bwrap") is None else ""
    if not lacks:
        tried = subprocess.run(NAMESPACES, capture_output=True, text=True, check=False)
        lacks = "" if tried.returncode == 0 else f"no namespaces: {tried.stderr.strip()}"
    if lacks and os.environ.get("CI") == "true":
        pytest.fail(f"{lacks}: make bubblewrap, and a machine that allows them")
    if lacks:
        pytest.skip(lacks)


@pytest.fixture(autouse=True)
def others() -> None:
    """What runs before a test is not what it has left."""
    OTHERS.clear()
    OTHERS.update(descendants())


@pytest.fixture
def world(namespaces: None, monkeypatch: pytest.MonkeyPatch) -> Iterator[World]:
    """A host that would notice. Not in pytest's own directory, which other users may not enter."""
    monkeypatch.setattr(local, "other_user", draw)
    with tempfile.TemporaryDirectory(dir="/tmp") as directory:
        made = World(Path(directory))
        yield made
        made.close()
