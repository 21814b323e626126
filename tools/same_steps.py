"""Whether two checkouts train the same: runs of the quickstart's task, compared bit for bit.

    python tools/same_steps.py BEFORE AFTER DIR [--case NAME ...]

BEFORE and AFTER are checkouts with their environments, and BEFORE's quickstart is prepared (``make quickstart`` has
run once). Both read BEFORE's model and data. Compared are metrics (but times, rates and the distance from the engine,
which are the machine's), the responses that were kept, and the weights of every run. Exit status 1 where they differ;
a metric that AFTER alone has is named, and no difference.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

from safetensors.torch import load_file

SHORT = ("train.outer_steps=2", "train.prompts_per_step=8", "train.minibatches=2", "eval.every=2", "eval.prompts=32")
ALONE = ("parallel.tensor=1", "parallel.expert=1")
CASES: dict[str, tuple[tuple[str, ...], ...]] = {
    "quickstart": (SHORT,),
    "one rank": ((*SHORT, *ALONE),),
    "pipeline": ((*SHORT, "parallel.tensor=1", "parallel.expert=1", "parallel.pipeline=2"),),
    "context": ((*SHORT, "parallel.tensor=1", "parallel.expert=1", "parallel.context=2"),),
    "data": ((*SHORT, "parallel.tensor=1", "parallel.expert=2", "parallel.data=2"),),
    "grpo": ((*SHORT, *ALONE, "algorithm.name=grpo", "algorithm.clip_low=0.2", "algorithm.clip_high=0.27"),),
    "gspo-token": ((*SHORT, "algorithm.name=gspo-token", "algorithm.aggregation=token-mean"),),
    "kl": ((*SHORT, "algorithm.kl_loss_coef=0.1"),),
    "r2": ((*SHORT, "replay.mode=r2"),),
    "r3": ((*SHORT, "replay.mode=r3"),),
    "resumed": (
        (*SHORT, "train.outer_steps=1", "train.checkpoint_every=1"),
        (*SHORT, "train.overwrite=false", "train.resume=true"),
    ),
}
"""Name -> the starts of a run, as settings on top of ``examples/quickstart/gspo.toml``."""
SFT = "sft"
THE_MACHINES = ("time/", "kl/engine_", "tokens_per_s")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("before", type=Path)
    parser.add_argument("after", type=Path)
    parser.add_argument("directory", type=Path)
    parser.add_argument("--case", action="append", choices=[*CASES, SFT], help="default: all")
    args = parser.parse_args()
    directory = args.directory.resolve()
    directory.mkdir(parents=True, exist_ok=True)
    found = 0
    for name in args.case or [*CASES, SFT]:
        runs = []
        for which, checkout in (("before", args.before.resolve()), ("after", args.after.resolve())):
            runs.append(directory / f"{name.replace(' ', '-')}-{which}")
            run(name, checkout, args.before.resolve(), runs[-1])
        differences, gained = compare(*runs)
        found += bool(differences)
        further = f" (AFTER alone has {', '.join(gained)})" if gained else ""
        print(f"{name}: {'; '.join(differences[:4]) or 'the same, bit for bit'}{further}", flush=True)
    return min(found, 1)


def run(name: str, checkout: Path, data: Path, run_dir: Path) -> None:
    """Both starts of a case, in one checkout; raises where one fails."""
    config = checkout / "examples" / "quickstart" / ("sft.toml" if name == SFT else "gspo.toml")
    paths = {
        "model.path": data / (".cache/quickstart/model" if name == SFT else "runs/quickstart-sft/hf"),
        "data.path": data / ".cache/quickstart" / ("sft.jsonl" if name == SFT else "train.jsonl"),
        "train.run_dir": run_dir,
    }
    if name != SFT:
        paths["data.eval_path"] = data / ".cache/quickstart/eval.jsonl"
        paths["reward.function"] = Path(f"{data / 'examples/quickstart/reward.py'}:running_sum")
    common = [f"{key}={json.dumps(str(path))}" for key, path in paths.items()]
    for start in CASES.get(name, (("train.outer_steps=6", "optimizer.warmup_steps=2"),)):
        command = [str(checkout / ".venv/bin/python"), "-m", "megatron_gspo.cli", "train", str(config), *start, *common]
        environment = os.environ | {"PYTHONPATH": str(checkout)}  # of worktrees that share an environment, too
        with run_dir.with_suffix(".log").open("a") as log:
            done = subprocess.run(command, cwd=checkout, env=environment, stdout=log, stderr=log, check=False)
        if done.returncode:
            raise SystemExit(f"{name} in {checkout}: exit status {done.returncode}, see {log.name}")


def compare(before: Path, after: Path) -> tuple[list[str], list[str]]:
    """(What differs, in words; the values that only ``after`` has, by name)."""
    differences, gained = [], set[str]()
    for name in ("metrics.jsonl", *(str(path.relative_to(before)) for path in sorted(before.glob("rollouts/*.jsonl")))):
        old, new = (lines(run_dir / name) for run_dir in (before, after))
        further = {key for record in new for key in record} - {key for record in old for key in record}
        gained |= further
        new = [{key: value for key, value in record.items() if key not in further} for record in new]
        if old != new:
            differences.append(f"{name}: {first_difference(old, new)}")
    old_weights, new_weights = weights(before), weights(after)
    if not old_weights or old_weights.keys() != new_weights.keys():
        return [*differences, "other tensors"], sorted(gained)
    other = [key for key in old_weights if not same(old_weights[key], new_weights[key])]
    differences += [f"{len(other)} tensors differ, {other[0]} first"] if other else []
    return differences, sorted(gained)


def weights(run_dir: Path) -> dict[str, Any]:
    """Every tensor of the run's Hugging Face directory."""
    return {
        name: tensor for file in sorted(run_dir.glob("hf/*.safetensors")) for name, tensor in load_file(file).items()
    }


def same(a: Any, b: Any) -> bool:
    return a.dtype == b.dtype and a.shape == b.shape and bool((a == b).all())


def lines(path: Path) -> list[dict[str, Any]]:
    records = [json.loads(line) for line in path.read_text().splitlines()]
    return [{key: value for key, value in record.items() if not machines(key)} for record in records]


def machines(key: str) -> bool:
    return key.startswith(THE_MACHINES) or key == "rollout_logprobs"


def first_difference(old: list[dict[str, Any]], new: list[dict[str, Any]]) -> str:
    for number, (a, b) in enumerate(zip(old, new, strict=False), start=1):
        for key in sorted(a.keys() | b.keys()):
            if a.get(key) != b.get(key):
                return f"line {number}, {key}: {a.get(key)!r:.60} and {b.get(key)!r:.60}"
    return f"{len(old)} and {len(new)} lines"


if __name__ == "__main__":
    sys.exit(main())
