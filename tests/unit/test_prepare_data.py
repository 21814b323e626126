"""``tools/prepare_data.py``: published files as prompt files, row by row accounted for."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from megatron_gspo.data.files import open_rows
from megatron_gspo.data.formats import FORMATS, Paths, read_example
from megatron_gspo.errors import DataError
from megatron_gspo.rewards.gsm8k import gsm8k
from megatron_gspo.types import Prompt, Rollout
from tools.prepare_data import CONFLICT, SETS, Counts, prepare

ROOT = Path(__file__).parents[2]
ASK = (
    "Solve the following math problem step by step. The last line of your response should be of the form Answer: "
    "$Answer (without quotes) where $Answer is the answer to the problem.\n\n{}\n\nRemember to put your answer on its "
    'own line after "Answer:".'
)
SYSTEM = "\nWhen tackling complex reasoning tasks, you have access to the following actions.\n\n[ASSESS]\n\n[OUTPUT]\n"


def dapo(problem: str, answer: str | None, index: str) -> dict[str, Any]:
    """A row as dapo-math-17k.parquet has it."""
    return {
        "data_source": "math_dapo",
        "prompt": [{"content": ASK.format(problem), "role": "user"}],
        "ability": "MATH",
        "reward_model": {"ground_truth": answer, "style": "rule-lighteval/MATH_v2"},
        "extra_info": {"index": index},
    }


def eurus(problem: str, truth: str | None, ability: str = "code") -> dict[str, Any]:
    """A row as Eurus-2-RL-Data's train.parquet has it."""
    return {
        "data_source": "taco" if ability == "code" else "numina_olympiads",
        "prompt": [{"content": SYSTEM, "role": "system"}, {"content": problem, "role": "user"}],
        "ability": ability,
        "reward_model": {"ground_truth": truth, "style": "rule"},
        "extra_info": {"index": 0, "split": "dummy"},
    }


def parquet(path: Path, rows: list[dict[str, Any]]) -> Path:
    pq.write_table(pa.Table.from_pylist(rows), path)
    return path


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def test_dapos_hundred_copies_are_one_prompt_each(tmp_path: Path):
    unique = [dapo(f"What is {n} + 1?", str(n + 1), f"id-{n}") for n in range(7)]
    counts = prepare(SETS["dapo"], parquet(tmp_path / "dapo-math-17k.parquet", unique * 100), tmp_path / "out")
    assert (counts.rows, counts.repeats, counts.prompts, counts.held_out) == (700, 693, 7, 0)
    assert not counts.dropped
    rows = lines(tmp_path / "out/train.jsonl")
    assert [row["answer"] for row in rows] == ["1", "2", "3", "4", "5", "6", "7"]
    assert rows[0]["prompt"] == [{"role": "user", "content": ASK.format("What is 0 + 1?")}]
    assert len({row["id"] for row in rows}) == 7 and not (tmp_path / "out/eval.jsonl").exists()
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["counts.json", "train.jsonl"]


def test_every_row_is_counted_once_and_what_is_dropped_says_why(tmp_path: Path):
    rows = [
        dapo("one", "1", "a"),
        dapo("two", "2", "b"),
        dapo("one", "1", "a"),
        dapo("half", "1/2", "c"),
        dapo("none", None, "d"),
        dapo("two", "3", "b"),
        dapo("two", "2", "b"),
        {**dapo("x", "4", "e"), "prompt": []},
    ]
    counts = prepare(SETS["dapo"], parquet(tmp_path / "d.parquet", rows), tmp_path / "out")
    assert counts.dropped == {
        CONFLICT: 3,
        "the answer is no integer": 1,
        "no reference answer": 1,
        "prompt is an empty list of chat messages": 1,
    }
    assert counts.rows == counts.repeats + counts.prompts + sum(counts.dropped.values()) == len(rows)
    assert [row["answer"] for row in lines(tmp_path / "out/train.jsonl")] == ["1"]
    record = json.loads((tmp_path / "out/counts.json").read_text())
    assert record["dropped"] == dict(counts.dropped) and record["expected"][0]["rows"] == 1_791_700


