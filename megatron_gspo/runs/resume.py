"""Continuing a run: which checkpoint, and whether this configuration may continue it."""

from __future__ import annotations

import difflib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch.distributed as dist

from megatron_gspo.config import RunConfig
from megatron_gspo.errors import ConfigError, WeightError
from megatron_gspo.megatron.checkpoint_files import latest_in, read_header
from megatron_gspo.parallel.exchange import broadcast_object, together
from megatron_gspo.runs.experiment import RULES, as_trained, flat, rule_of
from megatron_gspo.train.progress import fingerprint

if TYPE_CHECKING:  # comparing configurations needs no Megatron
    from megatron_gspo.megatron.groups import Groups

PACKAGES = ("megatron-gspo", "torch", "megatron-core")
BESIDE_CONFIG = ("outer_step", "optimizer_step", "cursor", "config", "prompts", "versions")
"""What every run's checkpoint has in its ``extra``. Later versions have added "contents"."""
CONTENTS = {
    "model.path": "the tokenizer, its template or its stop tokens",
    "rollout.stop_tokens": "the end-of-sequence token of model.path's config.json",
    "algorithm.reference": "the reference policy",
    "reward.function": "the source of the reward",
    "data.sources": "the code of a source's reward",
}
"""Setting -> what ``experiment.contents`` hashes of it, in words."""


@dataclass(frozen=True)
class Resumption:
    """A checkpoint that this run continues from."""

    directory: Path
    extra: dict[str, Any]
    """What the run saved beside the policy: ``Progress`` and ``identity``."""
    changes: dict[str, tuple[Any, Any]]
    """Setting (or "content of SETTING", or package) -> its value (or hash) then and now, where they differ."""
    accepted: tuple[str, ...] = ()
    """Of them, those that alter numbers, and that ``train.resume_changes`` names."""

    @property
    def outer_steps(self) -> int:
        """That it has done."""
        return int(self.extra["outer_step"])

    def describe(self) -> str:
        """One line."""
        why = {name: f" ({rule_of(name).reason})" for name in self.accepted}
        changes = [f"{name} {then} -> {now}{why.get(name, '')}" for name, (then, now) in self.changes.items()]
        return f"continues from {self.directory.name}" + (f"; changed: {', '.join(changes)}" if changes else "")


def find_resumption(config: RunConfig, identity: Mapping[str, Any], groups: Groups) -> Resumption | None:
    """What to continue from; None when this run starts afresh. Collective; the first rank reads.

    Raises ConfigError when the configuration would make the continuation another experiment, WeightError when what
    ``latest`` names cannot be read.
    """
    first = dist.get_rank() == 0
    found = together(lambda: _find(config, identity) if first and config.train.resume else None, groups.world)
    return broadcast_object(found, 0, groups.world)


def identify(config: RunConfig, prompts: Mapping[str, str], contents: Mapping[str, str]) -> dict[str, Any]:
    """What makes a run this one, as JSON: kept in each checkpoint and compared on resume.

    ``prompts``: setting -> fingerprint of what was read through it; ``contents``: those of ``experiment.contents``.
    """
    versions = {name: metadata.version(name) for name in PACKAGES}
    identity = {"config": config.model_dump(mode="json"), "prompts": dict(prompts), "versions": versions}
    return identity | {"contents": dict(contents)}


def _find(config: RunConfig, identity: Mapping[str, Any]) -> Resumption | None:
    directory = latest_in(Path(config.train.run_dir) / "checkpoints")
    if directory is None:
        return None
    extra = read_header(directory)["extra"]
    missing = set(BESIDE_CONFIG) - extra.keys()
    if missing:
        raise WeightError(f"{directory}: not a run's checkpoint: its extra lacks {', '.join(sorted(missing))}")
    if extra["outer_step"] > config.train.outer_steps:
        raise ConfigError(
            f"train.outer_steps = {config.train.outer_steps}, but {directory} has done {extra['outer_step']} of them"
        )
    allowed = config.train.resume_changes
    _check_names(allowed)
    prompts = _differences(extra["prompts"], identity["prompts"])
    contents = _differences(extra.get("contents", {}), identity.get("contents", {}))
    _check_prompts(directory, prompts, allowed)
    _check_contents(directory, contents, allowed)
    then, now = as_trained(extra["config"]), flat(identity["config"])
    changes = _differences(then, now)
    altering = tuple(name for name in changes if rule_of(name).alters(then, now))
    _check_changes(directory, changes, [name for name in altering if name not in allowed])
    noted = {name: pair for name, pair in changes.items() if not name.startswith("train.resume")}
    noted |= {f"content of {name}": pair for name, pair in (prompts | contents).items()}
    return Resumption(directory, extra, noted | _differences(extra["versions"], identity["versions"]), altering)


def _differences(then: Mapping[str, Any], now: Mapping[str, Any]) -> dict[str, tuple[Any, Any]]:
    """Of what both know: a setting that one version lacks has no value to compare."""
    return {name: (then[name], now[name]) for name in now if name in then and then[name] != now[name]}


def _check_names(allowed: Sequence[str]) -> None:
    unknown = [name for name in allowed if name not in RULES and not name.startswith("algorithm.")]
    if unknown:
        close = difflib.get_close_matches(unknown[0], RULES, n=1)
        hint = f" (did you mean {close[0]}?)" if close else ""
        raise ConfigError(f'train.resume_changes: "{unknown[0]}" is no setting{hint}')


def _check_changes(directory: Path, changes: Mapping[str, tuple[Any, Any]], refused: Sequence[str]) -> None:
    if refused:
        texts = [f"{name} was {changes[name][0]!r} and is {changes[name][1]!r}" for name in refused]
        texts = [f"{text} ({rule_of(name).reason})" for text, name in zip(texts, refused, strict=True)]
        names = ", ".join(f'"{name}"' for name in refused)
        raise ConfigError(
            f"{directory} cannot be continued as the same experiment: {'; '.join(texts)}. Set it back, name another "
            f"train.run_dir, or set train.resume_changes = [{names}]"
        )


def _check_prompts(directory: Path, changes: Mapping[str, tuple[str, str]], allowed: tuple[str, ...]) -> None:
    for name, (before, after) in changes.items():
        added_or_left_out = name == "data.eval_path" and fingerprint(()) in (before, after)
        if name not in allowed and not added_or_left_out:
            which = " (the first eval.prompts of them)" if name == "data.eval_path" else ""
            way = ""
            if after.startswith("files-") and not before.startswith("files-"):
                way = "; that of then was made of every prompt, which this version does up to 30,000 rows"
            raise ConfigError(
                f"{directory} cannot be continued as the same experiment: the prompts of {name}{which} are others than "
                f"it was trained on (fingerprint {before} then, {after} now{way}). Bring them back, name another "
                f'train.run_dir, or set train.resume_changes = ["{name}"]'
            )


def _check_contents(directory: Path, changes: Mapping[str, tuple[str, str]], allowed: tuple[str, ...]) -> None:
    """What a setting names is compared by its content, where both versions know it."""
    for name, (before, after) in changes.items():
        if name not in allowed:
            raise ConfigError(
                f"{directory} cannot be continued as the same experiment: {CONTENTS[name]} (of {name}) is not what it "
                f"was trained with (sha256 {before} then, {after} now). Bring it back, name another train.run_dir, or "
                f'set train.resume_changes = ["{name}"]'
            )
