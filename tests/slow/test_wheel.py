"""A wheel and a source distribution hold the package, all of it and nothing else, and work where nothing else is."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import zipfile
from email.parser import HeaderParser
from pathlib import Path

import pytest

from tests.unit.report_runs import make_run
from tests.unit.test_package_files import PACKAGE, data_files

pytestmark = pytest.mark.slow_suite

ROOT = PACKAGE.parent
BUILD = "from setuptools import build_meta as b; b.build_sdist({0!r}); b.build_wheel({0!r})"
INFO = "megatron_gspo-0.1.0.dist-info"
SUFFIX = sysconfig.get_config_var("EXT_SUFFIX")


def call(*command: object, where: Path, **variables: str) -> str:
    clean = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "PYTHONWARNINGS")}
    words = [str(word) for word in command]
    done = subprocess.run(words, cwd=where, env=clean | variables, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """(wheel, source distribution) of a copy of the checkout, with what lies in a checkout besides the package."""
    place = tmp_path_factory.mktemp("built")
    source = place / "source"
    ignore = shutil.ignore_patterns("__pycache__", "*.so", ".*", "build")
    for name in ("megatron_gspo", "tests", "examples", "tools", "docs", "docker"):
        shutil.copytree(ROOT / name, source / name, ignore=ignore)
    for name in ("pyproject.toml", "setup.py", "README.md", "LICENSE", "Makefile"):
        shutil.copy(ROOT / name, source / name)
    call(sys.executable, "-c", BUILD.format(str(place)), where=source)
    (wheel,), (archive,) = place.glob("*.whl"), place.glob("*.tar.gz")
    return wheel, archive


def modules() -> set[str]:
    return {path.relative_to(PACKAGE).as_posix() for path in PACKAGE.rglob("*.py")}


def test_the_wheel_is_the_package_and_its_extension(built: tuple[Path, Path]) -> None:
    with zipfile.ZipFile(built[0]) as wheel:
        names = set(wheel.namelist())
        entry = wheel.read(f"{INFO}/entry_points.txt").decode()
    about = {name for name in names if name.startswith(f"{INFO}/")}
    inside = modules() | data_files(PACKAGE) | {f"_packing{SUFFIX}"}
    assert names - about == {f"megatron_gspo/{name}" for name in inside}
    assert entry.split() == ["[console_scripts]", "megatron-gspo", "=", "megatron_gspo.cli:main"]
    assert f"{INFO}/licenses/LICENSE" in about


def test_the_wheels_metadata_says_what_it_is_and_needs(built: tuple[Path, Path]) -> None:
    with zipfile.ZipFile(built[0]) as wheel:
        fields = HeaderParser().parsestr(wheel.read(f"{INFO}/METADATA").decode())
    assert (fields["Name"], fields["Version"], fields["License-Expression"]) == ("megatron-gspo", "0.1.0", "Apache-2.0")
    assert fields["Requires-Python"] == "<3.13,>=3.11"
    needs = [need for need in fields.get_all("Requires-Dist", []) if "extra ==" not in need]
    assert {"torch<2.15,>=2.13", "pydantic>=2.11"} <= set(needs)
    assert [need for need in needs if need.startswith("megatron-core")] == [
        'megatron-core==0.16.1; python_version < "3.12"',
        'megatron-core==0.19.2; python_version >= "3.12"',
    ]


def test_the_source_distribution_can_build_the_wheel(built: tuple[Path, Path]) -> None:
    with tarfile.open(built[1]) as archive:
        names = {name.partition("/")[2] for name in archive.getnames() if not archive.getmember(name).isdir()}
    package = {name.removeprefix("megatron_gspo/") for name in names if name.startswith("megatron_gspo/")}
    assert package == modules() | data_files(PACKAGE)
    others = {name for name in names if not name.startswith(("megatron_gspo/", "megatron_gspo.egg-info/"))}
    assert others == {"LICENSE", "PKG-INFO", "README.md", "pyproject.toml", "setup.cfg", "setup.py"}


def test_the_wheel_works_in_an_environment_of_its_own(built: tuple[Path, Path], tmp_path: Path) -> None:
    """What it needs lies in this test's environment, whose own (editable) installation is out of its reach."""
    call(sys.executable, "-m", "venv", "--without-pip", tmp_path / "venv", where=tmp_path)
    python, command = (tmp_path / "venv/bin" / name for name in ("python", "megatron-gspo"))
    pip = [sys.executable, "-m", "pip", "--python", python, "--disable-pip-version-check"]
    call(*pip, "install", "--no-deps", "--no-index", built[0], where=tmp_path)
    (packages,) = (tmp_path / "venv/lib").glob("python*/site-packages")
    (packages / "needed.pth").write_text(sysconfig.get_path("purelib") + "\n")
    assert call(*pip, "check", where=tmp_path).strip() == "No broken requirements found."
    where = call(python, "-c", "from megatron_gspo import _packing; print(_packing.__file__)", where=tmp_path)
    assert Path(where.strip()) == packages / f"megatron_gspo/_packing{SUFFIX}"
    assert "usage: megatron-gspo" in call(command, "--help", where=tmp_path)
    run = make_run(tmp_path / "run").path
    call(command, "report", run, where=tmp_path)
    assert "<html" in (run / "report.html").read_text()
    assert "30.5 B" in call(command, "plan", "qwen3-30b-a3b", where=tmp_path)  # whose shape is a file of the package
