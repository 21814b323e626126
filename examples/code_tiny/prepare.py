"""Makes the model and the data of the code example: a tiny random Qwen3-MoE, and functions to be found.

    python examples/code_tiny/prepare.py .cache/code_tiny

Three values of an unknown function in; a Python expression out, which is run against five values that are not shown:

    f(4)=19 f(0)=7 f(1)=10 f(x)=  ->  3*x+7<eos>

Writes ``model/`` (a Hugging Face directory), ``sft.jsonl``, ``train.jsonl`` and ``eval.jsonl``; takes seconds, and the
same seed writes the same files. The model is the quickstart's (``examples/quickstart/prepare.py``) with other symbols.
"""

from __future__ import annotations

import argparse
import json
import random
import runpy
from collections.abc import Iterator
from itertools import islice, permutations, product
from pathlib import Path
from types import SimpleNamespace
from typing import NamedTuple

quickstart = SimpleNamespace(**runpy.run_path(str(Path(__file__).parents[1] / "quickstart" / "prepare.py")))

SYMBOLS = [*"0123456789f()= x*+-", quickstart.EOS, quickstart.PAD]
VOCABULARY = {symbol: i for i, symbol in enumerate(SYMBOLS)}
HIDDEN = (-7, -3, 12, 25, 100)
"""Arguments that a program is tested at; the prompt shows others, of 0 to 9."""
SLOPES, OFFSETS = range(1, 10), range(21)
TEACHER_ERROR = 0.35


class Line(NamedTuple):
    """f(x) = slope x + offset."""

    slope: int
    offset: int

    def __call__(self, x: int) -> int:
        return self.slope * x + self.offset


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path, help="directory to write; existing files in it are replaced")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--sft-examples", type=int, default=32_000)
    parser.add_argument("--train-prompts", type=int, default=4_096)
    parser.add_argument("--eval-prompts", type=int, default=1_024)
    args = parser.parse_args()

    args.out.mkdir(parents=True, exist_ok=True)
    quickstart.write_model(args.out / "model", args.seed, VOCABULARY)
    rng = random.Random(args.seed)
    prompts = all_prompts(rng)  # dealt out to the three files, which have none in common
    quickstart.write_jsonl(args.out / "eval.jsonl", map(problem, islice(prompts, args.eval_prompts)))
    quickstart.write_jsonl(args.out / "train.jsonl", map(problem, islice(prompts, args.train_prompts)))
    left = list(prompts)
    quickstart.write_jsonl(
        args.out / "sft.jsonl", (example(left[i % len(left)], rng) for i in range(args.sft_examples))
    )
    print(f"{args.out}: a model, {args.sft_examples} examples, {args.train_prompts} + {args.eval_prompts} prompts")


def all_prompts(rng: random.Random) -> Iterator[tuple[Line, tuple[int, ...]]]:
    """Functions with arguments to show, in a random order: 9 slopes, 21 offsets, and 0, 1 and one of eight others in
    six orders make 9,072."""
    arguments = [order for other in range(2, 10) for order in permutations((0, 1, other))]
    drawn = [(Line(*line), order) for line in product(SLOPES, OFFSETS) for order in arguments]
    rng.shuffle(drawn)
    return iter(drawn)


def asked(f: Line, arguments: tuple[int, ...]) -> str:
    """ "f(4)=19 f(0)=7 f(1)=10 f(x)="."""
    return " ".join(f"f({x})={f(x)}" for x in arguments) + " f(x)="


def problem(drawn: tuple[Line, tuple[int, ...]]) -> dict[str, str]:
    """A prompt and its tests, in APPS' layout; the response goes on from ``prefix``."""
    f, _ = drawn
    inputs, outputs = [[x] for x in HIDDEN], [[f(x)] for x in HIDDEN]
    tests = {"fn_name": "f", "prefix": "def f(x): return ", "inputs": inputs, "outputs": outputs}
    return {"prompt": asked(*drawn), "answer": json.dumps(tests)}


def example(drawn: tuple[Line, tuple[int, ...]], rng: random.Random) -> dict[str, str]:
    """A teacher's program, in one of four ways to write it. With probability 35% each number in it is off by one or
    two, so that 42% of its programs are right."""
    slope, offset = (
        number + (rng.choice((-2, -1, 1, 2)) if rng.random() < TEACHER_ERROR else 0) for number in drawn[0]
    )
    term = rng.choice((f"{slope}*x", f"x*{slope}"))
    forms = (f"{term}+{offset}", f"{offset}+{term}") if offset >= 0 else (f"{term}{offset}",)
    return {"prompt": asked(*drawn), "completion": rng.choice(forms)}


if __name__ == "__main__":
    main()
