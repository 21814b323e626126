"""Makes a small model, its tokenizer and two data files from GSM8K's own training file.

    python examples/gsm8k_tiny/prepare.py path/to/gsm8k/train.jsonl .cache/gsm8k_tiny

Writes ``model/`` (a random Qwen3-MoE as a Hugging Face directory, with a SentencePiece tokenizer trained on the file),
``train.jsonl`` and ``eval.jsonl`` (held out), in GSM8K's own format. The same seed writes the same files.
"""

from __future__ import annotations

import argparse
import json
import random
import re
import sys
from collections.abc import Iterable
from pathlib import Path

UNK, EOS, PAD = 0, 1, 2
CALCULATOR = re.compile(r"<<[^<>]*>>")

Row = dict[str, str]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("gsm8k", type=Path, help="GSM8K's train.jsonl: question and answer, one object a line")
    parser.add_argument("out", type=Path, help="directory to write; existing files in it are replaced")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--vocab-size", type=int, default=2048)
    parser.add_argument("--eval-prompts", type=int, default=512, help="questions held out")
    parser.add_argument("--keep-calculator", action="store_true", help="keeps the <<48/2=24>> annotations")
    args = parser.parse_args()

    rows = read(args.gsm8k, args.keep_calculator)
    if len(rows) <= args.eval_prompts:
        sys.exit(f"{args.gsm8k}: {len(rows)} rows leave nothing to train on beside {args.eval_prompts} held-out ones")
    random.Random(args.seed).shuffle(rows)
    held_out, train = rows[: args.eval_prompts], rows[args.eval_prompts :]

    args.out.mkdir(parents=True, exist_ok=True)
    write_jsonl(args.out / "eval.jsonl", held_out)
    write_jsonl(args.out / "train.jsonl", train)
    write_tokenizer(args.out / "model", texts(train), args.vocab_size)
    check_tokenizers(args.out / "model", texts(rows))
    parameters = write_model(args.out / "model", args.vocab_size, args.seed)
    print(f"{args.out}: {len(train)} + {len(held_out)} rows, a model of {parameters / 1e6:.1f} M parameters")


def read(path: Path, keep_calculator: bool) -> list[Row]:
    try:
        rows = [json.loads(line) for line in path.read_text(encoding="utf-8").split("\n") if line.strip()]
        return [
            {"question": row["question"], "answer": row["answer"] if keep_calculator else strip(row["answer"])}
            for row in rows
        ]
    except (OSError, ValueError, KeyError, TypeError) as error:
        sys.exit(f"{path}: not GSM8K's train.jsonl: {type(error).__name__}: {error}")


def strip(answer: str) -> str:
    """Without calculator annotations: a small model has enough to do with the text."""
    return CALCULATOR.sub("", answer)


def texts(rows: Iterable[Row]) -> list[str]:
    return [row[key] for row in rows for key in ("question", "answer")]


def write_jsonl(path: Path, rows: Iterable[Row]) -> None:
    with path.open("w", encoding="utf-8") as file:
        file.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)


def write_tokenizer(directory: Path, corpus: list[str], vocab_size: int) -> None:
    """A byte-pair model whose text is exactly its input: no normalization, no added or squeezed spaces, unknown
    characters (and newlines, which SentencePiece never sees in training) as bytes, each digit a token.
    """
    import sentencepiece

    directory.mkdir(parents=True, exist_ok=True)
    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=(line for text in corpus for line in text.split("\n") if line),
            model_prefix=str(directory / "tokenizer"),
            model_type="bpe",
            vocab_size=vocab_size,
            character_coverage=1.0,
            byte_fallback=True,
            split_digits=True,
            normalization_rule_name="identity",
            remove_extra_whitespaces=False,
            add_dummy_prefix=False,
            unk_id=UNK,
            eos_id=EOS,
            pad_id=PAD,
            bos_id=-1,
            num_threads=1,  # the same pieces on every machine
            minloglevel=2,
        )
    except RuntimeError as error:  # of SentencePiece: too few pieces for every character, or more than the text has
        sys.exit(f"--vocab-size {vocab_size}: {error}")
    (directory / "tokenizer.vocab").unlink()
    write_fast_tokenizer(directory)


def write_fast_tokenizer(directory: Path) -> None:
    """The same tokenizer as ``tokenizer.json``. Without it transformers would go by the architecture, take Qwen's own
    class for the SentencePiece model, and lose every space.
    """
    from transformers import AutoTokenizer

    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "eos_token": "</s>",
        "pad_token": "<pad>",
        "unk_token": "<unk>",
    }
    (directory / "tokenizer_config.json").write_text(json.dumps(settings), encoding="utf-8")
    AutoTokenizer.from_pretrained(directory).save_pretrained(directory)


def check_tokenizers(directory: Path, corpus: list[str]) -> None:
    """Both forms agree on every text and give it back exactly."""
    import sentencepiece
    from transformers import AutoTokenizer

    processor = sentencepiece.SentencePieceProcessor(model_file=str(directory / "tokenizer.model"))
    fast = AutoTokenizer.from_pretrained(directory)
    encoded = fast(corpus, add_special_tokens=False)["input_ids"]
    decoded = fast.batch_decode(encoded, skip_special_tokens=True)
    for text, ids, back in zip(corpus, encoded, decoded, strict=True):
        if processor.encode(text) != ids or processor.decode(ids) != text or back != text:
            sys.exit(f"the tokenizer does not give back {text!r}")


def write_model(directory: Path, vocab_size: int, seed: int) -> int:
    """A random Qwen3-MoE; returns its number of parameters."""
    import torch
    from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM
    from transformers.utils import logging

    hidden = 192
    config = Qwen3MoeConfig(
        vocab_size=vocab_size,
        hidden_size=hidden,
        num_hidden_layers=4,
        num_attention_heads=6,
        num_key_value_heads=2,
        head_dim=32,
        num_experts=16,
        num_experts_per_tok=4,
        moe_intermediate_size=96,
        intermediate_size=384,  # no dense layer uses it
        norm_topk_prob=True,
        max_position_embeddings=1024,
        rope_parameters={"rope_type": "default", "rope_theta": 10_000.0},
        initializer_range=hidden**-0.5 / 2,
        tie_word_embeddings=False,
        router_aux_loss_coef=0.0,
        eos_token_id=EOS,
        # A padding token's row would be zeros, where RMSNorm's gradient is 1 / sqrt(eps), and it can be sampled.
        pad_token_id=None,
        bos_token_id=None,
    )
    logging.disable_progress_bar()
    torch.manual_seed(seed)
    model = Qwen3MoeForCausalLM(config)
    model.save_pretrained(directory)
    return sum(parameter.numel() for parameter in model.parameters())


if __name__ == "__main__":
    main()
