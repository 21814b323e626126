"""Prompt files: what is read, and what each mistake says."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from megatron_gspo.data import load_completions, load_prompts
from megatron_gspo.data.tokenizer import ChatMessage
from megatron_gspo.errors import DataError

EOS = 256


class ByteTokenizer:
    """One token a UTF-8 byte; the template writes each turn as <role:content>."""

    eos_id, stop_ids, vocab_size, turn_end, longest_token = EOS, (EOS,), 257, None, 1

    def __len__(self) -> int:
        return 257

    def encode(self, text: str) -> list[int]:
        return list(text.encode())

    def decode(self, ids: Sequence[int], skip_special: bool = True) -> str:
        return bytes(i for i in ids if i < 256).decode()

    def render(self, prompt: str | Sequence[ChatMessage], use_chat_template: bool) -> str:
        if isinstance(prompt, str) and not use_chat_template:
            return prompt
        messages = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
        return "".join(f"<{message['role']}:{message['content']}>" for message in messages)


TOKENIZER = ByteTokenizer()


def write(path: Path, *lines: str | dict[str, Any]) -> Path:
    path.write_text("".join((x if isinstance(x, str) else json.dumps(x)) + "\n" for x in lines), encoding="utf-8")
    return path


def test_a_row_becomes_a_rendered_tokenized_prompt(tmp_path: Path) -> None:
    path = write(tmp_path / "p.jsonl", {"prompt": "1+1=", "answer": 2, "id": 7, "level": "easy"}, "", {"prompt": "hi"})
    first, second = load_prompts(path, tokenizer=TOKENIZER, chat_template=False).prompts
    assert (first.id, first.text, first.answer) == ("7", "1+1=", "2")
    assert first.token_ids == tuple(b"1+1=")
    assert first.metadata == {"level": "easy"}
    assert (second.id, second.answer, second.metadata) == ("line-3", "", {})


def test_texts_and_chat_messages_go_through_the_template(tmp_path: Path) -> None:
    chat = [{"role": "system", "content": "be brief"}, {"role": "user", "content": "hi"}]
    path = write(tmp_path / "p.jsonl", {"prompt": "hi"}, {"prompt": chat})
    prompts = load_prompts(path, tokenizer=TOKENIZER).prompts
    assert [prompt.text for prompt in prompts] == ["<user:hi>", "<system:be brief><user:hi>"]


def test_a_gsm8k_question_ends_in_a_newline_and_keeps_its_whole_answer(tmp_path: Path) -> None:
    path = write(tmp_path / "g.jsonl", {"question": "6x7?", "answer": "6x7=42\n#### 42"})
    plain = load_prompts(path, tokenizer=TOKENIZER, format="gsm8k", chat_template=False).prompts[0]
    chat = load_prompts(path, tokenizer=TOKENIZER, format="gsm8k").prompts[0]
    assert (plain.text, plain.answer) == ("6x7?\n", "6x7=42\n#### 42")
    assert chat.text == "<user:6x7?>"


def test_parquet_and_jsonl_give_the_same_prompts(tmp_path: Path) -> None:
    rows = [
        {"id": "a", "prompt": "x", "answer": "1", "source": "s"},
        {"id": "b", "prompt": "y", "answer": "2", "source": None},
    ]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "p.parquet")
    write(tmp_path / "p.jsonl", rows[0], {key: value for key, value in rows[1].items() if value is not None})
    parquet = load_prompts(tmp_path / "p.parquet", tokenizer=TOKENIZER)
    assert parquet == load_prompts(tmp_path / "p.jsonl", tokenizer=TOKENIZER)
    assert parquet.prompts[1].metadata == {}


def test_chat_messages_in_parquet_are_read(tmp_path: Path) -> None:
    rows = [{"prompt": [{"role": "user", "content": "hi"}]}]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "p.parquet")
    prompt = load_prompts(tmp_path / "p.parquet", tokenizer=TOKENIZER).prompts[0]
    assert (prompt.id, prompt.text) == ("row-1", "<user:hi>")


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{oops", "line 2: not JSON at character 2"),
        ("[1]", "line 2: expected one JSON object a line, got list"),
        ({"answer": "1"}, "line 2: the field 'prompt' is missing"),
        ({"prompt": 3}, "line 2: the field 'prompt' must be a non-empty string, got 3"),
        ({"prompt": ""}, "line 2: the field 'prompt' must be a non-empty string, got ''"),
        ({"prompt": []}, "line 2: prompt is an empty list"),
        ({"prompt": [{"role": "user"}]}, r"line 2: prompt\[0\] = .* it needs role and content"),
        ({"prompt": "x", "answer": ["1"]}, "line 2: the field 'answer' must be a string or a number"),
        ({"prompt": "x", "answer": True}, "line 2: the field 'answer' must be a string or a number, got True"),
        ({"prompt": "x", "id": "same"}, "line 2: id 'same' was seen before, at line 1"),
        ({"prompt": "far too long"}, "line 2: the prompt has 12 tokens, rollout.max_prompt_tokens is 5"),
    ],
)
def test_a_bad_row_is_named_or_skipped_and_counted(tmp_path: Path, line: str | dict[str, Any], message: str) -> None:
    path = write(tmp_path / "p.jsonl", {"prompt": "fine", "id": "same"}, line, {"prompt": "also"})
    settings: dict[str, Any] = {"tokenizer": TOKENIZER, "chat_template": False, "max_prompt_tokens": 5}
    with pytest.raises(DataError, match=f"p.jsonl, {message}"):
        load_prompts(path, **settings)
    kept = load_prompts(path, skip_bad=True, **settings)
    assert ([prompt.text for prompt in kept.prompts], kept.skipped) == (["fine", "also"], 1)


def test_bytes_that_are_not_utf8_are_named(tmp_path: Path) -> None:
    path = tmp_path / "p.jsonl"
    path.write_bytes(b'{"prompt": "x"}\n{"prompt": "\xff"}\n')
    with pytest.raises(DataError, match="line 2: not UTF-8 at byte 13"):
        load_prompts(path, tokenizer=TOKENIZER)


def test_a_unicode_line_separator_inside_a_string_does_not_end_the_line(tmp_path: Path) -> None:
    path = tmp_path / "p.jsonl"
    path.write_text('{"prompt": "a\u2028b"}\n', encoding="utf-8")
    assert load_prompts(path, tokenizer=TOKENIZER, chat_template=False).prompts[0].text == "a\u2028b"


@pytest.mark.parametrize(
    ("content", "message"),
    [("", "holds no usable rows$"), ("\n\n", "holds no usable rows$"), ("x\n", "1 bad rows were skipped, the first")],
)
def test_a_file_without_a_usable_row_is_an_error_even_when_skipping(tmp_path: Path, content: str, message: str) -> None:
    path = tmp_path / "p.jsonl"
    path.write_text(content)
    with pytest.raises(DataError, match=message):
        load_prompts(path, tokenizer=TOKENIZER, skip_bad=True)


def test_a_missing_or_broken_file_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no such data file"):
        load_prompts(tmp_path / "none.jsonl", tokenizer=TOKENIZER)
    (tmp_path / "bad.parquet").write_bytes(b"PAR1 not really")
    with pytest.raises(DataError, match=r"bad\.parquet: after row 0"):
        load_prompts(tmp_path / "bad.parquet", tokenizer=TOKENIZER)


def test_the_limit_stops_reading(tmp_path: Path) -> None:
    path = write(tmp_path / "p.jsonl", {"prompt": "a"}, {"prompt": "b"}, "{never read")
    assert [p.text for p in load_prompts(path, tokenizer=TOKENIZER, chat_template=False, limit=2).prompts] == ["a", "b"]


def test_a_completion_follows_its_prompt_and_ends_in_eos(tmp_path: Path) -> None:
    path = write(tmp_path / "s.jsonl", {"prompt": "1+1=", "completion": "2"})
    example = load_completions(path, tokenizer=TOKENIZER, chat_template=False).completions[0]
    assert example.prompt.token_ids == tuple(b"1+1=")
    assert example.completion_ids == (*b"2", EOS)


def test_a_gsm8k_answer_is_both_completion_and_reference(tmp_path: Path) -> None:
    path = write(tmp_path / "g.jsonl", {"question": "6x7?", "answer": "#### 42"})
    example = load_completions(path, tokenizer=TOKENIZER, format="gsm8k", chat_template=False).completions[0]
    assert example.completion_ids == (*b"#### 42", EOS)
    assert (example.prompt.text, example.prompt.answer) == ("6x7?\n", "#### 42")


def test_the_end_token_counts_towards_a_completions_length(tmp_path: Path) -> None:
    path = write(tmp_path / "s.jsonl", {"prompt": "x", "completion": "12"}, {"prompt": "x", "completion": "123"})
    with pytest.raises(DataError, match=r"line 2: the completion has 4 tokens, rollout\.max_response_tokens is 3"):
        load_completions(path, tokenizer=TOKENIZER, max_response_tokens=3)
    assert load_completions(path, tokenizer=TOKENIZER, max_response_tokens=3, skip_bad=True).skipped == 1
    with pytest.raises(DataError, match="line 1: the field 'completion' is missing"):
        load_completions(write(tmp_path / "p.jsonl", {"prompt": "x"}), tokenizer=TOKENIZER)


# ------------------------------------------------------------------------------------------------- very long texts


class Counting(ByteTokenizer):
    """Notes the longest text that it was given to encode or to render."""

    longest_token = 32

    def __init__(self) -> None:
        self.encoded = self.rendered = 0

    def encode(self, text: str) -> list[int]:
        self.encoded = max(self.encoded, len(text))
        return super().encode(text)

    def render(self, prompt: str | Sequence[ChatMessage], use_chat_template: bool) -> str:
        self.rendered = max(self.rendered, len(str(prompt)))
        return super().render(prompt, use_chat_template)


@pytest.mark.parametrize("keep_long", [False, True])
@pytest.mark.parametrize(
    "prompt", ["x" * 321, [{"role": "system", "content": "x" * 300}, {"role": "user", "content": "y" * 21}]]
)
def test_a_text_of_more_characters_than_the_tokens_hold_is_over_long_without_being_rendered_or_tokenized(
    tmp_path: Path, prompt: Any, keep_long: bool
) -> None:
    path = write(tmp_path / "p.jsonl", {"prompt": "a"}, {"prompt": prompt})
    tokenizer = Counting()
    words = (
        r"line 2: the prompt has 321 characters, more than rollout.max_prompt_tokens = 10 of the longest tokens hold"
    )
    with pytest.raises(DataError, match=words):
        load_prompts(path, tokenizer=tokenizer, max_prompt_tokens=10, keep_long=keep_long)
    assert (tokenizer.encoded, tokenizer.rendered) == (len("<user:a>"), 1)
    kept = load_prompts(path, tokenizer=tokenizer, max_prompt_tokens=10, skip_bad=True, keep_long=True)
    assert len(kept) == 1 and "321 characters" in kept.problems[0]


def test_a_template_that_makes_a_text_longer_than_the_tokens_hold_is_found_before_it_is_tokenized(
    tmp_path: Path,
) -> None:
    path = write(tmp_path / "p.jsonl", {"prompt": "x" * 320})
    tokenizer = Counting()
    with pytest.raises(DataError, match="the prompt has 327 characters, more than"):
        load_prompts(path, tokenizer=tokenizer, max_prompt_tokens=10)
    assert tokenizer.encoded == 0


def test_a_text_at_the_bound_is_tokenized_and_counted_in_tokens(tmp_path: Path) -> None:
    path = write(tmp_path / "p.jsonl", {"prompt": "x" * 320})
    with pytest.raises(DataError, match=r"the prompt has 320 tokens, rollout\.max_prompt_tokens is 10"):
        load_prompts(path, tokenizer=Counting(), max_prompt_tokens=10, chat_template=False)
    (kept,) = load_prompts(
        path, tokenizer=Counting(), max_prompt_tokens=10, chat_template=False, keep_long=True
    ).prompts
    assert len(kept.token_ids) == 320


def test_a_completion_of_more_characters_than_the_tokens_hold_is_over_long_without_being_tokenized(
    tmp_path: Path,
) -> None:
    path = write(tmp_path / "p.jsonl", {"prompt": "1+1=", "completion": "2" * 321})
    tokenizer = Counting()
    words = r"the completion has 321 characters, more than rollout.max_response_tokens = 10 of the longest tokens hold"
    with pytest.raises(DataError, match=words):
        load_completions(path, tokenizer=tokenizer, max_prompt_tokens=10, max_response_tokens=10)
    assert tokenizer.encoded < 20


def test_a_row_of_more_bytes_than_rows_have_is_not_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("megatron_gspo.data.text_rows.LONGEST_ROW", 100)
    path = write(tmp_path / "p.jsonl", {"prompt": "short"}, {"prompt": "x" * 200}, "#" * 300)
    found = load_prompts(path, tokenizer=TOKENIZER, skip_bad=True)
    assert len(found) == 1
    assert found.problems[0] == "line 2: has 214 bytes, a row has at most 100"
    assert found.problems[1] == "line 3: has 300 bytes, a row has at most 100"
