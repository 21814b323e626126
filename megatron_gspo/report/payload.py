"""What the report's page is drawn from: runs as plain JSON values, without markup."""

from __future__ import annotations

import json
import math
import tomllib
from collections.abc import Sequence
from dataclasses import asdict
from datetime import datetime
from typing import Any

from megatron_gspo.errors import ConfigError
from megatron_gspo.report.charts import CHARTS
from megatron_gspo.report.metrics import PLACE, Record, by_outer_step
from megatron_gspo.report.rundir import RunDirectory, read_lines

ROLLOUT_BYTES = 4_000_000
"""Of a run's ``rollouts/`` files, what the page takes in; beyond it, outer steps are left out evenly."""

LOG_RATIOS = (("new", "old"), ("old", "rollout"), ("new", "rollout"))
"""Pairs whose difference shades a response's tokens."""


def payload(runs: Sequence[RunDirectory]) -> dict[str, Any]:
    """Everything that the page's script reads."""
    described = [run_payload(run, label) for run, label in zip(runs, labels(runs), strict=True)]
    recorded = {name for run in described for name in run["steps"]}
    charts = [asdict(chart) for chart in CHARTS if any(curve.metric in recorded for curve in chart.curves)]
    return {"runs": described, "charts": charts}


def run_payload(run: RunDirectory, label: str) -> dict[str, Any]:
    lines = run.metrics()
    rollouts, left_out = rollouts_payload(run)
    return {
        "label": label,
        "clip": clip_range(run),
        "steps": columns(lines),
        "outer": columns(by_outer_step(lines)),
        "rollouts": rollouts,
        "rollouts_left_out": left_out,
    }


def columns(lines: Sequence[Record]) -> dict[str, list[float | None]]:
    """Metric -> one value a line, None where the line has none; nine significant digits, since s_i - 1 is near 1e-4."""
    names = {name: None for line in lines for name in line}
    return {name: [_number(line.get(name), name in PLACE) for line in lines] for name in names}


def clip_range(run: RunDirectory) -> tuple[float, float] | None:
    """(clip_low, clip_high) of a loss that clips s_i; None for others, and where nothing says."""
    from megatron_gspo.algorithm.catalog import LOSSES

    config = run.config()
    if config is None or config.algorithm.name not in LOSSES or LOSSES[config.algorithm.name].ratio != "sequence":
        return None
    return config.algorithm.clip_range()


def rollouts_payload(run: RunDirectory) -> tuple[list[dict[str, Any]], int]:
    """The responses of the outer steps that fit ``ROLLOUT_BYTES`` (the last always), and how many steps did not."""
    files = run.rollout_files()
    steps = list(files)
    total = sum(path.stat().st_size for path in files.values())
    stride = max(1, math.ceil(total / ROLLOUT_BYTES))
    kept = steps[::-1][::stride][::-1]
    groups = [{"outer_step": step, "samples": [sample(line) for line in read_lines(files[step])]} for step in kept]
    return [group for group in groups if group["samples"]], len(steps) - len(kept)


def sample(line: Record) -> dict[str, Any]:
    """One saved response, with the differences of its logprobs instead of the logprobs."""
    tokens = [str(token) for token in line.get("tokens") or [line.get("response", "")]]
    shades = {}
    for upper, lower in LOG_RATIOS:
        a, b = line.get(f"{upper}_logprobs"), line.get(f"{lower}_logprobs")
        if a and b and len(a) == len(b) == len(tokens):
            shades[f"{upper} − {lower}"] = [_number(x - y, digits=4) for x, y in zip(a, b, strict=True)]
    keys = ("prompt_id", "sample", "prompt", "reward", "advantage", "ratio", "clipped", "finish_reason")
    return {key: line.get(key) for key in keys} | {"tokens": tokens, "shades": shades}


def settings(run: RunDirectory) -> dict[str, str]:
    """``section.key`` -> value as text, as ``config.toml`` has it; empty when it cannot be read."""
    try:
        tree = tomllib.loads(run.config_file.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return dict(_flatten(tree))


def seconds_of_run(run: RunDirectory) -> float | None:
    """From the start to the end, or to the last line of metrics when no end was written."""
    manifest = run.manifest()
    try:
        start = datetime.fromisoformat(manifest["started"]).timestamp()
        if "ended" in manifest:
            return datetime.fromisoformat(manifest["ended"]).timestamp() - start
        return max(0.0, run.metrics_file.stat().st_mtime - start)
    except (KeyError, TypeError, ValueError, OSError):
        return None


def labels(runs: Sequence[RunDirectory]) -> list[str]:
    """The directories' names, with as many parents before them as it takes to tell them apart."""
    parts = [run.path.resolve().parts for run in runs]
    if len(set(parts)) < len(parts):
        raise ConfigError(f"a run is named twice: {', '.join(str(run.path) for run in runs)}")
    depth = 1
    while len({part[-depth:] for part in parts}) < len(parts):
        depth += 1
    return ["/".join(part[-depth:]) for part in parts]


def to_json(value: Any) -> str:
    """JSON that may stand inside a ``<script>`` element: no character of it can end the element."""
    text = json.dumps(value, ensure_ascii=False, allow_nan=False, separators=(",", ":"))
    for character in "<>&\u2028\u2029":
        text = text.replace(character, f"\\u{ord(character):04x}")
    return text


def _number(value: Any, whole: bool = False, digits: int = 9) -> float | None:
    if not isinstance(value, (int, float)) or not math.isfinite(value):
        return None
    return int(value) if whole else float(f"{value:.{digits}g}")


def _flatten(tree: dict[str, Any], prefix: str = "") -> list[tuple[str, str]]:
    rows: list[tuple[str, str]] = []
    for key, value in tree.items():
        if isinstance(value, dict):
            rows += _flatten(value, f"{prefix}{key}.")
        else:
            rows.append((prefix + key, value if isinstance(value, str) else json.dumps(value, default=str)))
    return rows