def test_the_same_prompts_are_held_out_in_whatever_order_rows_come(tmp_path: Path):
    rows = [dapo(f"What is {n}?", str(n), str(n)) for n in range(40)]
    held = []
    for name, order in {"a": rows, "b": rows[::-1] + rows}.items():
        prepare(SETS["dapo"], parquet(tmp_path / f"{name}.parquet", order), tmp_path / name, 8, seed=3)
        held.append({row["answer"] for row in lines(tmp_path / name / "eval.jsonl")})
        train = {row["answer"] for row in lines(tmp_path / name / "train.jsonl")}
        assert len(held[-1]) == 8 and len(train) == 32 and not held[-1] & train
    assert held[0] == held[1]
    prepare(SETS["dapo"], tmp_path / "a.parquet", tmp_path / "c", 8, seed=4)
    assert {row["answer"] for row in lines(tmp_path / "c/eval.jsonl")} != held[0]


def test_aime_is_held_out_as_a_whole(tmp_path: Path):
    source = parquet(tmp_path / "aime-2024.parquet", [dapo(f"p{n}", str(n), str(n)) for n in range(30)] * 32)
    counts = prepare(SETS["dapo"], source, tmp_path / "out", None)
    assert (counts.rows, counts.prompts, counts.held_out) == (960, 30, 30)
    assert len(lines(tmp_path / "out/eval.jsonl")) == 30 and not (tmp_path / "out/train.jsonl").exists()
    prepare(SETS["dapo"], source, tmp_path / "out", 5)
    assert len(lines(tmp_path / "out/train.jsonl")) == 25
    prepare(SETS["dapo"], source, tmp_path / "out", None)
    assert not (tmp_path / "out/train.jsonl").exists(), "what was trained on is held out now"
    said = list(counts.lines(SETS["dapo"].expected))
    assert said[-1].startswith("as here: aime-2024.parquet has 960 rows, 30 prompts")
    assert said[-2].startswith("published: dapo-math-17k.parquet has 1,791,700 rows")


def test_gsm8k_keeps_the_answer_that_its_reward_reads(tmp_path: Path):
    good = {"question": "How many?", "answer": "20 + 22 = <<20+22=42>>42.\n#### 42"}
    rows = [good, {**good, "question": "And now?"}, {"question": "Lost?", "answer": "It is 3."}]
    source = tmp_path / "train.jsonl"
    source.write_text("".join(json.dumps(row) + "\n" for row in rows) + "{broken\n", encoding="utf-8")
    counts = prepare(SETS["gsm8k"], source, tmp_path / "out", 1)
    assert counts.dropped == {"the answer has no last line '#### number'": 1, "cannot be read": 1}
    (row,) = lines(tmp_path / "out/eval.jsonl")
    assert row["answer"] == good["answer"]
    assert gsm8k(*graded(row, "It is 42.")) == 1 and gsm8k(*graded(row, "It is 41.")) == 0


def test_dapos_answer_is_graded_where_its_prompt_asks_for_it(tmp_path: Path):
    prepare(SETS["dapo"], parquet(tmp_path / "d.parquet", [dapo("p", "-34", "0")]), tmp_path / "out")
    (row,) = lines(tmp_path / "out/train.jsonl")
    assert gsm8k(*graded(row, "2 of 36, so\nAnswer: -34")) == 1
    assert gsm8k(*graded(row, "2 of 36, so\nAnswer: 34")) == 0


def graded(row: dict[str, Any], text: str) -> tuple[Prompt, Rollout]:
    prompt = Prompt(row["id"], "?", (1,), row["answer"])
    return prompt, Rollout(prompt, 0, np.ones(1, np.int32), np.zeros(1, np.float32), "stop", (0,), text)


