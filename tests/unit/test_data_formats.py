"""Files as people have them: each format and each kind of file, and what is said of one that cannot be read."""

from __future__ import annotations

import bz2
import gzip
import json
import lzma
import re
from collections.abc import Callable
from decimal import Decimal
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from megatron_gspo.config import load as load_config
from megatron_gspo.data import load_completions, load_prompts
from megatron_gspo.data.files import find_shards
from megatron_gspo.data.formats import FORMATS, Paths
from megatron_gspo.errors import DataError
from tests.fuzz.test_prompt_lines import TOKENIZER

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "data.md").read_text(encoding="utf-8")
USER = [{"role": "user", "content": "6x7?"}]
ROWS = [{"prompt": f"{n}+{n}=", "answer": str(2 * n), "note": 'a,\n"b" é'} for n in range(5)]


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache" / "megatron_gspo" / "rows"


def write(path: Path, *rows: dict[str, Any]) -> Path:
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    return path


def one(tmp_path: Path, row: dict[str, Any], **settings: Any) -> Any:
    (prompt,) = load_prompts(write(tmp_path / "one.jsonl", row), tokenizer=TOKENIZER, **settings).prompts
    return prompt


def learnt(tmp_path: Path, row: dict[str, Any], **settings: Any) -> tuple[str, str]:
    """(prompt, completion) of a row for supervised fine-tuning."""
    path = write(tmp_path / "one.jsonl", row)
    (example,) = load_completions(path, tokenizer=TOKENIZER, **settings).completions
    return example.prompt.text, TOKENIZER.decode(example.completion_ids[:-1])


# ------------------------------------------------------------------------------------------------------ the page


def examples() -> list[tuple[str, str]]:
    """(format, line) of the page."""
    sections = re.split(r"^### (\w+)$", PAGE, flags=re.MULTILINE)[1:]
    return [
        (name, line)
        for name, text in zip(sections[::2], sections[1::2], strict=True)
        for line in re.findall(r"```json\n(.*?)\n```", text)
    ]


def test_the_page_has_an_example_and_a_row_of_the_table_for_each_format() -> None:
    assert {name for name, _ in examples()} == set(FORMATS)
    formats, _, _ = PAGE.partition("## Published sets")
    assert set(re.findall(r"^\| `(\w+)` \|", formats, re.MULTILINE)) == set(FORMATS)


@pytest.mark.parametrize(("name", "line"), examples())
def test_each_example_of_the_page_is_recognised_and_is_what_the_table_says(
    tmp_path: Path, name: str, line: str
) -> None:
    path = tmp_path / "one.jsonl"
    path.write_text(line + "\n")
    loaded = load_prompts(path, tokenizer=TOKENIZER)
    (prompt,) = loaded.prompts
    assert loaded.looked.format == name
    assert prompt.text.strip().endswith(("What is 6 times 7?>", "<user:Multiply the numbers.\n\n6, 7>"))
    if "completion" not in line:
        assert prompt.answer.endswith("42")
    assert prompt == load_prompts(path, tokenizer=TOKENIZER, format=name).prompts[0]


# ----------------------------------------------------------------------------------------------------- the formats


def test_verls_row_has_its_ground_truth_as_answer_and_all_it_holds_as_metadata(tmp_path: Path) -> None:
    row = {
        "data_source": "openai/gsm8k",
        "prompt": USER,
        "ability": "math",
        "reward_model": {"style": "rule", "ground_truth": "42"},
        "extra_info": {"split": "train", "index": 0, "answer": "#### 42", "question": "6x7?"},
    }
    prompt = one(tmp_path, row)
    assert (prompt.text, prompt.answer, prompt.id) == ("<user:6x7?>", "42", "line-1")
    assert prompt.metadata == {name: value for name, value in row.items() if name != "prompt"}
    pq.write_table(pa.Table.from_pylist([row]), tmp_path / "v.parquet")
    (same,) = load_prompts(tmp_path / "v.parquet", tokenizer=TOKENIZER).prompts
    assert (same.text, same.answer, same.metadata, same.id) == (prompt.text, "42", prompt.metadata, "row-1")
    flat = {"prompt": USER, "reward_model.style": "rule", "reward_model.ground_truth": 42}
    assert one(tmp_path, flat).answer == "42"


