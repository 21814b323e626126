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
from typing import TYPE_CHECKING, Any, Self

import numpy as np

from megatron_gspo.algorithm.evaluation import CONFIDENCE, INTERVAL_METHOD, Estimate, estimates
from megatron_gspo.errors import ConfigError, MegatronGspoError
from megatron_gspo.storage import claiming, replace_text, writing

if TYPE_CHECKING:
    from megatron_gspo.types import Rollout

RESULT, SAMPLES, UNSCORED = "result.json", "samples.jsonl", "unscored.jsonl"


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

    def finish(self, groups: Sequence[tuple[Sequence[Rollout], np.ndarray]], result: Mapping[str, Any]) -> None:
        """Every prompt's responses with their rewards [K], and the result."""
        with writing(self.path, "the result"):
            with (self.path / SAMPLES).open("w", encoding="utf-8", errors="backslashreplace") as file:
                for rollouts, rewards_K in groups:
                    for rollout, reward in zip(rollouts, rewards_K, strict=True):
                        file.write(_line(_sample(rollout) | {"reward": float(reward)}))
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


def statistics(groups: Sequence[tuple[Sequence[Rollout], np.ndarray]]) -> dict[str, Any]:
    """The figures of an evaluation: (responses, rewards [K]) a prompt, the same K throughout. JSON values."""
    rewards_PK = np.stack([rewards_K for _, rewards_K in groups])
    rollouts = [rollout for group, _ in groups for rollout in group]
    lengths = np.array([len(rollout.response_ids) for rollout in rollouts])
    return {
        "prompts": rewards_PK.shape[0],
        "samples": rewards_PK.shape[1],
        "estimates": {name: asdict(estimate) for name, estimate in estimates(rewards_PK).items()},
        "interval": {"confidence": CONFIDENCE, "method": INTERVAL_METHOD},
        "truncated": float(np.mean([rollout.truncated for rollout in rollouts])),
        "aborted": sum(rollout.finish_reason == "abort" for rollout in rollouts),
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
        estimate = Estimate(**values)
        lines.append(f"{label:<12}{estimate.value:>8.4f}   {estimate.low:.4f} ... {estimate.high:.4f}")
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


def _line(record: Mapping[str, Any]) -> str:
    return json.dumps(record, ensure_ascii=False) + "\n"
