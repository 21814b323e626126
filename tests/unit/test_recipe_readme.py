"""A new user's way: what the READMEs of the recipes print runs, up to the point where GPUs are needed.

A line of a README that ends in "(network)", "(GPUs)" or "(minutes)" needs that, and is not run here.
"""

from __future__ import annotations

import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from megatron_gspo.cli import main
from tests.unit.recipes import FOLDERS, ROOT, stand_in
from tests.unit.test_prepare_data import dapo, parquet
from tools import prepare_data

NEEDS = re.compile(r"\s+# \((network|GPUs|minutes)\)")
NAMES = dict(zip(FOLDERS, ("qwen3-30b-a3b", "qwen3-235b-a22b", "moonlight-16b-a3b", "qwen3-0.6b"), strict=True))
KNOWN = ("megatron-gspo", "python", "torchrun", "bash", "SERVERS=each", "hf")


def commands(folder: str) -> Iterator[tuple[list[str], str]]:
    """(words, what it needs or "") of every command that a README prints in a block."""
    text = (ROOT / "examples" / folder / "README.md").read_text(encoding="utf-8")
    for line in re.findall(r"^ {4}(\S.*)$", text, re.MULTILINE):
        needs = NEEDS.search(line)
        yield shlex.split(line, comments=True), needs[1] if needs else ""


@pytest.fixture(scope="module")
def checkout(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkout into which the network's files have come: a small model in the large one's place, short data."""
    where = tmp_path_factory.mktemp("checkout")
    for folder in ("examples", "tools"):
        (where / folder).symlink_to(ROOT / folder)
    stand_in(where / "models/Qwen3-30B-A3B-Base", "qwen3-30b-a3b")
    (where / "published/data").mkdir(parents=True)
    problems = [dapo(f"What is {number} + 1?", str(number + 1), str(number)) for number in range(70)]
    parquet(where / "published/data/dapo-math-17k.parquet", problems * 10)
    parquet(where / "published/data/aime-2024.parquet", problems[:30] * 32)
    return where


def test_every_line_is_a_command_that_this_test_knows() -> None:
    for folder in FOLDERS:
        found = list(commands(folder))
        assert {words[0] for words, _ in found} <= set(KNOWN)
        for words, needs in found:
            assert needs or words[0] in ("megatron-gspo", "python"), words
            assert needs == "network" or words[0] != "hf"
    said = [" ".join(words[:2]) for words, needs in commands("qwen3_30b_a3b") if not needs]
    assert said.count("python tools/prepare_data.py") == 2
    assert {"megatron-gspo plan", "megatron-gspo doctor", "megatron-gspo convert"} <= set(said)


def test_the_30bs_commands_run_up_to_the_gpus(
    checkout: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(checkout)
    ran = [words for words, needs in commands("qwen3_30b_a3b") if not needs]
    for words in ran:
        assert run(words, monkeypatch) == 0, words
        said = capsys.readouterr()
        assert "Traceback" not in said.err and not said.err.startswith("error"), words
    assert len((checkout / "data/dapo/train.jsonl").read_text().splitlines()) == 70
    assert len((checkout / "data/aime24/eval.jsonl").read_text().splitlines()) == 30
    assert (checkout / "models/Qwen3-30B-A3B-megatron/config.json").is_file()


@pytest.mark.parametrize("folder", FOLDERS)
def test_plans_that_a_readme_names_are_made_without_the_model(
    folder: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "examples").symlink_to(ROOT / "examples")
    monkeypatch.chdir(tmp_path)
    plans = [words for words, needs in commands(folder) if words[:2] == ["megatron-gspo", "plan"] and not needs]
    assert plans
    for words in plans:
        assert run(words, monkeypatch) == 0, words
        said = capsys.readouterr().out
        assert "a step  " in said and said.startswith("qwen3-1.7b" if "model.path" in words[3] else NAMES[folder])


def test_before_the_files_are_there_each_command_says_what_brings_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "examples").symlink_to(ROOT / "examples")
    monkeypatch.chdir(tmp_path)
    assert main(["doctor", "examples/qwen3_30b_a3b/gspo.toml", "--ranks", "8"]) == 2
    said = capsys.readouterr().out
    assert "make it: hf download Qwen/Qwen3-30B-A3B-Base --local-dir models/Qwen3-30B-A3B-Base" in said
    assert "make it: python tools/prepare_data.py dapo published/data/aime-2024.parquet data/aime24" in said
    assert main(["convert", "models/Qwen3-30B-A3B-Base", "models/Qwen3-30B-A3B-megatron"]) == 2
    assert capsys.readouterr().err.startswith("error: models/Qwen3-30B-A3B-Base")


def run(words: list[str], monkeypatch: pytest.MonkeyPatch) -> int:
    """A command as a shell would run it, in this process: importing everything anew takes most of the time. ``convert``
    becomes a rank, which a process is for good."""
    if words[:2] == ["megatron-gspo", "convert"]:
        return subprocess.run([sys.executable, "-m", "megatron_gspo.cli", *words[1:]], check=False).returncode
    if words[0] == "megatron-gspo":
        return main(words[1:])
    assert words[:2] == ["python", "tools/prepare_data.py"]
    monkeypatch.setattr(sys, "argv", words[1:])
    try:
        prepare_data.main()
    except SystemExit as end:
        return int(end.code or 0)
    return 0
