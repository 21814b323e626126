"""What is in the repository, and what must not be."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


def git(*words: str) -> str:
    return subprocess.run(["git", "-C", str(ROOT), *words], capture_output=True, text=True, check=True).stdout


@pytest.mark.skipif(not (ROOT / ".git").exists() or shutil.which("git") is None, reason="no checkout of git")
def test_nothing_is_tracked_that_is_a_link_or_ignored() -> None:
    """A link to this checkout's own environment, merged, would replace it with a link to itself."""
    assert [line for line in git("ls-files", "-s").splitlines() if line.startswith("120000")] == []
    assert git("ls-files", "--cached", "--ignored", "--exclude-standard").splitlines() == []
