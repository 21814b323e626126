"""One headless browser for all tests of the page, and pages to open in it."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest

from tests.report.browser import Browser, find_chromium


@pytest.fixture(scope="session")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    """Skips without a Chromium, which ``make browser`` installs where it may."""
    executable = find_chromium()
    if executable is None:
        pytest.skip(f"no Chromium ($CHROMIUM = {os.environ.get('CHROMIUM')!r}): make browser")
    with Browser(executable, tmp_path_factory.mktemp("chromium")) as one:
        yield one
