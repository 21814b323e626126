"""A comparison as it lies on disk: the plan, and the digests of the cells that are finished.

The digests are files of their own, ``cells/ARM/seed_003.json``, as ``compare`` writes them one by one, or the lines of
``cells.jsonl`` (``cat cells/*/*.json > cells.jsonl``), which is easier to keep.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from megatron_gspo.errors import DataError
from megatron_gspo.report.metrics import counted

PLAN, CELLS, LINES = "compare.json", "cells", "cells.jsonl"
Place = tuple[str, int]
"""Name of an arm, seed."""


@dataclass(frozen=True)
class Arm:
    """One configuration that is compared: a loss, a replay mode, on the mixture of experts or on its dense twin."""

    name: str
    loss: str
    replay: str
    dense: bool = False
    settings: Mapping[str, Any] = field(default_factory=dict)
    """Dotted name -> value, where it differs from the base configuration."""
    family: str = ""
    """The name without the value that is swept."""
    value: float | None = None
    """Of the setting that is swept."""


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
        """Whether it ended well, with a step."""
        return self.status == "finished" and bool(self.outer_step)

    @property
    def outer_step(self) -> list[int]:
        """From 1, as everybody reads them; a digest, like metrics.jsonl, has them from 0."""
        return [counted(step) for step in self.digest.get("outer_step") or []]

    def values(self, metric: str) -> list[float]:
        """The metric's values in order of outer step, without those that are missing."""
        return [value for value in self.series(metric) if value is not None]

    def series(self, metric: str) -> list[float | None]:
        """The metric by outer step; None where it was not measured."""
        return list((self.digest.get("series") or {}).get(metric) or [])

    def by_minibatch(self, metric: str) -> list[float | None]:
        """The metric by mini-batch, mean over outer steps."""
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
        """That the plan names."""
        return list(self.plan.get("seeds") or [])

    @property
    def swept(self) -> str:
        """The setting that is swept; "" where none is."""
        sweep = self.plan.get("sweep")
        return str(sweep.get("setting") or "") if isinstance(sweep, Mapping) else ""

    @property
    def planned(self) -> int:
        """Cells in all."""
        return len(self.arms) * len(self.seeds)

    @property
    def failed(self) -> list[Cell]:
        """Cells that did not end well."""
        return [cell for cell in self.cells if not cell.finished]

    def of(self, arm: str) -> dict[int, Cell]:
        """Seed -> the arm's finished cell."""
        return {cell.seed: cell for cell in self.cells if cell.arm == arm and cell.finished}

    def setting(self, section: str, key: str) -> Any:
        """A value of the base configuration; None where the plan has none."""
        tree = (self.plan.get("config") or {}).get(section)
        return tree.get(key) if isinstance(tree, Mapping) else None


def read(out: Path) -> Comparison:
    """The comparison in ``out``, of digests in either form.

    Raises DataError where its plan or a digest is missing, torn or of another shape.
    """
    plan = _object(out / PLAN)
    try:
        arms = tuple(
            Arm(
                name=arm["name"],
                loss=arm["loss"],
                replay=arm["replay"],
                dense=bool(arm.get("dense")),
                settings=dict(arm.get("settings") or {}),
                family=str(arm.get("family") or arm["name"]),
                value=float(arm["value"]) if arm.get("value") is not None else None,
            )
            for arm in plan["arms"]
        )
        seeds = [int(seed) for seed in plan["seeds"]]
    except (KeyError, TypeError, ValueError) as error:
        raise DataError(f"{out / PLAN}: not a comparison's plan: {type(error).__name__} {error}") from None
    places = [(arm.name, seed) for arm in arms for seed in seeds]
    found = _from_lines(out / LINES, places) if (out / LINES).is_file() else {}
    for arm, seed in places:
        path = out / CELLS / arm / f"seed_{seed:03d}.json"
        if not path.is_file():
            continue
        cell = _cell((arm, seed), _object(path), f"{path}", "remove it, and that cell is run again")
        if found.setdefault((arm, seed), cell) != cell:
            raise DataError(f"{path} and {out / LINES} differ in {arm} with seed {seed}: remove the one that is wrong")
    return Comparison(plan, arms, tuple(found[place] for place in places if place in found))


def short_names(names: Sequence[str]) -> dict[str, str]:
    """Path -> as few of its last parts as tell the paths apart."""
    parts = {name: [part for part in name.split("/") if part] or [name] for name in dict.fromkeys(names)}
    depth = 1
    while len({tuple(part[-depth:]) for part in parts.values()}) < len({tuple(part) for part in parts.values()}):
        depth += 1
    return {name: "/".join(part[-depth:]) for name, part in parts.items()}


def _from_lines(path: Path, places: Sequence[Place]) -> dict[Place, Cell]:
    """The cells of ``cells.jsonl``, a digest a line; each is one of the plan's ``places``, and there once."""
    found: dict[Place, Cell] = {}
    for number, line in enumerate(_text(path).split("\n"), 1):
        if not line.strip():
            continue
        where = f"{path}, line {number}"
        content = _parsed(line, where)
        place = _place(content)
        if place is None or place not in places:
            raise DataError(f"{where}: not the digest of a cell that {PLAN} plans ({place or 'no arm and seed'})")
        if place in found:
            raise DataError(f"{where}: {place[0]} with seed {place[1]} is there twice")
        found[place] = _cell(place, content, where, "")
    return found


def _cell(place: Place, content: Mapping[str, Any], where: str, advice: str) -> Cell:
    if _place(content) != place:
        raise DataError(f"{where}: not the digest of {place[0]} with seed {place[1]}: {advice}")
    start, status = content["cell"].get("cold_start"), content.get("status")
    return Cell(*place, str(start or ""), str(status or "unknown"), content)


def _place(content: Mapping[str, Any]) -> Place | None:
    """Whose digest it is; None when it does not say so."""
    cell = content.get("cell")
    arm, seed = (cell.get("arm"), cell.get("seed")) if isinstance(cell, dict) else (None, None)
    return (arm, seed) if isinstance(arm, str) and type(seed) is int else None


def _object(path: Path) -> dict[str, Any]:
    return _parsed(_text(path), str(path))


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error}") from None
    except ValueError as error:  # no UTF-8
        raise DataError(f"{path} is no JSON: {error}") from None


def _parsed(text: str, where: str) -> dict[str, Any]:
    try:
        value = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise DataError(f"{where} is no JSON: {error}") from None
    if not isinstance(value, dict):
        raise DataError(f"{where}: not a JSON object")
    return value
