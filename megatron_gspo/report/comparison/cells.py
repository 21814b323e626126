"""A comparison as it lies on disk: the plan, and the digests of the cells that are finished."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from megatron_gspo.errors import DataError

PLAN, CELLS = "compare.json", "cells"


@dataclass(frozen=True)
class Arm:
    """One configuration that is compared: a loss, a replay mode, on the mixture of experts or on its dense twin."""

    name: str
    loss: str
    replay: str
    dense: bool = False
    settings: Mapping[str, Any] = field(default_factory=dict)
    """Dotted name -> value, where it differs from the base configuration."""


@dataclass(frozen=True)
class Cell:
    """One arm with one seed, as its digest has it."""

    arm: str
    seed: int
    cold_start: str
    status: str
    """"finished", or how the run ended otherwise."""
    digest: Mapping[str, Any]

    @property
    def finished(self) -> bool:
        return self.status == "finished" and bool(self.outer_step)

    @property
    def outer_step(self) -> list[int]:
        return list(self.digest.get("outer_step") or [])

    def values(self, metric: str) -> list[float]:
        """The metric's values in order of outer step, without those that are missing."""
        return [value for value in self.series(metric) if value is not None]

    def series(self, metric: str) -> list[float | None]:
        return list((self.digest.get("series") or {}).get(metric) or [])

    def by_minibatch(self, metric: str) -> list[float | None]:
        return list((self.digest.get("by_minibatch") or {}).get(metric) or [])

    def measured(self, name: str) -> float | None:
        """``wall_s`` or ``peak_memory_mb``; None where nobody measured it."""
        value = (self.digest.get("cell") or {}).get(name)
        return float(value) if isinstance(value, (int, float)) and value > 0 else None


@dataclass(frozen=True)
class Comparison:
    """``cells`` are those with a digest, in the order of the plan; ``planned`` is how many there will be."""

    plan: Mapping[str, Any]
    arms: tuple[Arm, ...]
    cells: tuple[Cell, ...]

    @property
    def seeds(self) -> list[int]:
        return list(self.plan.get("seeds") or [])

    @property
    def planned(self) -> int:
        return len(self.arms) * len(self.seeds)

    @property
    def failed(self) -> list[Cell]:
        return [cell for cell in self.cells if not cell.finished]

    def of(self, arm: str) -> dict[int, Cell]:
        """Seed -> the arm's finished cell."""
        return {cell.seed: cell for cell in self.cells if cell.arm == arm and cell.finished}

    def setting(self, section: str, key: str) -> Any:
        """A value of the base configuration; None where the plan has none."""
        tree = (self.plan.get("config") or {}).get(section)
        return tree.get(key) if isinstance(tree, Mapping) else None


def read(out: Path) -> Comparison:
    """The comparison in ``out``. Raises DataError where its plan or a digest is missing, torn or of another shape."""
    plan = _object(out / PLAN)
    try:
        arms = tuple(
            Arm(arm["name"], arm["loss"], arm["replay"], bool(arm.get("dense")), dict(arm.get("settings") or {}))
            for arm in plan["arms"]
        )
        seeds = [int(seed) for seed in plan["seeds"]]
    except (KeyError, TypeError, ValueError) as error:
        raise DataError(f"{out / PLAN}: not a comparison's plan: {type(error).__name__} {error}") from None
    places = [(arm, seed, out / CELLS / arm.name / f"seed_{seed:03d}.json") for arm in arms for seed in seeds]
    cells = tuple(_cell(arm, seed, path) for arm, seed, path in places if path.is_file())
    return Comparison(plan, arms, cells)


def short_names(names: Sequence[str]) -> dict[str, str]:
    """Path -> as few of its last parts as tell the paths apart."""
    parts = {name: [part for part in name.split("/") if part] or [name] for name in dict.fromkeys(names)}
    depth = 1
    while len({tuple(part[-depth:]) for part in parts.values()}) < len({tuple(part) for part in parts.values()}):
        depth += 1
    return {name: "/".join(part[-depth:]) for name, part in parts.items()}


def _cell(arm: Arm, seed: int, path: Path) -> Cell:
    content = _object(path)
    cell = content.get("cell")
    if not isinstance(cell, dict) or (cell.get("arm"), cell.get("seed")) != (arm.name, seed):
        raise DataError(f"{path}: not the digest of {arm.name} with seed {seed}: remove it, and that cell is run again")
    return Cell(arm.name, seed, str(cell.get("cold_start") or ""), str(content.get("status") or "unknown"), content)


def _object(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error}") from None
    except ValueError as error:
        raise DataError(f"{path} is no JSON: {error}") from None
    if not isinstance(value, dict):
        raise DataError(f"{path}: not a JSON object")
    return value
