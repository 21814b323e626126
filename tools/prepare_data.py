"""Makes prompt files from the files that data sets are published as, without a network.

    python tools/prepare_data.py dapo dapo-math-17k.parquet data/dapo --hold-out 512
    python tools/prepare_data.py gsm8k train.jsonl data/gsm8k --hold-out 512
    python tools/prepare_data.py eurus-code train.parquet data/code --no-system

Writes OUT/train.jsonl, with --hold-out also OUT/eval.jsonl, and OUT/counts.json: how many rows were read, how many of
them repeat a prompt, how many were dropped and why, and how many their publisher names. docs/data.md has the sets.
"""

from __future__ import annotations

import argparse
import hashlib
import heapq
import json
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from megatron_gspo.data.files import open_rows
from megatron_gspo.data.formats import Example, Paths, read_example
from megatron_gspo.data.rows import Row
from megatron_gspo.errors import DataError, UserError

LONGEST_LINE = 2**26
"""Bytes: what a row of a data file may have (docs/data.md)."""
CONFLICT = "copies of the prompt have different answers"


@dataclass(frozen=True)
class Expected:
    """One published file, as its publisher or somebody who has looked says."""

    file: str
    rows: int
    prompts: int | None
    """None where nobody states it."""
    source: str


@dataclass(frozen=True)
class Published:
    """A data set: how its rows read, and what is no prompt of it."""

    title: str
    format: str
    unfit: Callable[[Example], str]
    """Why a row is left out; empty for one that is taken."""
    expected: tuple[Expected, ...]


def no_integer(example: Example) -> str:
    """DAPO-Math's answers are integers: its authors have rewritten the problems so."""
    try:
        int(example.answer)
    except ValueError:
        return "the answer is no integer"
    return ""


def no_final_answer(example: Example) -> str:
    """GSM8K's answers end in a line "#### number"."""
    last = example.answer.rstrip().rpartition("\n")[2]
    return "" if last.startswith("#### ") else "the answer has no last line '#### number'"


def no_tests(example: Example) -> str:
    """Eurus-2's answers to code are a JSON text of inputs and outputs, one for each test."""
    if example.metadata.get("ability") != "code":
        return "no code: another ability"
    try:
        tests = json.loads(example.answer)
        inputs, outputs = tests["inputs"], tests["outputs"]
        paired = isinstance(inputs, list) and isinstance(outputs, list) and len(inputs) == len(outputs) > 0
    except (ValueError, KeyError, TypeError, RecursionError):
        return "the tests cannot be read"
    return "" if paired else "the tests are no pairs of input and output"


DAPO = "https://huggingface.co/datasets/BytedTsinghua-SIA/DAPO-Math-17k"
EURUS = "https://huggingface.co/datasets/PRIME-RL/Eurus-2-RL-Data, revision 5cbc5bc; later ones have fewer"
GSM8K = "https://github.com/openai/grade-school-math"
SETS = {
    "dapo": Published(
        "DAPO-Math-17k, and AIME 2024 in the same layout",
        "verl",
        no_integer,
        (
            Expected("dapo-math-17k.parquet", 1_791_700, None, f"{DAPO}: some 17 thousand, each about a hundred times"),
            Expected("aime-2024.parquet", 960, 30, "https://github.com/verl-project/verl/issues/3065"),
        ),
    ),
    "gsm8k": Published(
        "GSM8K",
        "gsm8k",
        no_final_answer,
        (Expected("train.jsonl", 7_473, 7_473, GSM8K), Expected("test.jsonl", 1_319, 1_319, GSM8K)),
    ),
    "eurus-code": Published(
        "the code of Eurus-2-RL-Data (APPS, CodeContests, TACO, Codeforces)",
        "verl",
        no_tests,
        (
            Expected("train.parquet", 482_019, 26_758, EURUS),
            Expected("validation.parquet", 2_048, 1_024, EURUS),
        ),
    ),
}


@dataclass
class Counts:
    """What became of the rows."""

    rows: int = 0
    repeats: int = 0
    """Rows whose prompt was there before, with the same answer."""
    dropped: Counter[str] = field(default_factory=Counter)
    """Why -> rows."""
    prompts: int = 0
    held_out: int = 0

    def lines(self, expected: tuple[Expected, ...]) -> Iterator[str]:
        """For a person."""
        yield f"{self.rows:9,} rows read"
        yield f"{self.repeats:9,} repeat a prompt"
        yield from (f"{count:9,} dropped: {why}" for why, count in self.dropped.most_common())
        yield f"{self.prompts:9,} prompts written, {self.held_out:,} of them held out"
        for file in expected:
            same = "as here" if (self.rows, self.prompts) == (file.rows, file.prompts) else "published"
            prompts = "" if file.prompts is None else f", {file.prompts:,} prompts"
            yield f"{same}: {file.file} has {file.rows:,} rows{prompts} ({file.source})"


