"""Makes the quickstart's model and data: a tiny random Qwen3-MoE and the running-sum task.

    python examples/quickstart/prepare.py runs/quickstart-data

Twelve random digits and "=" in; their running sums modulo 10 out, then end-of-sequence:

    271828182845=  ->  290808979716<eos>

Writes ``model/`` (a Hugging Face directory), ``sft.jsonl``, ``train.jsonl`` and ``eval.jsonl``; takes seconds, and the
same seed writes the same files.
"""

from __future__ import annotations

import argparse
import json
import random
from collections.abc import Iterable, Iterator
from itertools import islice
from pathlib import Path

DIGITS = 12
EOS, PAD = "<eos>", "<pad>"
VOCABULARY = {symbol: i for i, symbol in enumerate([*"0123456789", "=", EOS, PAD])}
TEACHER_ERROR = 0.04


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path, help="directory to write; existing files in it are replaced")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--sft-examples", type=int, default=20_000)
    parser.add_argument("--train-prompts", type=int, default=4_096)
    parser.add_argument("--eval-prompts", type=int, default=1_024)
    args = parser.parse_args()

    args.out.mkdir(parents=True, exist_ok=True)
    write_model(args.out / "model", args.seed)
    rng = random.Random(args.seed)
    prompts = distinct_prompts(rng)  # one stream of distinct prompts: the three files have none in common
    write_jsonl(args.out / "eval.jsonl", map(question, islice(prompts, args.eval_prompts)))
    write_jsonl(args.out / "train.jsonl", map(question, islice(prompts, args.train_prompts)))
    write_jsonl(args.out / "sft.jsonl", (example(digits, rng) for digits in islice(prompts, args.sft_examples)))
    print(f"{args.out}: a model, {args.sft_examples} examples, {args.train_prompts} + {args.eval_prompts} prompts")


def distinct_prompts(rng: random.Random) -> Iterator[list[int]]:
    seen: set[tuple[int, ...]] = set()
    while True:
        digits = [rng.randrange(10) for _ in range(DIGITS)]
        if tuple(digits) not in seen:
            seen.add(tuple(digits))
            yield digits


def question(digits: list[int]) -> dict[str, str]:
    return {"prompt": join(digits) + "=", "answer": join(running_sums(digits))}


def example(digits: list[int], rng: random.Random) -> dict[str, str]:
    """A teacher's solution: each sum is wrong with probability 4%, and the next ones go on from the wrong sum.

    So 62% of the last sums are right: 0.96^12 = 61%, and in 1% more the mistakes cancel out. A policy that imitates
    this teacher has that accuracy when it samples, and reinforcement learning has room above it.
    """
    return {"prompt": join(digits) + "=", "completion": join(running_sums(digits, rng, TEACHER_ERROR))}


def running_sums(digits: list[int], rng: random.Random | None = None, error: float = 0.0) -> list[int]:
    sums: list[int] = []
    total = 0
    for digit in digits:
        total = (total + digit) % 10
        if rng is not None and rng.random() < error:
            total = (total + rng.randrange(1, 10)) % 10
        sums.append(total)
    return sums


def join(digits: list[int]) -> str:
    return "".join(map(str, digits))


def write_jsonl(path: Path, rows: Iterable[dict[str, str]]) -> None:
    with path.open("w", encoding="utf-8") as file:
        file.writelines(json.dumps(row) + "\n" for row in rows)


def write_model(directory: Path, seed: int, vocabulary: dict[str, int] = VOCABULARY) -> None:
    """A random Qwen3-MoE of 0.45 M parameters and a tokenizer with one character a token, 13 of them here."""
    import torch
    from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM
    from transformers.utils import logging

    config = Qwen3MoeConfig(
        vocab_size=len(vocabulary),
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
        eos_token_id=vocabulary[EOS],
        # A padding token's row would be zeros, where RMSNorm's gradient is 1 / sqrt(eps), and it can be sampled.
        pad_token_id=None,
        bos_token_id=None,
    )
    logging.disable_progress_bar()
    torch.manual_seed(seed)
    model = Qwen3MoeForCausalLM(config)
    model.save_pretrained(directory)
    tokenizer(vocabulary).save_pretrained(directory)


def tokenizer(vocabulary: dict[str, int] = VOCABULARY):  # type: ignore[no-untyped-def]  # transformers' class, imported late
    """One token a character. Without an unknown token, so that a character outside the vocabulary is an error."""
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    backend = Tokenizer(models.WordLevel(vocabulary))
    backend.pre_tokenizer = pre_tokenizers.Split(Regex("."), "isolated")
    backend.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(tokenizer_object=backend, eos_token=EOS, pad_token=PAD, model_max_length=64)


if __name__ == "__main__":
    main()
