"""Files too long to be looked at row by row: what is found when, and what is held."""

from __future__ import annotations

import json
import os
import time
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from megatron_gspo.data import load_completions, load_prompts, parquet_rows, prompts
from megatron_gspo.data.fingerprint import fingerprint
from megatron_gspo.errors import DataError
from tests.fuzz.test_prompt_lines import TOKENIZER

MANY = 60


@pytest.fixture(autouse=True)
def short(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """20 rows are many, and of those the first 5 are looked at."""
    monkeypatch.setattr(prompts, "CHECKED_ROWS", 20)
    monkeypatch.setattr(prompts, "FIRST_ROWS", 5)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


def rows(**others: Any) -> list[dict[str, Any]]:
    """Rows of which some are replaced: ``at_7={...}``."""
    return [others.get(f"at_{n}", {"prompt": f"{n}+{n}=", "answer": str(2 * n)}) for n in range(MANY)]


def write(path: Path, lines: list[Any]) -> Path:
    path.write_text("".join((line if isinstance(line, str) else json.dumps(line)) + "\n" for line in lines))
    return path


def test_a_bad_row_far_down_is_found_when_it_is_drawn_and_counts_as_a_place_of_the_order(tmp_path: Path) -> None:
    path = write(tmp_path / "x.jsonl", rows(at_40={"prompt": 7}, at_41={"prompt": "far too long " * 9}))
    loaded = load_prompts(path, tokenizer=TOKENIZER, max_prompt_tokens=60)
    assert (len(loaded), loaded.skipped, loaded.looked.rows, loaded.looked.whole) == (MANY, 0, 5, False)
    assert (loaded.prompts[39].text, loaded.prompts[-1].id) == ("<user:39+39=>", f"line-{MANY}")
    with pytest.raises(DataError, match=r"x.jsonl, line 41: the field 'prompt' must be .* got 7"):
        loaded.prompts[40]
    with pytest.raises(
        DataError, match=r"x.jsonl, line 42: the prompt has \d+ tokens, rollout.max_prompt_tokens is 60"
    ):
        loaded.prompts[41]
    assert load_prompts(path, tokenizer=TOKENIZER, max_prompt_tokens=60, skip_bad=True, limit=20).looked.whole


@pytest.mark.parametrize("place", [2, 40])
def test_a_row_among_the_first_and_a_line_that_was_cut_off_are_found_at_the_start(tmp_path: Path, place: int) -> None:
    path = write(tmp_path / "x.jsonl", rows(**{f"at_{place}": '{"prompt": "cut o'}))
    with pytest.raises(DataError, match=rf"x.jsonl, line {place + 1}: not JSON"):
        load_prompts(path, tokenizer=TOKENIZER)
    loaded = load_prompts(path, tokenizer=TOKENIZER, skip_bad=True)
    assert (loaded.skipped, len(loaded)) == (1, MANY)
    assert loaded.problems[0].startswith(f"line {place + 1}: not JSON")


def test_ids_that_nobody_compared_have_their_place_behind_them(tmp_path: Path) -> None:
    path = write(tmp_path / "x.jsonl", [row | {"id": "same"} for row in rows()])
    loaded = load_prompts(path, tokenizer=TOKENIZER)
    assert len({prompt.id for prompt in loaded.prompts}) == MANY
    assert loaded.prompts[6].id == "same@line-7"


def test_a_slice_and_an_iteration_are_the_rows(tmp_path: Path) -> None:
    loaded = load_prompts(write(tmp_path / "x.jsonl", rows()), tokenizer=TOKENIZER).prompts
    assert (
        [p.text for p in loaded[3:6]] == [p.text for p in list(loaded)[3:6]] == [f"<user:{n}+{n}=>" for n in (3, 4, 5)]
    )
    assert len(loaded[::2]) == MANY / 2 and loaded[::2][-1] == loaded[-2]
    with pytest.raises(IndexError):
        loaded[MANY]


def test_what_is_held_is_bounded_by_items_and_by_tokens(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from megatron_gspo.data import lazy

    monkeypatch.setattr(lazy, "HELD_ITEMS", 3)
    monkeypatch.setattr(lazy, "HELD_TOKENS", 25)
    cache: lazy.Cache[str] = lazy.Cache(len)
    for row, item in enumerate(["a" * 5, "b" * 5, "c" * 5, "d" * 5]):
        assert cache.get(0) == ("a" * 5 if row else None), "what was used last stays"
        cache.put(row, item)
    assert [row for row in range(4) if cache.get(row)] == [0, 2, 3]
    cache.put(9, "e" * 20)
    assert [row for row in range(10) if cache.get(row)] == [3, 9]
    cache.put(10, "f" * 99)
    assert [row for row in range(11) if cache.get(row)] == [10], "the newest is held whatever its length"


def test_completions_are_made_when_they_are_drawn_too(tmp_path: Path) -> None:
    path = write(tmp_path / "x.jsonl", [row | {"completion": "é" * (n + 1)} for n, row in enumerate(rows())])
    loaded = load_completions(path, tokenizer=TOKENIZER, max_response_tokens=50)
    assert loaded.looked.response_tokens == (2, 3, 4, 5, 6)
    assert len(loaded.completions[30].completion_ids) == 32
    with pytest.raises(DataError, match=r"line 51: the completion has 52 tokens"):
        loaded.completions[50]


def test_a_file_that_changes_under_a_run_is_noticed(tmp_path: Path) -> None:
    path = write(tmp_path / "x.jsonl", rows())
    loaded = load_prompts(path, tokenizer=TOKENIZER)
    path.write_bytes(path.read_bytes().replace(b"50+50", b"51+51"))
    os.utime(path, ns=(time.time_ns(), time.time_ns() + 10**9))
    with pytest.raises(DataError, match="was changed while it was being read"):
        loaded.prompts[50]


def test_the_fingerprint_of_a_long_file_is_of_its_bytes_and_of_how_they_are_read(tmp_path: Path) -> None:
    def of(path: Path, **settings: Any) -> str:
        return load_prompts(path, tokenizer=TOKENIZER, **settings).looked.fingerprint()

    path = write(tmp_path / "x.jsonl", rows())
    moved = write(tmp_path / "y.jsonl", rows())
    assert of(path) == of(moved) and of(path).startswith("files-")
    others = [
        of(write(tmp_path / "z.jsonl", rows(at_33={"prompt": "other"}))),
        of(path, limit=50),
        of(path, fields=prompts.Paths(answer="prompt")),
    ]
    assert len({of(path), *others}) == 4


def test_the_fingerprint_of_a_file_that_is_looked_at_whole_is_what_it_was(tmp_path: Path) -> None:
    """Of ids, tokens, answers and metadata, so that checkpoints of before are still known."""
    loaded = load_prompts(write(tmp_path / "x.jsonl", rows()[:20]), tokenizer=TOKENIZER)
    facts = [(p.id, p.token_ids, p.answer, p.metadata) for p in loaded.prompts]
    assert loaded.looked.fingerprint() == fingerprint(facts)
    assert fingerprint([("line-1", (1, 2), "3", {})]) == "97bd572d474701f1"


def test_parquet_in_one_huge_row_group_is_copied_once_into_small_batches(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(parquet_rows, "SMALL_FILE_ROWS", 20)
    monkeypatch.setattr(parquet_rows, "SMALL_GROUP_ROWS", 10)
    monkeypatch.setattr(parquet_rows, "COPIED_ROWS", 7)
    table = pa.Table.from_pylist([row | {"when": n, "tags": [{"a": None}]} for n, row in enumerate(rows())])
    pq.write_table(table, tmp_path / "x.parquet")
    loaded = load_prompts(tmp_path / "x.parquet", tokenizer=TOKENIZER)
    assert [p.metadata["when"] for p in loaded.prompts] == list(range(MANY))
    assert (loaded.prompts[50].id, loaded.prompts[50].metadata["tags"]) == ("row-51", [{"a": None}])
    (copy,) = (tmp_path / "cache" / "megatron_gspo" / "rows").glob("*.arrow")
    assert pa.ipc.open_file(str(copy)).num_record_batches == 9
    written = copy.stat().st_mtime_ns
    assert load_prompts(tmp_path / "x.parquet", tokenizer=TOKENIZER).prompts[59] == loaded.prompts[59]
    assert copy.stat().st_mtime_ns == written
    pq.write_table(table, tmp_path / "small.parquet", row_group_size=10)
    loaded = load_prompts(tmp_path / "small.parquet", tokenizer=TOKENIZER)
    assert loaded.prompts[33].answer == "66" and loaded.prompts[3].answer == "6"
    assert len(list(copy.parent.glob("*.arrow"))) == 1, "read from where it is"


def test_held_out_prompts_are_looked_at_whole_however_many(tmp_path: Path) -> None:
    path = write(tmp_path / "x.jsonl", rows(at_40={"prompt": 7}))
    with pytest.raises(DataError, match="line 41"):
        load_prompts(path, tokenizer=TOKENIZER, whole=True)
    assert len(load_prompts(path, tokenizer=TOKENIZER, whole=True, skip_bad=True)) == MANY - 1
