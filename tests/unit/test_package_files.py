"""What a wheel must hold is what lies in the package. (tests/slow/test_wheel.py builds one.)"""

from __future__ import annotations

import tomllib
from pathlib import Path

import megatron_gspo

PACKAGE = Path(megatron_gspo.__file__).parent
MADE = {".pyc", ".so"}


def data_files(package: Path) -> set[str]:
    """Files beside the code, by their names in the package."""
    files = (path for path in package.rglob("*") if path.is_file() and path.suffix not in MADE | {".py"})
    return {path.relative_to(package).as_posix() for path in files}


def test_every_file_beside_the_code_is_one_that_the_wheel_takes() -> None:
    """setuptools leaves out what no pattern names, without a word; a pattern that finds nothing is out of date."""
    project = tomllib.loads((PACKAGE.parent / "pyproject.toml").read_text())
    patterns = project["tool"]["setuptools"]["package-data"]["megatron_gspo"]
    taken = {pattern: {path.relative_to(PACKAGE).as_posix() for path in PACKAGE.glob(pattern)} for pattern in patterns}
    assert all(taken.values())
    assert data_files(PACKAGE) == set().union(*taken.values())


def test_every_directory_with_code_is_a_package() -> None:
    assert {path.parent for path in PACKAGE.rglob("*.py")} == {path.parent for path in PACKAGE.rglob("__init__.py")}