def test_rows_that_repeat_dapos_index_are_prompts_of_their_own(tmp_path: Path) -> None:
    row = {
        "data_source": "math_dapo",
        "prompt": USER,
        "ability": "MATH",
        "reward_model": {"ground_truth": "34", "style": "rule-lighteval/MATH_v2"},
        "extra_info": {"index": "9a9b6eb4-a1cb-49d1-8c1e-62eaf2f74079"},
    }
    pq.write_table(pa.Table.from_pylist([row] * 3), tmp_path / "dapo.parquet")
    prompts = load_prompts(tmp_path / "dapo.parquet", tokenizer=TOKENIZER).prompts
    assert [(p.id, p.answer) for p in prompts] == [("row-1", "34"), ("row-2", "34"), ("row-3", "34")]


def test_a_file_that_was_read_before_is_read_as_before(tmp_path: Path) -> None:
    """An ``answer`` of its own makes a row "prompts", whatever else it holds."""
    row = {"prompt": "1+1=", "answer": "2", "reward_model": {"ground_truth": "3"}, "messages": [], "completion": ["?"]}
    prompt = one(tmp_path, row)
    assert prompt == one(tmp_path, row, format="prompts")
    assert prompt.answer == "2" and set(prompt.metadata) == {"reward_model", "messages", "completion"}


def test_trls_completion_is_one_message(tmp_path: Path) -> None:
    said = [{"role": "assistant", "content": [{"type": "text", "text": "42"}], "tool_calls": None}]
    assert learnt(tmp_path, {"prompt": USER, "completion": said}) == ("<user:6x7?>", "42")
    for completion, problem in (
        (said * 2, "completion has 2 messages"),
        (USER, "is not the assistant's turn"),
        ([{**said[0], "tool_calls": [{"id": "1"}]}], "has tool_calls, which is more than a text to learn"),
        ([], "completion has 0 messages"),
        (7, "the field 'completion' must be a non-empty string, got 7"),
    ):
        with pytest.raises(DataError, match=rf'line 1: .*{problem}.* \(read as data.format = "prompts"\)'):
            learnt(tmp_path, {"prompt": USER, "completion": completion})


@pytest.mark.parametrize("field", ["messages", "conversations"])
def test_of_a_conversation_the_last_turn_is_learnt_and_the_others_are_the_prompt(tmp_path: Path, field: str) -> None:
    def turns(*pairs: tuple[str, str]) -> list[dict[str, str]]:
        role, content = ("role", "content") if field == "messages" else ("from", "value")
        shown = {"user": "human", "assistant": "gpt"} if field == "conversations" else {}
        return [{role: shown.get(who, who), content: what} for who, what in pairs]

    talk = turns(("system", "brief"), ("user", "a"), ("assistant", "b"), ("user", "c"), ("assistant", "d"))
    assert learnt(tmp_path, {field: talk}) == ("<system:brief><user:a><assistant:b><user:c>", "d")
    asked = one(tmp_path, {field: talk, "source": "s"})
    assert (asked.answer, asked.metadata) == ("d", {"source": "s"})
    assert one(tmp_path, {field: talk, "answer": 4}).answer == "4"
    open_end = {field: talk[:-1]}
    assert (one(tmp_path, open_end).text, one(tmp_path, open_end).answer) == (asked.text, "")
    with pytest.raises(DataError, match=rf"the last turn of {field} is not the assistant's: there is nothing to learn"):
        learnt(tmp_path, open_end)
    with pytest.raises(DataError, match="has no turn before the assistant's"):
        one(tmp_path, {field: talk[-1:]})


