"""Makes what the comparison starts from: the running-sum task, and cold starts of two models by seed.

    python examples/compare_tiny/prepare.py .cache/compare_tiny

Task, tokenizer and mixture of experts are the quickstart's (``examples/quickstart/prepare.py``). Each cold start is a
random model that ``sft.toml`` has trained to imitate a teacher who gets 4% of the digits wrong. ``moe_0`` to ``moe_3``
have 16 experts; ``dense_0`` to ``dense_3``, the twins, have one MLP with as many parameters in their place.

Writes ``train.jsonl``, ``eval.jsonl``, ``sft.jsonl``, ``random/NAME`` and ``NAME/hf`` (Hugging Face directories). What
is there already stays, so that it can be interrupted.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import runpy
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from itertools import islice
from pathlib import Path
from types import SimpleNamespace

HERE = Path(__file__).parent
quickstart = SimpleNamespace(**runpy.run_path(str(HERE.parent / "quickstart" / "prepare.py")))

KINDS = ("moe", "dense")
TRAIN_PROMPTS, EVAL_PROMPTS = 16_384, 2_048
SFT_EXAMPLES = 96_000
"""1,500 steps of 64: each is read once, so that nothing is learned by heart."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path, help="directory to write")
    parser.add_argument("--seeds", type=int, default=4, help="cold starts of each kind (default %(default)s)")
    parser.add_argument("--jobs", type=int, default=2, help="cold starts made at a time (default %(default)s)")
    args = parser.parse_args()

    write_data(args.out)
    names = [(kind, seed) for kind in KINDS for seed in range(args.seeds)]
    for kind, seed in names:
        if not (args.out / "random" / f"{kind}_{seed}").is_dir():
            write_random_model(args.out / "random" / f"{kind}_{seed}", kind, seed)
    with ThreadPoolExecutor(args.jobs) as pool:
        list(pool.map(lambda name: fine_tune(args.out, *name), names))


def write_data(out: Path) -> None:
    """Prompts to train and to evaluate on, and the teacher's examples; no two of them share their digits."""
    if (out / "sft.jsonl").is_file():
        return
    out.mkdir(parents=True, exist_ok=True)
    rng = random.Random(0)
    prompts = quickstart.distinct_prompts(rng)
    quickstart.write_jsonl(out / "eval.jsonl", map(quickstart.question, islice(prompts, EVAL_PROMPTS)))
    quickstart.write_jsonl(out / "train.jsonl", map(quickstart.question, islice(prompts, TRAIN_PROMPTS)))
    examples = (quickstart.example(digits, rng) for digits in islice(prompts, SFT_EXAMPLES))
    quickstart.write_jsonl(out / "sft.jsonl", examples)


def write_random_model(directory: Path, kind: str, seed: int) -> None:
    """The quickstart's model of another seed; "dense" is the same with an MLP as wide as all experts together."""
    quickstart.write_model(directory, seed)
    if kind == "moe":
        return
    import torch
    from transformers import Qwen3Config, Qwen3ForCausalLM

    moe = json.loads((directory / "config.json").read_text(encoding="utf-8"))
    experts = moe.get("num_experts") or moe["num_local_experts"]  # transformers 5 writes the latter
    known = Qwen3Config().to_dict().keys() - {"architectures", "model_type"}
    shared = {name: value for name, value in moe.items() if name in known}
    config = Qwen3Config(**{**shared, "intermediate_size": experts * moe["moe_intermediate_size"]})
    torch.manual_seed(seed)
    Qwen3ForCausalLM(config).save_pretrained(directory)


def fine_tune(out: Path, kind: str, seed: int) -> None:
    run = out / f"{kind}_{seed}"
    if (run / "hf").is_dir():
        return
    settings = [
        f'model.path="{out}/random/{kind}_{seed}"',
        f'data.path="{out}/sft.jsonl"',
        f'train.run_dir="{run}"',
        f"train.seed={seed}",
    ]
    command = [sys.executable, "-m", "megatron_gspo.cli", "train", str(HERE / "sft.toml"), *settings]
    log = out / f"{kind}_{seed}.log"
    with log.open("w") as file:
        status = subprocess.run(
            command, stdout=file, stderr=file, env={**os.environ, "OMP_NUM_THREADS": "1"}, check=False
        ).returncode
    if status:
        sys.exit(f"{' '.join(command)} failed; see {log}")
    print(f"{run}/hf", flush=True)


if __name__ == "__main__":
    main()
