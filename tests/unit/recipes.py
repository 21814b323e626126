"""The recipes of ``examples/``: their TOML files, the tables of their READMEs, and a stand-in for a model's directory.

``python -m tests.unit.recipes`` prints the tables as they should read.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_gspo.config import RunConfig, load
from megatron_gspo.plan.given import given, weighed
from megatron_gspo.plan.models import Model, find_model
from megatron_gspo.plan.rates import GPUS
from tests.unit import published

ROOT = Path(__file__).parents[2]
FOLDERS = ("qwen3_30b_a3b", "qwen3_235b_a22b", "moonlight_16b_a3b", "qwen3_0_6b")
TOMLS = sorted(path for folder in FOLDERS for path in (ROOT / "examples" / folder).glob("*.toml"))
HEAD = (
    "| GPUs | card | settings beside the file | layout | training: weights + gradients + optimizer + activations + "
    "rest | serving | host, a node | an outer step |"
)
GIB = 2**30
MOST_STAGES = 3
"""Of a pipeline that is cut."""


def name_of(path: Path) -> str:
    """``qwen3_30b_a3b/gspo``."""
    return f"{path.parent.name}/{path.stem}"


@dataclass(frozen=True)
class Row:
    """A line of a README's table: on so many cards of a kind, the recipe with some settings."""

    toml: Path
    gpus: int
    card: str
    settings: tuple[str, ...]

    @property
    def config(self) -> RunConfig:
        return load(self.toml, list(self.settings))

    @property
    def model(self) -> Model:
        return find_model(self.config.model.path)

    def text(self) -> str:
        """As it should read. Fails where it does not fit."""
        outcome = weighed(self.model, GPUS[self.card], given(self.config, self.gpus, 8))
        assert outcome.plans, f"{self}: lacks {outcome.lacking}"
        (plan,) = outcome.plans
        parts = dict(plan.memory.trainer.parts)
        named = [parts.pop(name, 0) for name in ("weights", "gradients", "optimizer", "activations")]
        training = " + ".join(f"{size / GIB:.1f}" for size in (*named, sum(parts.values())))
        settings = " ".join(f"`{setting}`" for setting in self.settings)
        step = f"{plan.step.mid:.0f} s ({plan.step.low:.0f} to {plan.step.high:.0f})"
        cells = [self.gpus, self.card, settings, plan.choice.name]
        cells += [f"{training} = {plan.memory.trainer.total / GIB:.1f}", f"{plan.memory.server.total / GIB:.1f}"]
        return (
            "| " + " | ".join(map(str, [*cells, f"{plan.memory.host / GIB:.0f}", step])).replace("|  |", "| |") + " |"
        )


def rows(folder: str) -> Iterator[tuple[Row, str]]:
    """Those of a README's table, with their text; all are of ``gspo.toml``."""
    text = (ROOT / "examples" / folder / "README.md").read_text(encoding="utf-8")
    for line in re.findall(r"^\| \d+ \| [abh]\d+-.*$", text, re.MULTILINE):
        gpus, card, settings = (cell.strip() for cell in line.strip("|").split("|")[:3])
        yield (
            Row(ROOT / f"examples/{folder}/gspo.toml", int(gpus), card, tuple(re.findall("`([^`]+)`", settings))),
            line,
        )


def cut(config: dict[str, Any], run: RunConfig, world: int) -> tuple[dict[str, Any], RunConfig, int]:
    """A model of few layers and experts, the run with its layout on fewer stages, and how many ranks they have: a
    first, a last and inner stages, and every kind of layer in every virtual stage."""
    parallel, stages = run.parallel, min(run.parallel.pipeline, MOST_STAGES)
    chunks = stages * parallel.virtual_pipeline
    small = config | {"num_hidden_layers": max(chunks, 2 + config.get("first_k_dense_replace", 0))}
    for experts in {"num_experts", "n_routed_experts"} & set(config):
        small[experts] = 2 * max(parallel.expert, config["num_experts_per_tok"])
    changed = {"pipeline": stages, "stage_layers": (1,) * chunks if chunks > 1 else None}
    short = run.model_copy(update={"parallel": parallel.model_copy(update=changed)})
    return small, short, world // parallel.pipeline * stages


def world_of(folder: str) -> int:
    """The fewest cards of a README's table that take the file as it stands."""
    return min(row.gpus for row, _ in rows(folder) if not row.settings)


def stand_in(directory: Path, name: str) -> Path:
    """A directory as the model's, with two layers of random weights and a small tokenizer."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM
    from transformers.utils import logging

    directory.mkdir(parents=True)
    published.write(directory, "Qwen3")
    sizes = {"hidden_size": 64, "intermediate_size": 64, "moe_intermediate_size": 16, "num_hidden_layers": 2}
    sizes |= {"num_attention_heads": 8, "num_key_value_heads": 4, "head_dim": 16, "vocab_size": published.VOCABULARY}
    ends = json.loads((directory / "config.json").read_text())["eos_token_id"]
    config = AutoConfig.for_model(**dict(find_model(name).config) | sizes, eos_token_id=ends)
    logging.disable_progress_bar()
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).save_pretrained(directory)
    return directory


def main() -> None:
    for folder in FOLDERS:
        print(f"\n{folder}\n{HEAD}")
        for row, _ in rows(folder):
            print(row.text())


if __name__ == "__main__":
    main()