def test_sharegpts_system_field_stands_in_front(tmp_path: Path) -> None:
    row = {"system": "brief", "conversations": [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}]}
    assert learnt(tmp_path, row) == ("<system:brief><user:a>", "b")


def test_alpacas_input_stands_below_its_instruction(tmp_path: Path) -> None:
    row = {"instruction": "Add.", "input": "1, 2", "output": "3"}
    assert learnt(tmp_path, row, chat_template=False) == ("<user:Add.\n\n1, 2>", "3")
    assert one(tmp_path, row | {"input": ""}).text == "<user:Add.>"
    assert one(tmp_path, row).answer == "3"


def test_gsm8ks_parquet_is_read_as_gsm8k_and_learns_its_answer(tmp_path: Path) -> None:
    rows = [{"question": "6x7?", "answer": "6x7=42\n#### 42"}]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "train-00000-of-00001.parquet")
    (prompt,) = load_prompts(tmp_path, tokenizer=TOKENIZER).prompts
    assert (prompt.answer, prompt.metadata) == ("6x7=42\n#### 42", {})
    assert learnt(tmp_path, rows[0])[1] == "6x7=42\n#### 42"


def test_fields_of_other_names_are_named_by_their_paths(tmp_path: Path) -> None:
    row = {"problem": "6x7?", "task": {"gold": {"text": 42}}, "solution": "It is 42.", "answer": ["no", "text"]}
    fields = Paths("problem", "task.gold.text", "solution")
    prompt = one(tmp_path, row, fields=fields)
    assert (prompt.text, prompt.answer) == ("<user:6x7?>", "42")
    assert learnt(tmp_path, row, fields=fields) == ("<user:6x7?>", "It is 42.")
    asked = {"question": "6x7?", "answer": "so 42", "short": "42"}
    short = one(tmp_path, asked, fields=Paths(answer="short"))
    assert short.answer == "42" and learnt(tmp_path, asked, fields=Paths(answer="short"))[1] == "so 42"
    with pytest.raises(DataError, match=r"line 1: the field 'task.gold.txt' is missing"):
        one(tmp_path, row, fields=Paths("problem", "task.gold.txt"))


def test_the_settings_reach_the_file(tmp_path: Path) -> None:
    tree = ['model.path="m"', f'train.run_dir="{tmp_path}/r"', 'data.path="d"', 'data.answer_field="a.b"']
    config = load_config(write_empty(tmp_path / "c.toml"), tree)
    assert (config.data.format, config.data.answer_field) == ("auto", "a.b")
    assert Paths.named_by(config.data) == Paths(answer="a.b")


def write_empty(path: Path) -> Path:
    path.write_text("")
    return path


def test_a_row_of_no_known_format_says_what_it_has_and_what_it_was_taken_for(tmp_path: Path) -> None:
    said = r"line 1: the field 'prompt' is missing \(read as data.format = \"prompts\"; the row has problem, solution: "
    with pytest.raises(DataError, match=said + r"data.prompt_field names the prompt's\)"):
        one(tmp_path, {"problem": "6x7?", "solution": "42"})
    with pytest.raises(DataError, match=r"the field 'instruction' is missing \(read as data.format = \"alpaca\""):
        one(tmp_path, {"prompt": "x"}, format="alpaca")
    with pytest.raises(DataError, match=r"'reward_model.ground_truth' must be a string or a number.*\"verl\""):
        one(tmp_path, {"prompt": "x", "reward_model": {"ground_truth": ["a"]}})


# ------------------------------------------------------------------------------------------------- kinds of files


def csv_text(separator: str = ",") -> str:
    quoted = [separator.join('"{}"'.format(str(value).replace('"', '""')) for value in row.values()) for row in ROWS]
    return "\r\n".join([separator.join(ROWS[0]), *quoted]) + "\r\n"