def main() -> None:
    options = arguments()
    chosen = SETS[options.set]
    try:
        counts = prepare(chosen, options.file, options.out, options.hold_out, options.seed, system=options.system)
    except (UserError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    print("\n".join([f"{options.file}, read as {chosen.title}:", *counts.lines(chosen.expected)]))


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("set", choices=SETS, help="the data set")
    parser.add_argument("file", type=Path, help="its file, as it was published (Parquet or JSON lines)")
    parser.add_argument("out", type=Path, help="directory to write; its files of the same names are replaced")
    parser.add_argument(
        "--hold-out", type=count_or_all, default=0, metavar="N", help='prompts for eval.jsonl, or "all" (default: 0)'
    )
    parser.add_argument("--seed", type=int, default=0, help="chooses which are held out (default: 0)")
    parser.add_argument("--no-system", dest="system", action="store_false", help="leave system messages out")
    return parser.parse_args()


def count_or_all(word: str) -> int | None:
    """A number of prompts; None for all of them."""
    if word == "all":
        return None
    if not word.isdecimal():
        raise argparse.ArgumentTypeError(f'{word!r} is no number of prompts, and not "all"')
    return int(word)


def prepare(
    chosen: Published, source: Path, out: Path, hold_out: int | None = 0, seed: int = 0, *, system: bool = True
) -> Counts:
    """Reads ``source`` once and writes the files. Raises DataError for a file that holds no prompt of the set.

    ``hold_out``: how many prompts; None for all, and then there is no train.jsonl.
    """
    out.mkdir(parents=True, exist_ok=True)
    draft, counts = out / "draft.jsonl", Counts()
    try:
        seen = write_draft(chosen, source, draft, counts, system=system)
        kept = [key for key, answer in seen.items() if answer is not None]
        held = len(kept) if hold_out is None else hold_out
        if not kept or (hold_out is not None and held >= len(kept)):
            raise DataError(
                f"{source}: {len(kept)} prompts of {counts.rows} rows leave none to train on beside {held} held-out "
                f"ones; dropped: {dict(counts.dropped) or 'none'}"
            )
        counts.prompts, counts.held_out = len(kept), held
        deal_out(draft, out, set(kept), set(heapq.nsmallest(held, kept, key=lambda key: ranked(key, seed))))
    finally:
        draft.unlink(missing_ok=True)
    record = {"file": source.name, "set": chosen.title, **vars(counts), "expected": [vars(e) for e in chosen.expected]}
    (out / "counts.json").write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
    return counts


def write_draft(
    chosen: Published, source: Path, draft: Path, counts: Counts, *, system: bool
) -> dict[str, bytes | None]:
    """Each distinct prompt once, in the order of its first row; returns its id -> the digest of its answer, None where
    copies have different ones."""
    seen: dict[str, bytes | None] = {}
    with draft.open("wb") as file:
        for row in open_rows(source).read_all():
            counts.rows += 1
            line = row_of(chosen, row, counts, system=system)
            if line is None:
                continue
            key, answer = line["id"], hashlib.sha256(line["answer"].encode()).digest()
            if key not in seen:
                text = json.dumps(line, ensure_ascii=False).encode() + b"\n"
                if len(text) > LONGEST_LINE:
                    counts.dropped[f"more than {LONGEST_LINE >> 20} MiB"] += 1
                    continue
                seen[key] = answer
                file.write(text)
            elif seen[key] == answer:
                counts.repeats += 1
            else:
                counts.dropped[CONFLICT] += 1 + (seen[key] is not None)  # with the one that was written
                seen[key] = None
    return seen


def row_of(chosen: Published, row: Row, counts: Counts, *, system: bool) -> dict[str, Any] | None:
    """A row as a prompt file has it; None, and counted, where it is no prompt."""
    try:
        if row.problem:
            raise DataError(row.problem)
        example = read_example(chosen.format, Paths(), dict(row.fields))
    except DataError as error:
        counts.dropped["cannot be read" if row.problem else str(error).partition(" (read as")[0]] += 1
        return None
    if why := "no reference answer" if not example.answer else chosen.unfit(example):
        counts.dropped[why] += 1
        return None
    prompt: Any = example.prompt
    if not isinstance(prompt, str):
        prompt = [dict(message) for message in prompt if system or message["role"] != "system"]
    key = hashlib.sha256(json.dumps(prompt, sort_keys=True).encode()).hexdigest()[:24]
    place = {"row": row.number} | {name: row.fields[name] for name in ("data_source",) if name in row.fields}
    return {"id": key, "prompt": prompt, "answer": example.answer, **place}


def ranked(key: str, seed: int) -> bytes:
    """Held out are the first by this: the same prompts in whatever order the rows come."""
    return hashlib.sha256(f"{seed} {key}".encode()).digest()


def deal_out(draft: Path, out: Path, kept: set[str], held_out: set[str]) -> None:
    """The draft's lines into their files, which appear when they are whole."""
    wanted = {"train": kept - held_out, "eval": held_out}
    parts = {name: out / f"{name}.jsonl.part" for name, keys in wanted.items() if keys}
    files = {name: part.open("wb") for name, part in parts.items()}
    try:
        with draft.open("rb") as lines:
            for line in lines:
                key = json.loads(line)["id"]
                if key in kept:
                    files["eval" if key in held_out else "train"].write(line)
    finally:
        for file in files.values():
            file.close()
    for name in wanted:
        target = out / f"{name}.jsonl"
        if name in parts:
            parts[name].replace(target)
        else:
            target.unlink(missing_ok=True)  # of an earlier call, which had other prompts in it


if __name__ == "__main__":
    main()
