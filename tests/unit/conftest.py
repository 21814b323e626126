"""The quickstart's random model, and a configuration of it that doctor finds nothing wrong with."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from tests.unit.doctor_cases import Case, prepare


@pytest.fixture(scope="session")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("made")
    prepare().write_model(directory / "model", seed=0)
    return directory


@pytest.fixture
def case(made: Path, tmp_path: Path) -> Case:
    shutil.copytree(made / "model", tmp_path / "model")
    return Case(tmp_path).write()
