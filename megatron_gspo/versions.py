"""Which versions of what we build on were tested, and when: the one table that ``doctor`` and ``train`` read."""

from __future__ import annotations

import platform
from collections.abc import Iterable
from importlib import metadata

from packaging.specifiers import SpecifierSet
from packaging.version import InvalidVersion, Version

TESTED_ON = "2026-11-20"
TESTED: dict[str, tuple[str, ...]] = {
    "python": ("==3.11.*", "==3.12.*"),
    "torch": ("==2.13.*", "==2.14.*"),
    "megatron-core": ("==0.16.1", "==0.19.2"),
    "transformers": (">=5.19,<6",),
    "pydantic": (">=2.11,<3",),
    "sglang": ("==0.5.23",),
}
"""Package -> specifiers, any of which may hold. sglang lives in the servers' environment; the rest in the trainer's."""

TRAINER = tuple(name for name in TESTED if name != "sglang")


def installed(package: str) -> str | None:
    """The version of a package in this process's environment, or of Python itself; None when it is not there."""
    if package == "python":
        return platform.python_version()
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def untested(package: str, version: str | None) -> str | None:
    """What is wrong with ``version``, with what was tested beside it; None when nothing is."""
    try:
        if version is not None and any(Version(version) in SpecifierSet(text) for text in TESTED[package]):
            return None
    except InvalidVersion:
        pass
    tested = " or ".join(text.removeprefix("==") for text in TESTED[package])
    what = f"{package} {version} was not tested" if version else f"{package} is missing"
    return f"{what} (tested on {TESTED_ON}: {tested})"


def untested_here(packages: Iterable[str] = TRAINER) -> list[str]:
    """One line for each package of the trainer's environment that was not tested in its version."""
    return [line for package in packages if (line := untested(package, installed(package)))]
