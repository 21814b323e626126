"""Continuing a run: which checkpoint, and whether this configuration may continue it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch.distributed as dist

from megatron_gspo.config import RunConfig
from megatron_gspo.errors import ConfigError, WeightError
from megatron_gspo.parallel.exchange import broadcast_object, together
from megatron_gspo.policy.checkpoint_files import latest_in, read_header

if TYPE_CHECKING:  # comparing configurations needs no Megatron
    from megatron_gspo.policy.groups import Groups

PACKAGES = ("megatron-gspo", "torch", "megatron-core")
FREE = frozenset(
    {
        "parallel",
        *(f"sync.{name}" for name in ("method", "directory", "bucket_mb")),
        "model.logprob_chunk",
        "model.recompute",
        "model.recompute_modules",
        "algorithm.allow_wide_clip",
        *(f"data.{name}" for name in ("path", "eval_path", "format", "chat_template", "skip_bad", "limit")),
        *(f"data.{name}" for name in ("prompt_field", "answer_field", "completion_field")),
        *(f"train.{name}" for name in ("run_dir", "overwrite", "resume", "resume_changes", "outer_steps")),
        *(f"train.{name}" for name in ("checkpoint_every", "keep_last", "keep_every", "checkpoint_async")),
        *(f"train.{name}" for name in ("microbatch_tokens", "oversize", "deterministic", "noise_floor_every")),
        *(f"train.{name}" for name in ("save_rollouts", "save_hf", "save_hf_every", "tensorboard", "wandb")),
        *(f"rollout.{name}" for name in ("servers", "local_servers", "server_python", "server_args")),
        *(f"rollout.{name}" for name in ("server_start_s", "concurrency", "timeout_s", "retries")),
        *(f"replay.{name}" for name in ("min_coverage", "engine_routes_every", "drift_every")),
        "rollout.max_prompt_tokens",
        "reward.timeout_s",
        "reward.concurrency",
        "reward.check_references",
        "eval.every",
        "eval.greedy",
        "eval.start",
        "eval.prompts",
        "eval.samples",
    }
)
"""Settings, and whole sections, that may change within one experiment. A setting that is not here may not, so that a
new one is refused until somebody has thought about it. Prompts are compared as they were read, not by their settings.
"""


@dataclass(frozen=True)
class Resumption:
    """A checkpoint that this run continues from."""

    directory: Path
    extra: dict[str, Any]
    """What the run saved beside the policy: ``Progress`` and ``identity``."""
    changes: dict[str, tuple[Any, Any]]
    """Setting (or package) -> its value then and now, where they differ."""

    @property
    def outer_steps(self) -> int:
        return int(self.extra["outer_step"])

    def describe(self) -> str:
        """One line."""
        changes = [f"{name} {then} -> {now}" for name, (then, now) in self.changes.items()]
        return f"continues from {self.directory.name}" + (f"; changed: {', '.join(changes)}" if changes else "")


def find_resumption(config: RunConfig, identity: Mapping[str, Any], groups: Groups) -> Resumption | None:
    """What to continue from; None when this run starts afresh. Collective; the first rank reads.

    Raises ConfigError when the configuration would make the continuation another experiment, WeightError when what
    ``latest`` names cannot be read.
    """
    first = dist.get_rank() == 0
    found = together(lambda: _find(config, identity) if first and config.train.resume else None, groups.world)
    return broadcast_object(found, 0, groups.world)


def identify(config: RunConfig, prompts: Mapping[str, str]) -> dict[str, Any]:
    """What makes a run this one, as JSON: kept in each checkpoint and compared on resume.

    ``prompts``: setting -> fingerprint of what was read through it.
    """
    versions = {name: metadata.version(name) for name in PACKAGES}
    return {"config": config.model_dump(mode="json"), "prompts": dict(prompts), "versions": versions}


def _find(config: RunConfig, identity: Mapping[str, Any]) -> Resumption | None:
    directory = latest_in(Path(config.train.run_dir) / "checkpoints")
    if directory is None:
        return None
    extra = read_header(directory)["extra"]
    missing = {"outer_step", "optimizer_step", "cursor", *identity} - extra.keys()
    if missing:
        raise WeightError(f"{directory}: not a run's checkpoint: its extra lacks {', '.join(sorted(missing))}")
    if extra["outer_step"] > config.train.outer_steps:
        raise ConfigError(
            f"train.outer_steps = {config.train.outer_steps}, but {directory} has done {extra['outer_step']} of them"
        )
    _check_prompts(directory, extra["prompts"], identity["prompts"], config.train.resume_changes)
    changes = _differences(flat(extra["config"]), flat(identity["config"]))
    _check_changes(directory, changes, config.train.resume_changes)
    noted = {name: pair for name, pair in changes.items() if not name.startswith("train.resume")}
    return Resumption(directory, extra, noted | _differences(extra["versions"], identity["versions"]))


def flat(tree: Mapping[str, Any]) -> dict[str, Any]:
    """Sections of settings -> "section.key" -> value."""
    return {f"{section}.{key}": value for section, settings in tree.items() for key, value in settings.items()}


def _differences(then: Mapping[str, Any], now: Mapping[str, Any]) -> dict[str, tuple[Any, Any]]:
    """Of what both know: a setting that one version lacks has no value to compare."""
    return {name: (then[name], now[name]) for name in now if name in then and then[name] != now[name]}


def _check_changes(directory: Path, changes: Mapping[str, tuple[Any, Any]], allowed: tuple[str, ...]) -> None:
    refused = [name for name in changes if not {name, name.partition(".")[0]} & FREE and name not in allowed]
    if refused:
        texts = [f"{name} was {changes[name][0]!r} and is {changes[name][1]!r}" for name in refused]
        names = ", ".join(f'"{name}"' for name in refused)
        raise ConfigError(
            f"{directory} cannot be continued as the same experiment: {'; '.join(texts)}. Set it back, name another "
            f"train.run_dir, or set train.resume_changes = [{names}]"
        )


def _check_prompts(directory: Path, then: Mapping[str, str], now: Mapping[str, str], allowed: tuple[str, ...]) -> None:
    for name, (before, after) in _differences(then, now).items():
        if name not in allowed:
            way = ""
            if after.startswith("files-") and not before.startswith("files-"):
                way = "; that of then was made of every prompt, which this version does up to 30,000 rows"
            raise ConfigError(
                f"{directory} cannot be continued as the same experiment: the prompts of {name} are others than it was "
                f"trained on (fingerprint {before} then, {after} now{way}). Bring them back, name another "
                f'train.run_dir, or set train.resume_changes = ["{name}"]'
            )
