"""Scripts beside the package: each answers ``--help``, and writes nothing for it."""

from __future__ import annotations

import runpy
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SCRIPTS = [
    *sorted(
        path for folder in ("tools", "examples") for path in (ROOT / folder).rglob("*.py") if "main" in path.read_text()
    ),
    *sorted((ROOT / "examples").rglob("*.sh")),
]


def test_there_are_scripts() -> None:
    assert {"config_reference.py", "long_files.py", "prepare.py", "run.sh"} <= {path.name for path in SCRIPTS}


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_a_script_says_how_it_is_used_and_writes_nothing(script: Path, tmp_path: Path) -> None:
    command = [sys.executable] if script.suffix == ".py" else ["bash"]
    environment = {"PYTHONPATH": str(ROOT), "PATH": "/usr/bin:/bin", "HOME": str(tmp_path), "OMP_NUM_THREADS": "1"}
    for option, status in (("--help", 0), ("--no-such-option", 2)):
        done = subprocess.run(
            [*command, str(script), option], capture_output=True, text=True, cwd=tmp_path, env=environment, timeout=300
        )
        assert done.returncode == status, done.stderr
        assert "usage" in (done.stdout + done.stderr).lower()
        assert not list(tmp_path.iterdir()), f"{option} is no name of a file"


def test_growth_of_fewer_steps_than_it_is_measured_over_is_refused_before_a_run(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    main = runpy.run_path(str(ROOT / "tools" / "growth.py"))["main"]
    with pytest.raises(SystemExit, match="2"):
        main([str(tmp_path), "--steps", "104"])
    assert "--steps 104: growth is measured after the first 100" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())