LINES = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in ROWS)
KINDS: dict[str, str] = {
    "x.jsonl": LINES,
    "x.ndjson": LINES.replace("\n", "\r\n"),
    "x.txt": "\ufeff" + LINES.rstrip("\n"),
    "x.json": json.dumps(ROWS, ensure_ascii=False),
    "pretty.json": "\ufeff \n" + json.dumps(ROWS, indent=2) + "\n",
    "lines.json": LINES,
    "x.csv": csv_text(),
    "x.tsv": "\ufeff" + csv_text("\t"),
}
PACK: dict[str, Callable[[bytes], bytes]] = {
    "": bytes,
    ".gz": gzip.compress,
    ".bz2": bz2.compress,
    ".xz": lzma.compress,
}


@pytest.mark.parametrize("packed", PACK)
@pytest.mark.parametrize("name", KINDS)
def test_the_same_rows_are_read_from_every_kind_of_file(tmp_path: Path, cache: Path, name: str, packed: str) -> None:
    path = tmp_path / f"{name}{packed}"
    path.write_bytes(PACK[packed](KINDS[name].encode()))
    loaded = load_prompts(path, tokenizer=TOKENIZER)
    found = [(prompt.text, prompt.answer, prompt.metadata) for prompt in loaded.prompts]
    note = ROWS[0]["note"]
    assert found == [(f"<user:{n}+{n}=>", str(2 * n), {"note": note}) for n in range(5)]
    assert len(list(cache.glob("*-*"))) == (1 if packed else 0)
    again = load_prompts(path, tokenizer=TOKENIZER)
    assert again.prompts[3] == loaded.prompts[3] and again.looked.fingerprint() == loaded.looked.fingerprint()


