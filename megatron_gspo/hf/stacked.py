"""Experts that newer transformers keep as two tensors per layer, read one by one under the names of the tables.

``experts.gate_up_proj`` [E, 2I, H] holds each expert's gate rows over its up rows, ``experts.down_proj`` [E, H, I] its
third matrix: what transformers' model has in memory, and writes with ``save_original_format=False``.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from megatron_gspo.hf import mixtral
from megatron_gspo.hf.parts import SWIGLU
from megatron_gspo.untrusted import read_json

STACKED = re.compile(r"(?P<layer>.+)\.mlp\.experts\.gate_up_proj")
STACKS = ("gate_up_proj", "down_proj")
Shape = tuple[int, ...]


@dataclass(frozen=True)
class Part:
    """What a tensor is of one in the file, under another name."""

    stored: str
    """The name in the file."""
    expert: int | None = None
    """None: all of it."""
    start: int = 0
    """The first of its rows."""
    rows: int = 0
    columns: int = 0


def find_parts(names: Iterable[str], shape: Callable[[str], Shape], directory: Path) -> dict[str, Part]:
    """{name in the family's table: where it is} for every layer whose experts are stacked; of other shapes, nothing.

    The names are Mixtral's where ``config.json`` says that it is one: its routers have another name then, too.
    """
    there = set(names)
    layers = sorted(match["layer"] for name in there if (match := STACKED.fullmatch(name)))
    mixture, matrices = ("block_sparse_moe", mixtral.NAMES) if layers and _is_mixtral(directory) else ("mlp", SWIGLU)
    found: dict[str, Part] = {}
    for layer in layers:
        gate_up, down = (f"{layer}.mlp.experts.{name}" for name in STACKS)
        if down not in there or not _is_stacked(shape(gate_up), shape(down)):
            continue
        found |= dict(_experts(f"{layer}.{mixture}.experts", matrices, gate_up, down, shape(gate_up)))
        router = f"{layer}.mlp.gate.weight"
        if mixture != "mlp" and router in there:
            found[f"{layer}.{mixture}.gate.weight"] = Part(router)
    return found


def _experts(
    prefix: str, matrices: tuple[str, ...], gate_up: str, down: str, shape: Shape
) -> Iterator[tuple[str, Part]]:
    count, rows, hidden = shape[0], shape[1] // 2, shape[2]
    gate, up, third = matrices
    for expert in range(count):
        yield f"{prefix}.{expert}.{gate}.weight", Part(gate_up, expert, 0, rows, hidden)
        yield f"{prefix}.{expert}.{up}.weight", Part(gate_up, expert, rows, rows, hidden)
        yield f"{prefix}.{expert}.{third}.weight", Part(down, expert, 0, hidden, rows)


def _is_stacked(gate_up: Shape, down: Shape) -> bool:
    """Whether they are [E, 2I, H] and [E, H, I]: other models store them the other way round."""
    if len(gate_up) != 3 or len(down) != 3:
        return False
    return gate_up == (down[0], 2 * down[2], down[1])


def _is_mixtral(directory: Path) -> bool:
    try:
        names = read_json(directory / "config.json")["architectures"]
    except (OSError, ValueError, KeyError, TypeError):
        return False
    return isinstance(names, list) and names[:1] == [mixtral.FAMILY.architecture]
