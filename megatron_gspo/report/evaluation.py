"""The figures of an evaluation, and how they read on the terminal; ``evaluation_files`` has what lies on the disk."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

from megatron_gspo.algorithm.evaluation import CONFIDENCE, INTERVAL_METHOD, UNIT, estimates
from megatron_gspo.report.metrics import strict

if TYPE_CHECKING:
    from megatron_gspo.types import Rollout

SCHEMA = "megatron-gspo/evaluation/1"
"""Of ``result.json``; docs/evaluation.md says what is in it. A field that changes its meaning changes the number."""


class Answers(Protocol):
    """The K responses to a prompt and what a reward made of them, as ``train.grade.Graded`` has them."""

    @property
    def rollouts(self) -> tuple[Rollout, ...]:
        """K."""

    @property
    def rewards_K(self) -> np.ndarray:
        """[K]; NaN where there is none."""

    @property
    def ungraded_K(self) -> tuple[str, ...]:
        """K reasons, or none."""

    @property
    def components_K(self) -> tuple[dict[str, float], ...]:
        """K tables, or none."""


def statistics(groups: Sequence[Answers], span: tuple[float, float] = UNIT) -> dict[str, Any]:
    """The figures of an evaluation, with the same K responses to each prompt and rewards in ``span``. JSON values; an
    interval without an end has None there."""
    rewards_PK = np.stack([group.rewards_K for group in groups])
    return {
        "prompts": rewards_PK.shape[0],
        "samples": rewards_PK.shape[1],
        "headline": "accuracy" if np.isfinite(span[1]) else "reward",
        "estimates": {name: strict(asdict(estimate)) for name, estimate in estimates(rewards_PK, span).items()},
        "interval": {"confidence": CONFIDENCE, "method": INTERVAL_METHOD},
        "measured": {},
        "full_reward": strict(span[1]),
        **counts(groups),
    }


def counts(groups: Sequence[Answers]) -> dict[str, Any]:
    """Truncated, aborted, ungraded, components, tokens: JSON values."""
    rollouts = [rollout for group in groups for rollout in group.rollouts]
    lengths = np.array([len(rollout.response_ids) for rollout in rollouts])
    return {
        "truncated": float(np.mean([rollout.truncated for rollout in rollouts])),
        "aborted": sum(rollout.finish_reason == "abort" for rollout in rollouts),
        "ungraded": sum(bool(reason) for group in groups for reason in group.ungraded_K),
        "components": _component_means(groups),
        "tokens": {"mean": float(lengths.mean()), "median": float(np.median(lengths)), "max": int(lengths.max())},
    }


def warnings_of(groups: Sequence[Answers]) -> list[str]:
    """What is to be said of responses that were not graded, or given up."""
    figures, warnings = counts(groups), []
    if figures["ungraded"]:
        first = next(reason for group in groups for reason in group.ungraded_K if reason)
        warnings.append(f"{figures['ungraded']} responses were not graded, and count nowhere; the first: {first}")
    if figures["aborted"]:
        warnings.append(f"{figures['aborted']} responses were given up by the server, and count as wrong")
    return warnings


def fingerprint(directory: Path) -> dict[str, Any]:
    """Which weights: SHA-256 over ``config.json`` and every safetensors file of a Hugging Face directory, by name."""
    files = [directory / "config.json", *sorted(directory.glob("*.safetensors"))]
    whole = hashlib.sha256()
    for path in files:
        whole.update(f"{path.name} {file_digest(path)}\n".encode())
    return {"sha256": whole.hexdigest(), "files": len(files), "bytes": sum(path.stat().st_size for path in files)}


def file_digest(path: Path) -> str:
    """SHA-256 of a file's content."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def format_result(result: Mapping[str, Any]) -> str:
    """A result as a table for the terminal."""
    figures, settings = result["result"], result.get("sampling") or result["settings"]
    how = f"temperature {settings['temperature']:g}" if settings["temperature"] else "greedy"
    how += f", top-p {settings['top_p']:g}" if settings.get("top_p", 1.0) != 1.0 else ""
    how += f", top-k {settings['top_k']}" if settings.get("top_k", -1) != -1 else ""
    what = result.get("title") or result["model"]["name"]
    units = "problems" if "suite" in result else "prompts"
    names = {name: f"avg@{figures['samples']}" if name == "accuracy" else name for name in figures["estimates"]}
    width = max(11, *map(len, (*figures["measured"], *names.values(), *figures["components"]))) + 1
    lines = [
        f"{what}: {figures['prompts']} {units} x {figures['samples']} responses, {how}",
        f"{'':<{width}}{'':>8}   95% interval over {units}",
    ]
    for name, values in figures["measured"].items():
        lines.append(f"{name:<{width}}{values['value']:>8.0f}   {values['low']:.0f} ... {values['high']:.0f}")
    for name, values in figures["estimates"].items():
        low, high = ("?" if values[end] is None else f"{values[end]:.4f}" for end in ("low", "high"))
        lines.append(f"{names[name]:<{width}}{values['value']:>8.4f}   {low} ... {high}")
    components = figures["components"].items()
    lines += [f"{name:<{width}}{value:>8.4f}   mean of the component" for name, value in components]
    tokens = figures["tokens"]
    lines.append(f"{'truncated':<{width}}{figures['truncated']:>8.2%}")
    lines.append(f"{'tokens':<{width}}{tokens['mean']:>8.1f}   median {tokens['median']:g}, longest {tokens['max']}")
    return "\n".join(lines + [f"{'warning':<{width}} {text}" for text in result["warnings"]])


def _component_means(groups: Sequence[Answers]) -> dict[str, float]:
    tables = [table for group in groups for table in group.components_K]
    names = sorted({name for table in tables for name in table})
    return {name: float(np.mean([table[name] for table in tables if name in table])) for name in names}
