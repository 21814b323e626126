"""What an evaluation is of: a Hugging Face directory, with the configuration that says how it is asked."""

from __future__ import annotations

import contextlib
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, get_args

from megatron_gspo.config import ModelConfig, RewardServerConfig, RunConfig, load, parse
from megatron_gspo.errors import ConfigError
from megatron_gspo.hf.catalog import read_config
from megatron_gspo.megatron.checkpoint_files import LATEST, checkpoints_in, latest_in
from megatron_gspo.runs.export import export_checkpoint
from megatron_gspo.train.reward import may_ask_own_servers

NOTHING_IS_TRAINED = ('train.run_dir="(evaluation)"', "train.microbatch_tokens=2147483647")
"""Settings of training that would refuse longer responses, or prompts in the run's own directory."""
WHOLE_FILE = 2**31 - 1
LIMITS = ("max_prompt_tokens", "max_response_tokens")
"""Of ``rollout``. A configuration, and a run, have them; a model by itself does not."""


@dataclass(frozen=True)
class Subject:
    """A policy to evaluate."""

    kind: Literal["configuration", "run", "model"]
    argument: Path
    """As the user named it."""
    config: RunConfig
    """``data.eval_path``, ``eval``, ``rollout``, ``reward`` and ``train.seed`` are what is read of it."""
    model: Path | None
    """Hugging Face directory; None for a checkpoint until it is exported."""
    checkpoint: Path | None = None
    step: int | None = None
    """Optimizer steps that the checkpoint has taken."""
    open_limits: frozenset[str] = frozenset()
    """Settings of ``LIMITS`` that nobody has named: ``lengths.fitting`` finds values for them."""

    def describe(self) -> str:
        """The directory that holds the weights."""
        return str(self.checkpoint or self.model)


def of_configuration(path: Path, overrides: Sequence[str], *, suites: bool = False) -> Subject:
    """The policy that a TOML file starts from. ``suites``: it needs no held-out prompts. Raises ConfigError."""
    config = _asked(load(path, [*NOTHING_IS_TRAINED, *overrides]), path, suites)
    return Subject("configuration", path, config, Path(config.model.path))


def of_run(
    path: Path, overrides: Sequence[str], *, checkpoint: str | None, finished: bool, suites: bool = False
) -> Subject:
    """A run's ``hf/`` when it is finished; else, or when ``checkpoint`` names one, a checkpoint. ``suites``: it needs
    no held-out prompts. Raises ConfigError."""
    config = _asked(load(path / "config.toml", [*NOTHING_IS_TRAINED, *overrides]), path, suites)
    if checkpoint is None and finished and (path / "hf" / "config.json").is_file():
        return Subject("run", path, config, path / "hf")
    return Subject("run", path, config, None, find_checkpoint(path / "checkpoints", checkpoint or LATEST))


def of_model(path: Path, overrides: Sequence[str], *, suites: bool = False) -> Subject:
    """A Hugging Face directory, in the dtype that its ``config.json`` names. ``overrides`` must name the rest, unless
    ``suites`` do.

    Raises ConfigError.
    """
    named = {override.partition("=")[0].strip() for override in overrides}
    if not suites and not {"data.eval_path", "reward.function"} <= named:
        raise ConfigError(f"{path} is a Hugging Face directory: it needs --prompts FILE and --reward NAME, or --suite")
    tree: dict[str, Any] = {
        "model": {"path": str(path)} | _dtype(path),
        "data": {"path": "(none)"},
        "train": {},
        "eval": {"prompts": WHOLE_FILE},
    }
    config = parse(tree, str(path), [*NOTHING_IS_TRAINED, *overrides])
    open_limits = frozenset(name for name in LIMITS if f"rollout.{name}" not in named)
    return Subject("model", path, config, path, open_limits=open_limits)


def find_checkpoint(directory: Path, name: str) -> Path:
    """A run's whole checkpoint by name; "latest" is the one to continue from. Raises ConfigError or WeightError."""
    if name == LATEST and (latest := latest_in(directory)):
        name = latest.name
    whole = {path.name: path for path in checkpoints_in(directory).values()}
    if name not in whole:
        raise ConfigError(f"{directory}: no checkpoint {name!r} (there: {', '.join(whole) or 'none'})")
    return whole[name]


@contextlib.contextmanager
def exported(subject: Subject, directory: Path) -> Iterator[Subject]:
    """The subject with its Hugging Face directory: a checkpoint's is written under ``directory`` and removed again."""
    if subject.checkpoint is None:
        yield subject
        return
    directory.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="exported-", dir=directory) as temporary:
        model = Path(temporary) / "hf"
        step = export_checkpoint(subject.config, subject.checkpoint, model)
        yield replace(subject, model=model, step=step)


def _asked(config: RunConfig, path: Path, suites: bool) -> RunConfig:
    """What an evaluation takes of a run's configuration. Servers of a reward that this one does not ask (it has
    ``--reward`` of its own, or suites, which have theirs) are not started, and get no cards. Raises ConfigError."""
    if suites or not may_ask_own_servers(config.reward):
        config = config.model_copy(update={"reward_server": RewardServerConfig()})
    if not config.data.eval_path and not suites:
        raise ConfigError(f"{path} names no held-out prompts (data.eval_path): give --prompts FILE, or --suite NAME")
    return config


def _dtype(path: Path) -> dict[str, str]:
    """``model.dtype`` as ``config.json`` has it; the default where it has none that is supported."""
    stored = read_config(path)
    dtype = str(stored.get("dtype") or stored.get("torch_dtype"))
    return {"dtype": dtype} if dtype in get_args(ModelConfig.model_fields["dtype"].annotation) else {}
