"""Layouts by name, and the list of those that ``--layouts all`` checks.

A name is factors joined by "x", each an axis and its size, perhaps with a recompute mode: ``TP2xPP2xVPP2+recompute``.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from megatron_gspo.config import ParallelConfig, RunConfig
from megatron_gspo.errors import ConfigError

AXES = {
    "TP": "tensor",
    "PP": "pipeline",
    "VPP": "virtual_pipeline",
    "CP": "context",
    "EP": "expert",
    "ETP": "expert_tensor",
    "DP": "data",
}
"""Axis -> setting of ``[parallel]``."""
RECOMPUTE = "+recompute"
"""Suffix of a name: full activation recompute; ``+recompute-selective``, ``-block1`` and ``-uniform2`` are other ways
(the last two with their ``model.recompute_layers``)."""

ALL = (
    "TP1",
    # each axis alone
    *("TP2", "TP4", "PP2", "PP4", "CP2", "CP4", "EP2", "EP4", "DP2", "DP4", "TP2xETP2", "PP2xVPP2"),
    *("TP1+recompute", "TP1+recompute-selective", "TP1+recompute-block2", "PP2+recompute-uniform2"),
    # pairs
    *("TP2xPP2", "TP2xCP2", "TP2xEP2", "TP2xDP2", "PP2xCP2", "PP2xEP2", "PP2xDP2", "CP2xEP2", "CP2xDP2", "DP4xEP2"),
    *("TP2xPP2xVPP2", "CP2xPP2xVPP2", "TP2xETP2xPP2", "TP2xDP2xEP2xETP2"),
    # three axes and more
    *("TP2xDP2xEP4", "TP2xPP2xEP2", "TP2xCP2xEP2", "TP2xCP2xEP4", "CP2xPP2xEP2", "TP2xCP2xDP2", "TP2xCP2xPP2"),
    *("TP2xPP2xDP2xEP2", "TP2xCP2xPP2xEP4", "CP2xDP2xPP2xEP4", "TP2xCP2xPP2xVPP2+recompute"),
    *("TP2xPP2xEP2+recompute", "TP2xPP2xEP2+recompute-selective", "CP2xEP2xPP2xVPP2+recompute"),
    "TP2xPP2xEP2+recompute-block1",
)
"""Each axis alone, the pairs, and combinations of three and more; at most 8 ranks each."""


@dataclass(frozen=True)
class Layout:
    """A parallel layout with its recompute mode."""

    name: str
    parallel: Mapping[str, Any] = field(default_factory=dict)
    """Settings of ``[parallel]``; axes that the name leaves out are absent."""
    model: Mapping[str, Any] = field(default_factory=dict)
    """Settings of ``[model]`` that belong to it: how activations are recomputed."""

    @property
    def ranks(self) -> int:
        """World size: with the fewest data-parallel ranks that hold the experts, where the name gives none.

        Also of a layout that ``ParallelConfig`` refuses. Raises LayoutError when the experts do not divide.
        """
        return ParallelConfig.model_construct(**self.parallel).world_size()


def parse_layout(name: str) -> Layout:
    """Reads a name. Raises ConfigError for what is none, or names an axis twice."""
    factors, plus, mode = name.strip().partition(RECOMPUTE)
    parallel: dict[str, int] = {}
    for factor in factors.split("x"):
        match = re.fullmatch(r"([A-Z]+)([1-9][0-9]*)", factor)
        if match is None or match[1] not in AXES or AXES[match[1]] in parallel or (mode and not mode.startswith("-")):
            raise ConfigError(
                f'"{name}" is not a layout: join axes ({", ".join(AXES)}) and sizes by "x", each axis once, and add '
                f"{RECOMPUTE} for full activation recompute, as in TP2xPP2xEP2{RECOMPUTE}"
            )
        parallel[AXES[match[1]]] = int(match[2])
    return Layout(name.strip(), parallel, _recompute_of(mode[1:]) if plus else {})


def _recompute_of(mode: str) -> dict[str, Any]:
    """Settings of ``[model]``, of what follows the suffix's hyphen."""
    by_layers = re.fullmatch(r"(block|uniform)([1-9][0-9]*)", mode)
    if by_layers is None:
        return {"recompute": mode or "full"}
    return {"recompute": "full", "recompute_method": by_layers[1], "recompute_layers": int(by_layers[2])}


def layout_of(config: RunConfig, world: int | None = None) -> Layout:
    """A configuration's own layout, under the name that says it; data-parallel ranks fill ``world``, if given."""
    settings = config.parallel.model_dump(exclude_none=True, exclude_defaults=True)
    if world is not None:
        settings["data"] = config.parallel.data_size(world)
    factors = [f"{axis}{settings[name]}" for axis, name in AXES.items() if settings.get(name, 1) > 1] or ["TP1"]
    model = {
        name: value for name, value in config.model.model_dump(exclude_defaults=True).items() if "recompute" in name
    }
    suffix = "" if "recompute" not in model else RECOMPUTE
    if suffix and model["recompute"] != "full":
        suffix += f"-{model['recompute']}"
    elif {"recompute_method", "recompute_layers"} & model.keys():
        suffix += f"-{config.model.recompute_method}{config.model.recompute_layers}"
    return Layout("x".join(factors) + suffix, settings, model)


def choose_layouts(
    text: str, config: RunConfig | None, *, max_ranks: int, world: int | None = None
) -> tuple[list[Layout], set[str]]:
    """``all``, ``config`` and names, separated by commas.

    Args:
        max_ranks: "all" leaves out what needs more.
        world: ranks of a running world, if any: "all" leaves out what needs more or fewer.
    Returns:
        The layouts, each once, and the names of those that were not asked for by "all".
    Raises:
        ConfigError: an unknown name, "config" without one, or nothing left.
    """
    every: list[Layout] = []
    named: list[Layout] = []
    for name in (part.strip() for part in text.split(",") if part.strip()):
        if name == "all":
            every = [parse_layout(each) for each in ALL]
            every = [layout for layout in every if (layout.ranks == world if world else layout.ranks <= max_ranks)]
        elif name == "config":
            if config is None:
                raise ConfigError("--layouts config needs a configuration file, whose layout it takes")
            named.append(layout_of(config, world))
        else:
            named.append(parse_layout(name))
            if not world and named[-1].ranks > max_ranks:
                raise ConfigError(f"{name} needs {named[-1].ranks} ranks, more than --max-ranks {max_ranks}")
    if not every + named:
        limit = f"{world} ranks" if world else f"at most {max_ranks} ranks"
        raise ConfigError(f'--layouts "{text}" leaves no layout (of {limit})')
    return list({layout.name: layout for layout in every + named}.values()), {layout.name for layout in named}
