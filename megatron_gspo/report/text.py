"""A run in words, which the terminal, the status and the page share."""

from __future__ import annotations

import math
from collections.abc import Mapping

from megatron_gspo.config import RunConfig


def algorithm_text(config: RunConfig) -> str:
    """``gspo, clip 1 - 0.0003 ... 1 + 0.0004``; with replay and adapters where they are on."""
    clip_range = config.algorithm.clip_range()
    clip = "" if clip_range is None else f", clip 1 - {clip_range[0]:g} ... 1 + {clip_range[1]:g}"
    replay = "" if config.replay.mode == "off" else f", replay {config.replay.mode}"
    adapters = f", adapters of rank {config.lora.rank}" if config.lora.rank else ""
    return f"{config.algorithm.name}{clip}{replay}{adapters}"


def layout_text(layout: Mapping[str, int], world_size: int) -> str:
    """``TP2 EP2 DP1 on 2 ranks``: tensor and data always, the others where they are not 1."""
    short = {"tensor": "TP", "pipeline": "PP", "virtual_pipeline": "VPP", "context": "CP", "expert": "EP"}
    short |= {"expert_tensor": "ETP", "data": "DP"}
    sizes = {name: layout.get(name, 1) for name in short}
    parts = [f"{text}{sizes[name]}" for name, text in short.items() if name in ("tensor", "data") or sizes[name] != 1]
    return f"{' '.join(parts)} on {world_size} rank{'s' if world_size != 1 else ''}"


def duration(seconds_left: float) -> str:
    """``47s``, ``12m05s``, ``3h07m``, ``2d04h``; "-" for what is no finite number."""
    if not math.isfinite(seconds_left):
        return "-"
    whole = round(seconds_left)
    minutes, hours, days = whole // 60, whole // 3600, whole // 86400
    if whole < 60:
        return f"{whole}s"
    if whole < 3600:
        return f"{minutes}m{whole % 60:02d}s"
    return f"{hours}h{minutes % 60:02d}m" if hours < 48 else f"{days}d{hours % 24:02d}h"


def count(number: int, noun: str) -> str:
    """``1 seed``, ``16 seeds``."""
    return f"{number:,} {noun}{'' if number == 1 else 's'}"
