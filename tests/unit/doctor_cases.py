"""A sound model, prompts and configuration to be broken one at a time, and the checks that come of it."""

from __future__ import annotations

import importlib.util
import json
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType

import tomli_w

from megatron_gspo.doctor.catalog import CHECKS
from megatron_gspo.doctor.check import Check, examine
from megatron_gspo.doctor.facts import Facts

ROOT = Path(__file__).parents[2]


def prepare() -> ModuleType:
    """The quickstart's own maker of models and prompts."""
    spec = importlib.util.spec_from_file_location("quickstart_prepare", ROOT / "examples/quickstart/prepare.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@dataclass(frozen=True)
class Case:
    """A directory with a model, prompts and a configuration that passes, apart from what overrides change."""

    root: Path
    overrides: list[str] = field(default_factory=list)

    @property
    def model(self) -> Path:
        return self.root / "model"

    @property
    def config(self) -> Path:
        return self.root / "run.toml"

    def write(self) -> Case:
        rows = [{"prompt": f"{number:012d}=", "answer": f"{number:012d}"} for number in range(600)]
        for name in ("train", "eval"):
            (self.root / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        tree = {
            "model": {"path": str(self.model)},
            "data": {"path": str(self.root / "train.jsonl"), "eval_path": str(self.root / "eval.jsonl")},
            "train": {"run_dir": str(self.root / "run"), "prompts_per_step": 32},
            "rollout": {"max_prompt_tokens": 13, "max_response_tokens": 16},
        }
        self.config.write_text(tomli_w.dumps(tree))
        return self

    def facts(self, *overrides: str, ranks: int | None = None) -> Facts:
        return Facts(self.config, [*self.overrides, *overrides], ranks)

    def checks(self, *overrides: str, only: str = "", ranks: int | None = None) -> list[Check]:
        entries = [entry for entry in CHECKS if only in ("", entry.name)]
        assert entries, only
        return examine(self.facts(*overrides, ranks=ranks), entries)

    def check(self, name: str, *overrides: str, ranks: int | None = None) -> Check:
        """The worst line of one check."""
        checks = self.checks(*overrides, only=name, ranks=ranks)
        return max(checks, key=lambda check: ("ok", "warning", "error").index(check.status))

    def change_config(self, **settings: object) -> None:
        path = self.model / "config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | settings))
