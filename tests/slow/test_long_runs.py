"""What takes minutes: every layout in every mode of parity, and files of millions of rows. ``make test-slow``."""

from __future__ import annotations

import json
import subprocess
import sys
import threading
import time
from dataclasses import dataclass
from pathlib import Path

import psutil
import pytest

from tests import oracle
from tests.unit import published
from tools import long_files

pytestmark = [pytest.mark.slow_suite, pytest.mark.timeout(1800)]
ROWS = 1_791_700
"""Of DAPO-Math's own file."""
START_S = 60.0
MOST_MORE_MIB = 1024


@pytest.mark.parametrize("more", [[], ["--replay"], ["--dtype", "float32"]], ids=["float64", "replay", "float32"])
def test_every_layout_of_up_to_eight_ranks_computes_the_two_steps_of_one_process(more: list[str]) -> None:
    words = ["parity", "--layouts", "all", "--max-ranks", "8", "--json", *more]
    command = [sys.executable, "-m", "megatron_gspo.cli", *words]
    started = time.monotonic()
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    print(f"{' '.join(words)}: {time.monotonic() - started:.0f} s")
    assert done.returncode == 0, done.stderr[-2000:]
    rows = json.loads(done.stdout)["layouts"]
    assert len(rows) > 40
    assert {row["verdict"] for row in rows} == {"held"}


@dataclass(frozen=True)
class Start:
    """How a command began."""

    output: str
    seconds: float
    peak_mib: float
    """Of its largest process."""


def run(*words: str) -> Start:
    """Runs a command of ours to its end."""
    started, peak = time.monotonic(), [0.0]
    command = [sys.executable, "-W", "ignore", "-m", "megatron_gspo.cli", *words]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)

    def watch() -> None:
        while process.poll() is None:
            try:
                root = psutil.Process(process.pid)
                members = [root, *root.children(recursive=True)]
                peak[0] = max(peak[0], *(member.memory_info().rss / 2**20 for member in members))
            except psutil.Error:  # one has ended
                pass
            time.sleep(0.1)

    watcher = threading.Thread(target=watch)
    watcher.start()
    output = process.communicate()[0]
    watcher.join()
    return Start(output, time.monotonic() - started, peak[0])


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    import torch

    directory = published.write(tmp_path_factory.mktemp("model"), next(iter(published.FAMILIES)))
    return oracle.make_tiny_qwen3_moe(directory, layers=2, vocab=published.VOCABULARY, dtype=torch.bfloat16)


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    directory = tmp_path_factory.mktemp("rows")
    names = (*long_files.write(directory, 20), *long_files.write(directory, ROWS))
    return {path.name: path for path in names}


def configure(directory: Path, model: Path, data: Path) -> Path:
    """A run whose server is not there: it ends when its prompts are read."""
    path = directory / f"{data.name}.toml"
    path.write_text(
        f'[model]\npath = "{model}"\n[data]\npath = "{data}"\nskip_bad = true\n[reward]\nfunction = "gsm8k"\n'
        f'[train]\nrun_dir = "{directory}/run"\noverwrite = true\nmicrobatch_tokens = 8192\n'
        f'[rollout]\nservers = ["http://127.0.0.1:1"]\nretries = 0\n'
        f"max_prompt_tokens = 2048\nmax_response_tokens = 64\n"
    )
    return path


@pytest.mark.parametrize("kind", ["jsonl", "parquet"])
@pytest.mark.parametrize("command", ["doctor", "train"])
def test_millions_of_rows_start_within_a_minute_and_a_gibibyte(
    tmp_path: Path, model: Path, files: dict[str, Path], command: str, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(model.parent / "cache"))
    few = run(command, str(configure(tmp_path, model, files[f"dapo-20.{kind}"])))
    many = run(command, str(configure(tmp_path, model, files[f"dapo-{ROWS}.{kind}"])))
    print(f"{command} {kind}: {many.seconds:.0f} s ({few.seconds:.0f} s), {many.peak_mib:.0f} MiB ({few.peak_mib:.0f})")
    assert f"{ROWS} prompts" in many.output, many.output[-2000:]
    assert many.peak_mib - few.peak_mib < MOST_MORE_MIB
    assert many.seconds < START_S
