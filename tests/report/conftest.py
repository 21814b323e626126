"""One headless browser for all tests of the page, and pages to open in it."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest

from tests.report.browser import Browser, find_chromium


@pytest.fixture(scope="session")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    """Skips without a Chromium; in CI its absence is a failure."""
    executable = find_chromium()
    if executable is None:
        reason = f"no Chromium ($CHROMIUM = {os.environ.get('CHROMIUM')!r}): make browser"
        (pytest.fail if os.environ.get("CI") == "true" else pytest.skip)(reason)
    with Browser(executable, tmp_path_factory.mktemp("chromium")) as one:
        yield one