def test_a_newer_compressed_file_replaces_its_copy(tmp_path: Path, cache: Path) -> None:
    path = tmp_path / "x.jsonl.gz"
    for text in ("one", "another"):
        path.write_bytes(gzip.compress(json.dumps({"prompt": text}).encode()))
        assert load_prompts(path, tokenizer=TOKENIZER).prompts[0].text == f"<user:{text}>"
    assert len(list(cache.glob("*-*"))) == 1


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("x.json", '[{"prompt": "a"}, {"prompt": "b"', "after row 1: not JSON that can be read: .* in an element"),
        ("x.json", '[{"prompt": "a"}', "after row 1: .*the file ends within its array: was it cut off"),
        ("x.json", '[{"prompt": "a"}]]', "after row 1: .*text follows the array's end"),
        ("x.json", '[{"prompt": "a"},, {"prompt": "b"}]', "after row 1: not JSON"),
        ("x.json", '[{"prompt": "a"},]', "after row 1: not JSON"),
        ("x.json", '[[{"prompt": "a"}]]', "row 1: expected one JSON object a row, got list"),
        ("x.json", "[]", "holds no usable rows"),
        ("x.json", '[{"prompt": "a"}, {"prompt": NaN}]', "row 2: not JSON that can be read: NaN is no JSON"),
        ("x.csv", "prompt,prompt\na,b\n", "the header has 'prompt' twice"),
        ("x.csv", "prompt,answer\na\n", "line 2: has 1 cells, the header has 2"),
        ("x.csv", 'prompt,answer\na,b\n"c,d\n', "at line 3: not CSV: unexpected end of data"),
        ("x.csv", "prompt,answer\na,b\n,d\n", "line 3: the field 'prompt' is missing"),
        ("x.csv", "prompt\n\"[{'role': 'user', 'content': 'x'}]\"\n", "line 2: the cell 'prompt' holds chat messages"),
        ("x.csv", "", "the header has no names"),
        ("x.jsonl.gz", "plainly not packed", "cannot be unpacked: Not a gzipped file"),
        ("x.jsonl.bz2", "plainly not packed", "cannot be unpacked"),
        ("x.parquet.gz", "", "compressed once more outside"),
        ("x.jsonl.zst", "", "is compressed with zstd: unpack it"),
        ("x.arrow", "", "is an Arrow file .*to_parquet"),
        ("x.jsonl", "ARROW1..", "is an Arrow file .*to_parquet"),
        (
            "x.jsonl",
            "version https://git-lfs.github.com/spec/v1\n",
            "is a pointer of Git LFS, not the file: git lfs pull",
        ),
        ("x.parquet", "version https://git-lfs.github.com/spec/v1\n", "is a pointer of Git LFS, not the file"),
        ("x.csv", "\n<!DOCTYPE html><html>", "is a web page, not the file: download it again"),
        ("x.jsonl", "BZh91AY", "is compressed with bzip2: give it a name that ends in .bz2"),
        ("x.jsonl", "\x04\x22M\x18", "is compressed with lz4"),
        ("x.db", "SQLite format 3\0", "is a database"),
        ("x.jsonl", '{\0"\0p\0', "is UTF-16: save it as UTF-8"),
        (
            "x.jsonl",
            '{"prompt": "a"}\r{"prompt": "b"}\r',
            "line 1: not JSON at .*carriage return alone: end them in a line",
        ),
        (
            "x.jsonl",
            '[{"prompt": "a"},\n{"prompt": "b"}]\n',
            r"line 1: not JSON .*an array of rows: give the file a name.*\.json",
        ),
        ("x.json", '{\n "prompt": "a"\n}\n', "line 1: not JSON .*an object over several lines: write each on one"),
        ("x.jsonl", '{"prompt": "a"},\n{"prompt": "b"},\n', "line 1: not JSON .*rows have no comma between them"),
        ("x.jsonl", "{'prompt': 'a'}\n", r"line 1: not JSON .*as Python prints it: write it with json\.dumps"),
        (
            "x.jsonl",
            '{"prompt": "a", "m": 1e999}\n',
            "line 1: not JSON that can be read: 1e999 is more than a float holds",
        ),
    ],
)
def test_a_file_that_cannot_be_read_says_why(tmp_path: Path, name: str, content: str, said: str) -> None:
    path = tmp_path / name
    path.write_bytes(content.encode())
    with pytest.raises(DataError, match=rf"{re.escape(str(path))}.*{said}") as caught:
        load_prompts(path, tokenizer=TOKENIZER)
    assert "\n" not in str(caught.value)


def test_a_gzip_file_that_was_cut_off_leaves_no_copy(tmp_path: Path, cache: Path) -> None:
    path = tmp_path / "x.jsonl.gz"
    path.write_bytes(gzip.compress(LINES.encode())[:-9])
    with pytest.raises(DataError, match="cannot be unpacked"):
        load_prompts(path, tokenizer=TOKENIZER)
    assert not list(cache.glob("*-*"))


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(st.text(min_size=1).filter(lambda t: t.strip()), min_size=1, max_size=6), st.integers(1, 40))
def test_an_array_is_read_whatever_its_texts_and_wherever_blocks_end(
    tmp_path: Path, texts: list[str], block: int
) -> None:
    from megatron_gspo.data import text_rows

    path = tmp_path / "x.json"
    path.write_bytes(json.dumps([{"prompt": text} for text in texts], ensure_ascii=bool(block % 2)).encode())
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(text_rows, "BLOCK", block)
        loaded = load_prompts(path, tokenizer=TOKENIZER)
    assert [prompt.text for prompt in loaded.prompts] == [f"<user:{text}>" for text in texts]


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    st.lists(st.sampled_from(["", "  ", "\r", "x", '{"prompt": "é"}', ' {"prompt": "a"} \r']), max_size=12),
    st.integers(1, 40),
    st.booleans(),
)
def test_lines_are_found_wherever_blocks_end(tmp_path: Path, lines: list[str], block: int, ends: bool) -> None:
    from megatron_gspo.data import text_rows

    content = "\n".join(lines).encode() + (b"\n" if ends else b"")
    path = tmp_path / "x.jsonl"
    path.write_bytes(content)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(text_rows, "BLOCK", block)
        rows = text_rows.json_lines(path)
    expected = [(n, bool(line.strip() == b"x")) for n, line in enumerate(content.split(b"\n"), 1) if line.strip()]
    assert [(row.number, bool(row.problem)) for row in rows.read_all()] == expected
    assert {index for index, (_, bad) in enumerate(expected) if bad} <= set(rows.suspects())