def test_of_eurus_the_code_with_whole_tests_is_taken(tmp_path: Path):
    tests = json.dumps({"inputs": ["1\n", "2\n"], "outputs": ["2\n", "4\n"]})
    rows = [
        eurus("double it", tests),
        eurus("double it", tests),
        eurus("find x", "42", "math"),
        eurus("no tests", None),
        eurus("broken", "{"),
        eurus("uneven", json.dumps({"inputs": ["1"], "outputs": []})),
        eurus("nothing", json.dumps({"inputs": [], "outputs": []})),
        {**eurus("", tests), "prompt": [{"content": SYSTEM, "role": "system"}]},
    ]
    source = parquet(tmp_path / "train.parquet", rows)
    counts = prepare(SETS["eurus-code"], source, tmp_path / "out", system=False)
    assert (counts.rows, counts.repeats, counts.prompts) == (8, 1, 1)
    assert counts.dropped == {
        "no code: another ability": 1,
        "no reference answer": 1,
        "the tests cannot be read": 1,
        "the tests are no pairs of input and output": 2,
        "prompt has no turn of the user's (system): the model would answer to nobody": 1,
    }
    (row,) = lines(tmp_path / "out/train.jsonl")
    assert row["prompt"] == [{"role": "user", "content": "double it"}] and json.loads(row["answer"])["inputs"]
    assert row["data_source"] == "taco"
    prepare(SETS["eurus-code"], source, tmp_path / "with")
    assert [message["role"] for message in lines(tmp_path / "with/train.jsonl")[0]["prompt"]] == ["system", "user"]


@pytest.mark.parametrize("name", SETS)
def test_what_is_written_reads_as_prompts(name: str, tmp_path: Path):
    rows = {"dapo": [dapo("p", "3", "0")], "eurus-code": [eurus("p", '{"inputs": ["1"], "outputs": ["2"]}')]}
    source = tmp_path / "rows.jsonl"
    kept = rows.get(name, [{"question": "q", "answer": "#### 3"}])
    source.write_text("".join(json.dumps(row) + "\n" for row in kept), encoding="utf-8")
    prepare(SETS[name], source, tmp_path / "out")
    (row,) = open_rows(tmp_path / "out/train.jsonl").read_all()
    assert FORMATS["prompts"].recognise(row.fields) and not FORMATS["verl"].recognise(row.fields)
    example = read_example("prompts", Paths(), dict(row.fields))
    assert example.id and example.answer and example.prompt


def test_a_file_of_another_set_leaves_nothing_behind(tmp_path: Path):
    source = parquet(tmp_path / "d.parquet", [dapo("p", "3", "0")])
    with pytest.raises(DataError, match=r"0 prompts of 1 rows .* dropped: \{.*'question'"):
        prepare(SETS["gsm8k"], source, tmp_path / "out")
    assert not list((tmp_path / "out").iterdir())
    with pytest.raises(DataError, match=r"1 prompts of 1 rows leave none to train on beside 1 held-out"):
        prepare(SETS["dapo"], source, tmp_path / "out", 1)


def test_a_mistake_on_the_command_line_is_one_line(tmp_path: Path):
    script = [sys.executable, str(ROOT / "tools/prepare_data.py")]
    done = subprocess.run(
        [*script, "dapo", str(tmp_path / "no.parquet"), str(tmp_path / "out")],
        capture_output=True,
        text=True,
        check=False,
        env={"PYTHONPATH": str(ROOT)},
    )
    assert done.returncode == 2 and done.stderr == f"error: {tmp_path}/no.parquet: no such data file\n"


def test_counts_are_read_by_a_person():
    counts = Counts(rows=1_700_000, repeats=1_683_000, prompts=17_000, held_out=512)
    assert list(counts.lines(SETS["dapo"].expected))[:3] == [
        "1,700,000 rows read",
        "1,683,000 repeat a prompt",
        "   17,000 prompts written, 512 of them held out",
    ]
