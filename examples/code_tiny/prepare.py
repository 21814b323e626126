"""Makes the model and the data of the code example: a tiny random Qwen3-MoE, and functions to be found.

    python examples/code_tiny/prepare.py .cache/code_tiny

Three values of an unknown function in; a Python expression out, which is run against five values that are not shown:

    f(4)=19 f(0)=7 f(1)=10 f(x)=  ->  3*x+7<eos>

Writes ``model/`` (a Hugging Face directory), ``sft.jsonl``, ``train.jsonl`` and ``eval.jsonl``; takes seconds, and the
same seed writes the same files.
"""

from __future__ import annotations

import argparse
import json
import random
from collections.abc import Iterable, Iterator
from itertools import islice, permutations, product
from pathlib import Path
from typing import NamedTuple

EOS, PAD = "<eos>", "<pad>"
VOCABULARY = {symbol: i for i, symbol in enumerate([*"0123456789f()= x*+-", EOS, PAD])}
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
    write_model(args.out / "model", args.seed)
    rng = random.Random(args.seed)
    prompts = all_prompts(rng)  # dealt out to the three files, which have none in common
    write_jsonl(args.out / "eval.jsonl", map(problem, islice(prompts, args.eval_prompts)))
    write_jsonl(args.out / "train.jsonl", map(problem, islice(prompts, args.train_prompts)))
    left = list(prompts)
    write_jsonl(args.out / "sft.jsonl", (example(left[i % len(left)], rng) for i in range(args.sft_examples)))
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


def write_jsonl(path: Path, rows: Iterable[dict[str, str]]) -> None:
    with path.open("w", encoding="utf-8") as file:
        file.writelines(json.dumps(row) + "\n" for row in rows)


def write_model(directory: Path, seed: int) -> None:
    """A random Qwen3-MoE of 0.45 M parameters, the quickstart's but for its 21 tokens, one character each."""
    import torch
    from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM
    from transformers.utils import logging

    config = Qwen3MoeConfig(
        vocab_size=len(VOCABULARY),
        hidden_size=64,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
        num_experts=16,
        num_experts_per_tok=4,
        moe_intermediate_size=32,
        intermediate_size=128,  # no dense layer uses it
        norm_topk_prob=True,
        max_position_embeddings=64,
        rope_parameters={"rope_type": "default", "rope_theta": 10_000.0},
        initializer_range=64**-0.5,  # unit-scale activations at this width; 0.02 is meant for wide models
        tie_word_embeddings=False,
        router_aux_loss_coef=0.0,
        eos_token_id=VOCABULARY[EOS],
        # A padding token's row would be zeros, where RMSNorm's gradient is 1 / sqrt(eps), and it can be sampled.
        pad_token_id=None,
        bos_token_id=None,
    )
    logging.disable_progress_bar()
    torch.manual_seed(seed)
    model = Qwen3MoeForCausalLM(config)
    model.save_pretrained(directory)
    tokenizer().save_pretrained(directory)


def tokenizer():  # type: ignore[no-untyped-def]  # transformers' class, imported late
    """One token a character. Without an unknown token, so that a character outside the vocabulary is an error."""
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    backend = Tokenizer(models.WordLevel(VOCABULARY))
    backend.pre_tokenizer = pre_tokenizers.Split(Regex("."), "isolated")
    backend.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(tokenizer_object=backend, eos_token=EOS, pad_token=PAD, model_max_length=64)


if __name__ == "__main__":
    main()