# ----------------------------------------------------------------------------------------------------------- shards


def shards(directory: Path, *names: str) -> Path:
    directory.mkdir()
    for name in names:
        if name.endswith(".parquet"):
            pq.write_table(pa.Table.from_pylist([{"prompt": name}, {"prompt": f"{name} again"}]), directory / name)
        else:
            write(directory / name, {"prompt": name})
    return directory


def test_a_directory_is_its_shards_in_the_order_of_their_names(tmp_path: Path) -> None:
    names = ["train-00001-of-00002.parquet", "train-00000-of-00002.parquet"]
    path = shards(tmp_path / "data", *names)
    write(path / "dataset_info.json", {"no": "row"})
    write(path / ".hidden.jsonl", {"no": "row"})
    (path / "README.md").write_text("about")
    loaded = load_prompts(path, tokenizer=TOKENIZER, chat_template=False)
    assert [prompt.id for prompt in loaded.prompts] == [f"{n}:row-{i}" for n in sorted(names) for i in (1, 2)]
    assert loaded.place(3) == f"{path}, {names[0]}, row 2"


def test_a_pattern_names_some_of_the_files_and_errors_name_the_shard(tmp_path: Path) -> None:
    path = shards(tmp_path / "data", "train-0.jsonl", "train-1.jsonl", "test-0.jsonl")
    assert len(load_prompts(path / "train-*", tokenizer=TOKENIZER)) == 2
    with pytest.raises(DataError, match=r"several kinds \(test-0.jsonl, train-0.jsonl\).*by a pattern"):
        load_prompts(path, tokenizer=TOKENIZER)
    (path / "train-1.jsonl").write_text("{oops")
    with pytest.raises(DataError, match=r"train-\*, train-1.jsonl, line 1: not JSON"):
        load_prompts(path / "train-*", tokenizer=TOKENIZER)
    assert load_prompts(path / "train-*", tokenizer=TOKENIZER, skip_bad=True).skipped == 1


def test_a_shard_that_is_missing_and_a_directory_without_data_are_refused(tmp_path: Path) -> None:
    path = shards(tmp_path / "data", "train-00000-of-00003.parquet", "train-00002-of-00003.parquet")
    with pytest.raises(DataError, match=r"1 of 3 shards are missing, the first: train-00001-of-00003.parquet"):
        load_prompts(path, tokenizer=TOKENIZER)
    with pytest.raises(DataError, match=r"no data files .*it holds the directories data: name one"):
        load_prompts(tmp_path, tokenizer=TOKENIZER)
    with pytest.raises(DataError, match="no such data file"):
        load_prompts(tmp_path / "nowhere" / "*.jsonl", tokenizer=TOKENIZER)


# ------------------------------------------------------------------------------------------- what people's files hold


def test_a_first_row_of_verl_without_a_ground_truth_does_not_cost_the_others_theirs(tmp_path: Path) -> None:
    rows = [{"prompt": USER, "reward_model": None}, {"prompt": USER, "reward_model": {"ground_truth": "42"}}]
    found = load_prompts(write(tmp_path / "v.jsonl", *rows), tokenizer=TOKENIZER)
    assert (found.looked.format, [prompt.answer for prompt in found.prompts]) == ("verl", ["", "42"])
    rows = [{"prompt": "a", "answer": "1"}, {"prompt": USER, "reward_model": {"ground_truth": "42"}}]
    assert load_prompts(write(tmp_path / "p.jsonl", *rows), tokenizer=TOKENIZER).looked.format == "prompts"


