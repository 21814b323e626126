"""Measures how a long data file is opened: `python tools/long_files.py DIRECTORY --model MODEL [--rows 1800000]`.

Writes DAPO-Math's layout as JSON lines and as Parquet (row groups of 2**20 rows, as pandas writes them) into DIRECTORY,
unless they are there, and loads each in a process of its own: seconds, and the growth of its resident memory.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil

DISTINCT = 17_917
ASK = (
    "Solve the following math problem step by step. The last line of your response should be of the form Answer: "
    "$Answer (without quotes) where $Answer is the answer to the problem.\n\n"
)


def row(number: int) -> dict[str, Any]:
    """One of DAPO-Math's, whose 17,917 prompts stand there a hundred times, index and all."""
    n = number % DISTINCT
    problem = f"Let $a_{{1}} = {n}$ and $a_{{k+1}} = a_k + {n % 97} k$ for all $k \\ge 1$. " * 6
    return {
        "data_source": "math_dapo",
        "prompt": [{"content": f"{ASK}{problem}Find $a_{{{n % 13 + 2}}}$.", "role": "user"}],
        "ability": "MATH",
        "reward_model": {"ground_truth": str(n + 31 * n % 1009), "style": "rule-lighteval/MATH_v2"},
        "extra_info": {"index": f"{n:08x}-dapo-{n * 7919:012x}"},
    }


def write(directory: Path, rows: int) -> list[Path]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    directory.mkdir(parents=True, exist_ok=True)
    lines, table = directory / f"dapo-{rows}.jsonl", directory / f"dapo-{rows}.parquet"
    if not lines.exists():
        with lines.open("w", encoding="utf-8") as file:
            file.writelines(json.dumps(row(number)) + "\n" for number in range(rows))
    if not table.exists():
        schema = pa.Table.from_pylist([row(0)]).schema
        with pq.ParquetWriter(table, schema) as writer:
            for group in _blocks(rows, 2**20):
                writer.write_table(pa.Table.from_pylist([row(n) for n in group], schema), row_group_size=2**20)
    return [lines, table]


def _blocks(rows: int, size: int) -> Iterator[range]:
    return (range(start, min(start + size, rows)) for start in range(0, rows, size))


def measure(path: Path, model: Path) -> None:
    """Loads the file, draws 1,024 prompts of a shuffled order, and fingerprints it; prints a line."""
    from megatron_gspo.data import PromptCursor, load_prompts, load_tokenizer

    tokenizer = load_tokenizer(model)
    process = psutil.Process()
    before, begin = process.memory_info().rss, time.perf_counter()
    prompts = load_prompts(path, tokenizer=tokenizer)
    loaded, begin = time.perf_counter() - begin, time.perf_counter()
    for index in PromptCursor(len(prompts), seed=0).take(1024):
        assert prompts.prompts[index].answer
    drawn, begin = time.perf_counter() - begin, time.perf_counter()
    prompts.looked.fingerprint()
    hashed = time.perf_counter() - begin
    growth = (process.memory_info().rss - before) / 2**20
    print(
        f"{path.name}: {len(prompts)} prompts, {path.stat().st_size / 2**30:.2f} GiB: loaded in {loaded:.1f} s, 1,024 "
        f"drawn in {drawn:.1f} s, fingerprint in {hashed:.1f} s, {growth:.0f} MiB more resident memory"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("directory", type=Path)
    parser.add_argument("--rows", type=int, default=1_791_700)
    parser.add_argument("--model", type=Path, required=True, help="directory of a tokenizer with a chat template")
    parser.add_argument("--only", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.only:
        measure(options.only, options.model)
        return
    for path in write(options.directory, options.rows):
        command = [sys.executable, __file__, str(options.directory), "--model", str(options.model), "--only", str(path)]
        subprocess.run(command, check=True)


if __name__ == "__main__":
    main()
