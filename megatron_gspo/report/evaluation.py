"""What an evaluation leaves behind, and how it reads on the terminal.

    samples.jsonl     one response a line: prompt, response, reward, finish reason
    result.json       the statistics with their intervals, the settings, the versions and the model's identity
    unscored.jsonl    while it goes on, or after it failed: the responses that had arrived. Never a result
    servers/          logs of servers that were started for it

``result.json`` is written last: where it is, the evaluation is whole.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, Protocol, Self

import numpy as np

from megatron_gspo.algorithm.evaluation import CONFIDENCE, INTERVAL_METHOD, UNIT, estimates
from megatron_gspo.errors import ConfigError, MegatronGspoError
from megatron_gspo.report.metrics import strict
from megatron_gspo.storage import claiming, replace_text, writing

if TYPE_CHECKING:
    from megatron_gspo.types import Rollout

RESULT, SAMPLES, UNSCORED = "result.json", "samples.jsonl", "unscored.jsonl"


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


class EvaluationDirectory:
    """Takes responses as they arrive and the result at the end. Raises ConfigError when ``path`` holds files,
    WriteError when the disk does not take what is written."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._drawn = 0
        if path.exists() and (not path.is_dir() or any(path.iterdir())):
            raise ConfigError(f"--out {path} exists and is not an empty directory: name another")
        with claiming(f"--out {path}", path):
            path.mkdir(parents=True, exist_ok=True)
            self._unscored = (path / UNSCORED).open("w", encoding="utf-8", errors="backslashreplace")

    def drawn(self, rollouts: Sequence[Rollout]) -> None:
        """The responses to one prompt, not scored yet."""
        with writing(self.path, "the responses"):
            for rollout in rollouts:
                self._unscored.write(_line(_sample(rollout)))
            self._unscored.flush()
        self._drawn += len(rollouts)

    def finish(self, groups: Sequence[Answers], result: Mapping[str, Any]) -> None:
        """Every prompt's responses with their rewards, and the result."""
        with writing(self.path, "the result"):
            with (self.path / SAMPLES).open("w", encoding="utf-8", errors="backslashreplace") as file:
                for group in groups:
                    for i, rollout in enumerate(group.rollouts):
                        file.write(_line(_sample(rollout) | _judged(group, i)))
            replace_text(self.path / RESULT, json.dumps(result, indent=2) + "\n")
            (self.path / UNSCORED).unlink()

    def close(self) -> None:
        """Leaves nothing where nothing had arrived."""
        with contextlib.suppress(OSError):  # what could not be written was said when it was
            self._unscored.close()
        if not self._drawn:
            (self.path / UNSCORED).unlink(missing_ok=True)
            with contextlib.suppress(OSError):  # not empty: logs of servers
                self.path.rmdir()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        """After a failure the error says where the responses are that had arrived."""
        self.close()
        if isinstance(error, MegatronGspoError) and self._drawn:
            where = self.path / UNSCORED
            raise type(error)(f"{error} (no result; the {self._drawn} responses that had arrived: {where})") from error


def statistics(groups: Sequence[Answers], span: tuple[float, float] = UNIT) -> dict[str, Any]:
    """The figures of an evaluation, with the same K responses to each prompt and rewards in ``span``. JSON values; an
    interval without an end has None there."""
    rewards_PK = np.stack([group.rewards_K for group in groups])
    rollouts = [rollout for group in groups for rollout in group.rollouts]
    lengths = np.array([len(rollout.response_ids) for rollout in rollouts])
    return {
        "prompts": rewards_PK.shape[0],
        "samples": rewards_PK.shape[1],
        "estimates": {name: strict(asdict(estimate)) for name, estimate in estimates(rewards_PK, span).items()},
        "interval": {"confidence": CONFIDENCE, "method": INTERVAL_METHOD},
        "truncated": float(np.mean([rollout.truncated for rollout in rollouts])),
        "aborted": sum(rollout.finish_reason == "abort" for rollout in rollouts),
        "ungraded": sum(bool(reason) for group in groups for reason in group.ungraded_K),
        "components": _component_means(groups),
        "tokens": {"mean": float(lengths.mean()), "median": float(np.median(lengths)), "max": int(lengths.max())},
    }


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
    figures, settings, tokens = result["result"], result["settings"], result["result"]["tokens"]
    how = "greedy" if settings["greedy"] else f"temperature {settings['temperature']:g}"
    lines = [
        f"{result['model']['name']}: {figures['prompts']} prompts x {figures['samples']} responses, {how}",
        f"{'':<12}{'':>8}   95% interval over prompts",
    ]
    for name, values in figures["estimates"].items():
        label = f"avg@{figures['samples']}" if name == "accuracy" else name
        low, high = ("?" if values[end] is None else f"{values[end]:.4f}" for end in ("low", "high"))
        lines.append(f"{label:<12}{values['value']:>8.4f}   {low} ... {high}")
    lines += [f"{name:<12}{value:>8.4f}   mean of the component" for name, value in figures["components"].items()]
    lines.append(f"{'truncated':<12}{figures['truncated']:>8.2%}")
    lines.append(f"{'tokens':<12}{tokens['mean']:>8.1f}   median {tokens['median']:g}, longest {tokens['max']}")
    return "\n".join(lines + [f"{'warning':<12} {text}" for text in result["warnings"]])


def _sample(rollout: Rollout) -> dict[str, Any]:
    return {
        "prompt_id": rollout.prompt.id,
        "sample": rollout.sample,
        "prompt": rollout.prompt.text,
        "answer": rollout.prompt.answer,
        "response": rollout.text,
        "tokens": len(rollout.response_ids),
        "finish_reason": rollout.finish_reason,
    }


def _judged(group: Answers, i: int) -> dict[str, Any]:
    """What was made of one response; the reward is None where there is none."""
    judged: dict[str, Any] = {"reward": strict(float(group.rewards_K[i]))}
    if group.components_K and group.components_K[i]:
        judged["components"] = group.components_K[i]
    if group.ungraded_K and group.ungraded_K[i]:
        judged["ungraded"] = group.ungraded_K[i]
    return judged


def _component_means(groups: Sequence[Answers]) -> dict[str, float]:
    tables = [table for group in groups for table in group.components_K]
    names = sorted({name for table in tables for name in table})
    return {name: float(np.mean([table[name] for table in tables if name in table])) for name in names}


def _line(record: Mapping[str, Any]) -> str:
    return json.dumps(record, ensure_ascii=False) + "\n"
