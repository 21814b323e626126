"""The commands themselves: ``megatron-gspo convert`` both ways and ``bench convert``, as they are typed."""

from __future__ import annotations

import contextlib
import io
import json
import subprocess
from pathlib import Path
from typing import Any
from unittest import mock

import pytest

from tests.convert.ranks import tensors_of
from tests.pool import RankPool

pytestmark = pytest.mark.distributed

Said = tuple[int, str]
"""Exit status and standard output."""


def said_by(*words: str) -> Said:
    from megatron_gspo.cli import main

    with contextlib.redirect_stdout(io.StringIO()) as out, contextlib.redirect_stderr(out):
        status = main(words)
    return status, out.getvalue()


def commands(lines: list[tuple[str, ...]]) -> list[Said]:
    """What each says, one after the other in one process."""
    return [said_by(*words) for words in lines]


def test_the_command_converts_both_ways_and_says_what_it_did(ranks: RankPool, tiny: Path, tmp_path: Path) -> None:
    source, megatron, back = str(tiny), str(tmp_path / "megatron"), str(tmp_path / "back")
    lines = [
        ("convert", source, megatron, "--json"),
        ("convert", megatron, back, "--expect", "megatron", "--max-shard-gb", "0.001"),
        ("convert", "--verify", source, back, "--json"),
        ("convert", "--verify", "--logits", "--tokens", "3,1,4", "--layout", "tensor=1", source, megatron),
        ("convert", source, back, "--expect", "megatron"),
    ]
    (there, back_again, verified, compared, refused) = ranks.run(1, commands, lines)[0]
    assert [status for status, _ in (there, back_again, verified, compared, refused)] == [0, 0, 0, 0, 2]
    report = json.loads(there[1])
    assert (report["kind"], report["tensors"]) == ("megatron", 47)
    assert 0 < report["start_rss_bytes"] <= report["peak_rss_bytes"] and report["bytes_per_s"] > 0
    assert back_again[1].startswith(f"{back}: 47 tensors, 0.00 GB in ")
    assert tensors_of(Path(back)) == tensors_of(tiny)
    verdict = json.loads(verified[1])
    assert verdict["held"] and (verdict["equal"], verdict["tensors"], verdict["differences"]) == (47, 47, [])
    assert "logits: " in compared[1] and "47 of 47 tensors are the same bytes" in compared[1]
    assert refused[1] == f"error: {source} is a hugging-face checkpoint, and --expect says megatron\n"


def bench_convert(directory: Path) -> Said:
    """The benchmark with a model of some kilobytes; what it starts as a process is run in this one."""
    from megatron_gspo.bench import convert

    genuine = subprocess.run

    def run(command: list[str], **settings: Any) -> subprocess.CompletedProcess[str]:
        if tuple(command[:3]) != convert.COMMAND:
            return genuine(command, **settings)
        status, out = said_by(*command[3:])
        return subprocess.CompletedProcess(command, status, out, out)

    small = {"EXPERTS": 8, "HIDDEN": 32, "EXPERT_ROWS": 16, "HEADS": 4, "GROUPS": 2, "HEAD_DIM": 8, "VOCAB": 64}
    with mock.patch.multiple(convert, **small), mock.patch.object(subprocess, "run", run):
        return said_by("bench", "convert", "--gb", "0.00005", "--directory", str(directory))


def test_the_benchmark_converts_both_ways_and_its_table_says_so(ranks: RankPool, tmp_path: Path) -> None:
    status, out = ranks.run(1, bench_convert, tmp_path)[0]
    assert status == 0, out
    assert "1 layers of 8 experts" in out
    assert "to megatron: " in out and "to hugging-face: " in out and "cp: " in out
    assert out.splitlines()[-1] == "the same bytes came back: yes"
    assert not list(tmp_path.iterdir()), "nothing is left without --keep"