def test_numbers_of_parquet_are_the_references_that_were_written(tmp_path: Path) -> None:
    for column in (pa.array([0.1], pa.float32()), pa.array([0.1]), pa.array([Decimal("0.1")])):
        pq.write_table(pa.table({"prompt": ["a"], "answer": column}), tmp_path / "n.parquet")
        (prompt,) = load_prompts(tmp_path / "n.parquet", tokenizer=TOKENIZER).prompts
        assert prompt.answer == "0.1"


def test_spaces_in_a_csv_header_do_not_cost_a_column(tmp_path: Path) -> None:
    (tmp_path / "s.csv").write_text("prompt, answer\n1+1=, 2\n")
    (prompt,) = load_prompts(tmp_path / "s.csv", tokenizer=TOKENIZER).prompts
    assert prompt.answer.strip() == "2" and prompt.metadata == {}


def test_suffixes_in_capitals_are_read(tmp_path: Path) -> None:
    (tmp_path / "A.CSV").write_text("prompt,answer\n1+1=,2\n")
    (tmp_path / "A.JSON").write_text(json.dumps(ROWS))
    assert load_prompts(tmp_path / "A.CSV", tokenizer=TOKENIZER).prompts[0].answer == "2"
    assert len(load_prompts(tmp_path / "A.JSON", tokenizer=TOKENIZER)) == 5
    assert [shard.name for shard in find_shards(shards(tmp_path / "d", "TRAIN-0.JSONL", "TRAIN-1.JSONL"))] == [
        *("TRAIN-0.JSONL", "TRAIN-1.JSONL")
    ]


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (gzip.compress(b'{"prompt": "a"}', mtime=0), "compressed with gzip: give it a name that ends in .gz"),
        (b"\x28\xb5\x2f\xfd....", "compressed with zstd"),
        ('{"prompt": "a"}'.encode("utf-16"), "is UTF-16: save it as UTF-8"),
    ],
)
def test_a_file_that_is_not_what_its_name_says_is_named_even_when_bad_rows_are_skipped(
    tmp_path: Path, content: bytes, said: str
) -> None:
    (tmp_path / "x.jsonl").write_bytes(content)
    with pytest.raises(DataError, match=said):
        load_prompts(tmp_path / "x.jsonl", tokenizer=TOKENIZER, skip_bad=True)


def test_tools_of_a_row_and_messages_written_as_a_text_are_refused(tmp_path: Path) -> None:
    path = write(tmp_path / "t.jsonl", {"messages": USER, "tools": [{"type": "function"}]})
    with pytest.raises(DataError, match="line 1: the row has tools, which would not reach the chat template"):
        load_prompts(path, tokenizer=TOKENIZER)
    assert one(tmp_path, {"prompt": "6x7?", "tools": ["a hammer"]}).metadata == {"tools": ["a hammer"]}
    path = write(tmp_path / "c.jsonl", {"prompt": "6x7?", "completion": '[{"role": "assistant", "content": "42"}]'})
    with pytest.raises(DataError, match="'completion' holds chat messages as a text"):
        load_completions(path, tokenizer=TOKENIZER)
    for row in ({"question": " ", "answer": "1"}, {"instruction": "\n", "output": "1"}):
        with pytest.raises(DataError, match="must be a non-empty string"):
            load_prompts(write(tmp_path / "q.jsonl", row), tokenizer=TOKENIZER)


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"prompt": "<image>what?", "images": ["a.png"]}, "the row has 'images': images, audio and files do not reach"),
        ({"question": "what?", "answer": "1", "image": {"bytes": "x"}}, "the row has 'image'"),
        (
            {"prompt": "a", "reward_model": '{"ground_truth": "5"}'},
            "'reward_model' holds an object as a text, got .*verl",
        ),
        ({"prompt": '{"role": "user", "content": "x"}'}, "'prompt' holds chat messages as a text"),
        ({"prompt": "{'content': 'x', 'role': 'user'}"}, "'prompt' holds chat messages as a text"),
        ({"prompt": [{"role": "system", "content": "be"}]}, r"prompt has no turn of the user's \(system\)"),
    ],
)
def test_what_a_row_would_lose_without_a_word_is_refused(tmp_path: Path, row: dict[str, Any], message: str) -> None:
    with pytest.raises(DataError, match=message):
        one(tmp_path, row)


