"""Small files in exactly the formats of published suites, and a byte-level tokenizer that can read them."""

from __future__ import annotations

import base64
import csv
import json
import pickle
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

Rows = list[dict[str, Any]]


def jsonl(path: Path, rows: Rows) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def parquet(path: Path, rows: Rows) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.Table.from_pylist(rows), path)
    return path


def table(path: Path, rows: Rows) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    return path


def aime24(data: Path) -> None:
    rows = [
        {
            "id": 60 + i,
            "problem": f"Find ${i} + 1$.",
            "solution": "Add.",
            "answer": f"{i + 1:03d}",
            "url": "u",
            "year": "2024",
        }
        for i in range(3)
    ]
    parquet(data / "aime24/data/train-00000-of-00001.parquet", rows)


def aime25(data: Path) -> None:
    for part, first in (("I", 1), ("II", 3)):
        rows = [{"question": f"Find the value of {n} times 2.", "answer": f"{2 * n}"} for n in (first, first + 1)]
        jsonl(data / f"aime25/aime2025-{part}.jsonl", rows)


def math500(data: Path) -> None:
    rows = [
        {
            "problem": "Convert the point $(0,3)$ to polar coordinates.",
            "solution": "So it is $\\boxed{\\left( 3, \\frac{\\pi}{2} \\right)}$.",
            "answer": "\\left( 3, \\frac{\\pi}{2} \\right)",
            "subject": "Precalculus",
            "level": 2,
            "unique_id": "test/precalculus/807.json",
        },
        {
            "problem": "What is $2+5$?",
            "solution": "7",
            "answer": "7",
            "subject": "Algebra",
            "level": 1,
            "unique_id": "t/1",
        },
    ]
    jsonl(data / "math500/test.jsonl", rows)


def gsm8k(data: Path) -> None:
    rows = [{"question": f"Ann has {n} apples and buys 2. How many?", "answer": f"{n}+2\n#### {n + 2}"} for n in (3, 4)]
    jsonl(data / "gsm8k/test.jsonl", rows)


def gpqa(data: Path) -> None:
    rows = [
        {
            "Pre-Revision Question": "old",
            "Question": f"Which energy is number {n}?\n",
            "Correct Answer": f"10^-{n} eV\n",
            "Incorrect Answer 1": "1 eV",
            "Incorrect Answer 2": "2 eV",
            "Incorrect Answer 3": "3 eV",
            "Record ID": f"rec{n}",
            "High-level domain": "Physics",
        }
        for n in range(4, 10)
    ]
    table(data / "gpqa-diamond/gpqa_diamond.csv", rows)


def lcb_row(number: int, date: str, starter: str = "") -> dict[str, Any]:
    kind = "functional" if starter else "stdin"
    tests = [{"input": "1 2\n" if not starter else "1\n2", "output": "3\n" if not starter else "3", "testtype": kind}]
    packed = base64.b64encode(zlib.compress(pickle.dumps(json.dumps(tests)))).decode()
    return {
        "question_title": f"Sum {number}",
        "question_content": f"Add two numbers, task {number}.",
        "platform": "leetcode" if starter else "atcoder",
        "question_id": f"abc{number}_a",
        "contest_id": f"abc{number}",
        "contest_date": date,
        "starter_code": starter,
        "difficulty": "easy",
        "public_test_cases": json.dumps(tests),
        "private_test_cases": packed,
        "metadata": json.dumps({"func_name": "add"} if starter else {}),
    }


def lcb(data: Path) -> None:
    starter = "class Solution:\n    def add(self, a: int, b: int) -> int:\n        "
    jsonl(data / "lcb/test4.jsonl", [lcb_row(1, "2024-09-28T00:00:00")])
    rows = [
        lcb_row(2, "2024-10-05T00:00:00"),
        lcb_row(3, "2025-02-28T23:30:00", starter),
        lcb_row(4, "2025-03-01T00:00:00"),
    ]
    jsonl(data / "lcb/test5.jsonl", rows)


def codeforces_row(contest: int, index: str, rating: int | None, **fields: Any) -> dict[str, Any]:
    return {
        "id": f"{contest}/{index}",
        "contest_id": str(contest),
        "contest_name": f"Round {contest}",
        "index": index,
        "time_limit": 2.0,
        "memory_limit": 256.0,
        "title": f"Sum {index}",
        "description": "Add two numbers.",
        "input_format": "Two integers.",
        "output_format": "Their sum.",
        "interaction_format": None,
        "note": None,
        "examples": [{"input": "1 2", "output": "3"}],
        "editorial": "Add them.",
        "rating": rating,
        "official_tests": [{"input": "1 2\n", "output": "3\n"}],
        "official_tests_complete": True,
        "input_mode": "stdio",
        "generated_checker": None,
        "executable": True,
        "generated_tests": 0,
    } | fields


def codeforces(data: Path) -> None:
    rows = [
        codeforces_row(2000, "A", 800),
        codeforces_row(2000, "B", 1600),
        codeforces_row(2001, "A", 1200, official_tests_complete=False),
        codeforces_row(2001, "B", 2400, executable=False),
    ]
    parquet(data / "codeforces/data/test-00000-of-00001.parquet", rows)


def humaneval(data: Path) -> None:
    rows = [
        {
            "task_id": "HumanEval/0",
            "prompt": 'def add(a, b):\n    """Their sum."""\n',
            "canonical_solution": "    return a + b\n",
            "test": "def check(candidate):\n    assert candidate(1, 2) == 3\n",
            "entry_point": "add",
        }
    ]
    parquet(data / "humaneval/openai_humaneval/test-00000-of-00001.parquet", rows)


def mbpp(data: Path) -> None:
    rows = [
        {
            "task_id": number,
            "text": "Write a function that adds.",
            "code": "def add(a, b): return a + b",
            "test_list": ["assert add(1, 2) == 3"],
            "test_setup_code": "",
            "challenge_test_list": [],
        }
        for number in (10, 11, 510, 511)
    ]
    jsonl(data / "mbpp/mbpp.jsonl", rows)


FILES: dict[str, Callable[[Path], None]] = {
    "aime24": aime24,
    "aime25": aime25,
    "math500": math500,
    "gsm8k": gsm8k,
    "gpqa-diamond": gpqa,
    "lcb": lcb,
    "codeforces": codeforces,
    "humaneval": humaneval,
    "mbpp": mbpp,
}
"""Suite -> what writes its files into a data directory."""
