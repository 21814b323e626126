"""Malformed prompt files. What is accepted is compared with an independent reading of the same bytes."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from megatron_gspo.data import load_prompts
from megatron_gspo.data.files import BEGINNINGS
from megatron_gspo.data.tokenizer import ChatMessage
from megatron_gspo.errors import DataError
from megatron_gspo.types import Prompt
from tests.fuzz.mutations import (
    BYTE_MUTATIONS,
    HANG_S,
    MUTATIONS,
    as_json,
    assert_says,
    fuzz,
    mutated,
    mutated_bytes,
)

pytestmark = pytest.mark.timeout(HANG_S)

LIMIT = 60
ROWS: list[dict[str, Any]] = [
    {"prompt": "1+1=", "answer": "2", "id": "a", "level": {"name": "easy", "weight": 0.5}},
    {"prompt": [{"role": "system", "content": "brief"}, {"role": "user", "content": "6x7?"}], "answer": 42},
    {"prompt": "Größe 東京 🙂", "answer": 1.5, "id": 7},
]
SOUND = b"\n".join(map(as_json, ROWS)) + b"\n"


class CharacterTokenizer:
    """One token a character; the template writes each turn as <role:content>, and wants its content to be text."""

    eos_id, stop_ids, vocab_size, turn_end, longest_token = 0, (0,), 0x110000, None, 1

    def __len__(self) -> int:
        return self.vocab_size

    def encode(self, text: str) -> list[int]:
        return list(map(ord, text))

    def decode(self, ids: Sequence[int], skip_special: bool = True) -> str:
        return "".join(map(chr, ids))

    def render(self, prompt: str | Sequence[ChatMessage], use_chat_template: bool) -> str:
        messages = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
        if not all(isinstance(message["content"], str) for message in messages):
            raise DataError("the chat template refuses the messages")
        return "".join(f"<{message['role']}:{message['content']}>" for message in messages)


TOKENIZER = CharacterTokenizer()


def check(path: Path) -> None:
    """Both ways of reading agree with each other and with the file."""
    lines = [(n, line) for n, line in enumerate(path.read_bytes().split(b"\n"), start=1) if line.strip()]
    try:
        kept = load_prompts(path, tokenizer=TOKENIZER, max_prompt_tokens=LIMIT, skip_bad=True)
    except DataError as error:
        if path.read_bytes().startswith((*BEGINNINGS, b"PAR1")):
            assert_says(error)
            return
        assert_says(error, "holds no usable rows")
        kept = None
    try:
        strict = load_prompts(path, tokenizer=TOKENIZER, max_prompt_tokens=LIMIT)
    except DataError as error:
        assert_says(error)
        assert kept is None or kept.skipped
        if lines:
            place = re.match(rf"{re.escape(str(path))}, line (\d+): ", str(error))
            assert place and (kept is None or kept.problems[0].startswith(f"line {place[1]}: "))
        return
    assert kept is not None and kept.skipped == 0
    assert strict == kept
    assert len(strict) == len(lines), "a line was lost without a word"
    for prompt, (number, line) in zip(strict.prompts, lines, strict=True):
        compare(prompt, number, line)


def compare(prompt: Prompt, number: int, line: bytes) -> None:
    row = json.loads(line.decode("utf-8-sig"), object_pairs_hook=once, parse_constant=no_number)
    turns = [{"role": "user", "content": row["prompt"]}] if isinstance(row["prompt"], str) else row["prompt"]
    assert prompt.text == "".join(f"<{turn['role'].strip().lower()}:{said(turn['content'])}>" for turn in turns)
    assert "".join(map(chr, prompt.token_ids)) == prompt.text and 0 < len(prompt.token_ids) <= LIMIT
    answer = row.get("answer")
    assert prompt.answer == ("" if answer is None else str(answer)) and not isinstance(answer, bool)
    assert answer != float("inf")
    identity = row.get("id")
    assert prompt.id == (f"line-{number}" if identity in (None, "") else str(identity))
    assert prompt.metadata == {name: row[name] for name in row if name not in ("prompt", "answer", "id")}
    (prompt.text + prompt.id + prompt.answer + repr(prompt.metadata)).encode()  # what is written is UTF-8


def said(content: str | list[dict[str, str]]) -> str:
    return content if isinstance(content, str) else "".join(part["text"] for part in content)


def once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    assert len(dict(pairs)) == len(pairs), f"a field that stands twice was accepted: {pairs}"
    return dict(pairs)


def no_number(word: str) -> None:
    raise AssertionError(f"{word} was accepted")


@fuzz(200)
@given(st.lists(st.tuples(st.sampled_from(range(len(ROWS))), MUTATIONS), min_size=1, max_size=3))
@example([(0, [("set", 2, 0, "\ud800")])])
@example([(0, [("set", 2, 0, float("nan"))])])
@example([(0, [("set", 6, 0, float("inf"))])])
@example([(1, [("delete", 401, 496, []), ("set", 700, 1143, [])])])
def test_mutated_objects_are_the_prompts_that_they_say_or_are_named(
    tmp_path: Path, rows: list[tuple[int, list[Any]]]
) -> None:
    path = tmp_path / "odd.jsonl"
    path.write_bytes(b"\n".join(as_json(mutated(ROWS[index], mutations)) for index, mutations in rows))
    check(path)


@fuzz(200)
@example([("insert", 0.0, 0, b"PAR1")], "utf-8")
@given(BYTE_MUTATIONS, st.sampled_from(["utf-8", "utf-8-sig", "utf-16", "latin-1"]))
@example([("insert", 0.05, 0, b'": "x", "prompt')], "utf-8")
@example([("cut", 0.0, 0, b"x"), ("insert", 0.0, 0, b'{"prompt": "x", "answer": 1e999}')], "utf-8")
@example([("cut", 0.0, 0, b"x"), ("insert", 0.0, 0, b"[" * 20_000)], "utf-8")
@example([("cut", 0.0, 0, b"x"), ("insert", 0.0, 0, b'{"prompt": "x", "answer": ' + b"9" * 5000 + b"}")], "utf-8")
@example([("cut", 0.0, 0, b"x"), ("insert", 0.0, 0, b'{"prompt": "x", "answer": "1", "answer": "2"}')], "utf-8")
def test_mutated_bytes_are_the_prompts_that_they_say_or_are_named(
    tmp_path: Path, mutations: list[Any], encoding: str
) -> None:
    path = tmp_path / "odd.jsonl"
    path.write_bytes(mutated_bytes(SOUND.decode().encode(encoding, errors="replace"), mutations))
    check(path)


def sound_parquet(path: Path) -> bytes:
    rows = [{"prompt": f"{n}+{n}=", "answer": str(2 * n), "id": str(n), "when": n} for n in range(20)]
    pq.write_table(pa.Table.from_pylist(rows), path, compression="none", write_page_checksum=True)
    return path.read_bytes()


@fuzz(100)
@given(BYTE_MUTATIONS)
def test_mutated_parquet_gives_whole_rows_or_one_line(tmp_path: Path, mutations: list[Any]) -> None:
    """Pages have checksums, so a row that is read is a row that was written; names of columns, in the footer, have not.
    A prompt column with another name is an error, an ``id`` with another name is metadata."""
    path = tmp_path / "odd.parquet"
    path.write_bytes(mutated_bytes(sound_parquet(path), mutations))
    try:
        loaded = load_prompts(path, tokenizer=TOKENIZER)
    except DataError as error:
        assert_says(error, path)
        return
    for number, prompt in enumerate(loaded.prompts):
        assert prompt.text == f"<user:{number}+{number}=>" and prompt.answer in (str(2 * number), "")


def test_a_text_of_parquet_that_was_altered_is_noticed_by_its_pages_checksum(tmp_path: Path) -> None:
    path = tmp_path / "odd.parquet"
    content = sound_parquet(path)
    assert content.count(b"7+7=") == 1
    path.write_bytes(content.replace(b"7+7=", b"7+8="))
    with pytest.raises(DataError, match=r"odd\.parquet: after row 0: .*(CRC|checksum|corrupt)"):
        load_prompts(path, tokenizer=TOKENIZER)


@pytest.mark.parametrize(
    "table",
    [
        pa.table({"prompt": pa.array(["x"]), "answer": pa.array([float("nan")])}),
        pa.table({"prompt": pa.array([1, 2])}),
        pa.table({"prompt": pa.array([None, None], pa.string())}),
        pa.table({"prompt": pa.array(["x"]), "when": pa.array([2**62], pa.timestamp("us"))}),
        pa.table({"prompt": pa.array([b"\xff"], pa.binary())}),
        pa.table({"prompt": pa.array(["x"]), "id": pa.array([float("inf")])}),
        pa.Table.from_arrays([pa.array(["x"]), pa.array(["y"])], names=["prompt", "prompt"]),
        pa.table({"prompt": pa.array([], pa.string())}),
    ],
    ids=["nan answer", "numbers", "nulls", "a year beyond", "bytes", "infinite id", "a column twice", "no rows"],
)
def test_odd_columns_of_parquet_are_named(tmp_path: Path, table: pa.Table) -> None:
    path = tmp_path / "odd.parquet"
    pq.write_table(table, path)
    with pytest.raises(DataError, match=r"odd\.parquet") as caught:
        load_prompts(path, tokenizer=TOKENIZER)
    assert_says(caught.value)