def test_what_only_resembles_messages_or_media_is_read(tmp_path: Path) -> None:
    assert one(tmp_path, {"prompt": '{"role": "admin", "content": 1} is what?'}).text.startswith('<user:{"role"')
    assert one(tmp_path, {"prompt": "a", "images": [], "image": None}).text == "<user:a>"
    empty = {"bytes": None, "path": None}  # a row without an image, as Parquet's columns of images have it
    assert one(tmp_path, {"prompt": "a", "image": empty, "images": [empty], "audio": [None]}).text == "<user:a>"
    assert one(tmp_path, {"prompt": "a", "files": {"a.py": "x"}}).metadata["files"] == {"a.py": "x"}  # of a program


@pytest.mark.parametrize(
    ("row", "message"),
    [
        (
            {"prompt": "q", "response": "r"},
            "'completion' is missing; beside it the row has response: data.completion_field",
        ),
        ({"prompt": "q", "completion": " \n"}, "'completion' must be a non-empty string"),
        (
            {
                "conversations": [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}] * 2
                + [{"from": "human", "value": "c"}]
            },
            "the last turn of conversations is not the assistant's: there is nothing to learn",
        ),
    ],
)
def test_a_row_without_a_text_to_learn_says_why(tmp_path: Path, row: dict[str, Any], message: str) -> None:
    path = tmp_path / "x.jsonl"
    path.write_text(json.dumps(row) + "\n")
    with pytest.raises(DataError, match=f"line 1: .*{message}"):
        load_completions(path, tokenizer=TOKENIZER)


def test_short_floats_and_maps_within_columns_of_parquet_are_the_values_that_were_written(tmp_path: Path) -> None:
    inner = pa.struct([("ground_truth", pa.float32())])
    table = pa.table(
        {
            "prompt": ["a"],
            "reward_model": pa.array([{"ground_truth": 0.1}], inner),
            "weights": pa.array([[0.1, None]], pa.list_(pa.float32())),
            "tags": pa.array([[("level", 0.3)]], pa.map_(pa.string(), pa.float32())),
        }
    )
    pq.write_table(table, tmp_path / "x.parquet")
    (prompt,) = load_prompts(tmp_path / "x.parquet", tokenizer=TOKENIZER).prompts
    assert prompt.answer == "0.1"
    assert prompt.metadata["weights"] == [0.1, None] and prompt.metadata["tags"] == {"level": 0.3}
    table = pa.table(
        {"prompt": ["a"], "reward_model": pa.array([[("ground_truth", "5")]], pa.map_(pa.string(), pa.string()))}
    )
    pq.write_table(table, tmp_path / "map.parquet")
    assert load_prompts(tmp_path / "map.parquet", tokenizer=TOKENIZER).prompts[0].answer == "5"


@pytest.mark.timeout(120)
def test_a_million_empty_lines_cost_nothing(tmp_path: Path) -> None:
    path = tmp_path / "x.jsonl"
    path.write_bytes(b"\n" * 3_000_000 + b'{"prompt": "a"}\n')
    assert load_prompts(path, tokenizer=TOKENIZER).prompts[0].id == "line-3000001"
