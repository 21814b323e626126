"""What a comparison runs: arms, seeds, and the configuration of each cell; resolved before anything starts."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_gspo.algorithm.base import Algorithm, algorithm_class
from megatron_gspo.algorithm.catalog import policy_losses
from megatron_gspo.config import PlacementConfig, RunConfig, parse, read
from megatron_gspo.errors import ConfigError, UserError

VERSION = 1
REPLAY = ("off", "r2", "r3")
CELL = {
    "train": {"checkpoint_every": 0, "save_hf": False, "tensorboard": False, "wandb": False},
}
"""What a cell is not for; an override brings it back."""
OURS = {
    "algorithm.name": "--losses",
    "replay.mode": "--replay",
    "model.path": "--cold-start",
    "train.seed": "--seeds and --first-seed",
    "train.run_dir": "--out",
    "train.resume": "starting the same command again",
    "train.overwrite": "another --out",
}
"""Settings that the comparison gives its cells -> what decides them."""
WHERE = frozenset(
    {
        "train.run_dir",
        "sync.directory",
        *(f"rollout.{name}" for name in ("servers", "local_servers", "server_python", "server_start_s")),
        *(f"placement.{name}" for name in PlacementConfig.model_fields),
        *(f"rollout.{name}" for name in ("concurrency", "timeout_s", "retries")),
        *(f"reward.{name}" for name in ("timeout_s", "concurrency")),
    }
)
"""Where and how fast cells run: may differ between starts of one comparison."""
CLIPS = ("algorithm.clip_low", "algorithm.clip_high")
VARIES = frozenset({*OURS, *CLIPS})


@dataclass(frozen=True)
class Request:
    """What was asked for on the command line."""

    config: Path
    out: Path
    losses: tuple[str, ...]
    replay: tuple[str, ...] = ("off",)
    seeds: int = 4
    first_seed: int = 0
    cold_starts: tuple[str, ...] = ()
    """Hugging Face directories; ``model.path`` when empty."""
    dense_twins: tuple[str, ...] = ()
    """Hugging Face directories of dense models, run with every loss and without replay."""
    overrides: tuple[str, ...] = ()
    """``section.key=value`` for every cell, ``LOSS:section.key=value`` for those of one loss."""
    sweep: str = ""
    """``section.key=first:last:count``: every arm at each of so many values, spaced evenly in the log."""


@dataclass(frozen=True)
class Sweep:
    """A setting that every arm is run at several values of."""

    setting: str
    values: tuple[float, ...]


@dataclass(frozen=True)
class Arm:
    """One way to train: what its cells share, apart from their seeds."""

    loss: str
    replay: str
    dense: bool = False
    value: float | None = None
    """Of the setting that is swept."""

    @property
    def family(self) -> str:
        """The arm's name without the value that is swept."""
        return f"{self.loss}-{'dense' if self.dense else self.replay}"

    @property
    def name(self) -> str:
        """In directories and on the page."""
        return self.family if self.value is None else f"{self.family}-{self.value:g}"


@dataclass(frozen=True)
class Cell:
    """One run: an arm at a seed."""

    arm: Arm
    seed: int
    cold_start: str
    config: RunConfig
    out: Path

    @property
    def name(self) -> str:
        """In messages."""
        return f"{self.arm.name}, seed {self.seed}"

    @property
    def run_dir(self) -> Path:
        """Where its run writes."""
        return Path(self.config.train.run_dir)

    @property
    def digest_file(self) -> Path:
        """Written when the cell is finished; not before."""
        return self.run_dir.with_name(self.run_dir.name + ".json")

    @property
    def log_file(self) -> Path:
        """What the cell's ranks printed."""
        return self.run_dir.with_name(self.run_dir.name + ".log")

    @property
    def finished(self) -> bool:
        """Whether its digest is there."""
        return self.digest_file.is_file()


@dataclass(frozen=True)
class Plan:
    """The whole comparison."""

    out: Path
    base: RunConfig
    arms: tuple[Arm, ...]
    cells: tuple[Cell, ...]
    """Seed by seed, so that every arm has about as many when it is stopped."""
    record: dict[str, Any]
    """``compare.json``, but for when and where."""
    source: Path
    """The TOML file of what all cells share."""


def make_plan(request: Request) -> Plan:
    """Resolves every cell. Raises ConfigError (LayoutError) naming the arm whose configuration is wrong."""
    _check(request)
    common = [text for text in request.overrides if _loss_of(text) is None]
    base = parse(
        _with_cell_settings(read(request.config)), str(request.config), [*common, f'train.run_dir="{request.out}"']
    )
    sweep = parse_sweep(request.sweep)
    arms = tuple(_arms(request, sweep))
    own = {loss: [_override(text) for text in request.overrides if _loss_of(text) == loss] for loss in request.losses}
    starts = request.cold_starts or (base.model.path,)
    cells = []
    for seed in range(request.first_seed, request.first_seed + request.seeds):
        for arm in arms:
            models = request.dense_twins if arm.dense else starts
            changes = own[arm.loss] if sweep is None else [*own[arm.loss], f"{sweep.setting}={arm.value!r}"]
            cells.append(_cell(request.out, base, arm, seed, models[seed % len(models)], changes))
    return Plan(request.out, base, arms, tuple(cells), _record(request, sweep, base, arms, cells), request.config)


def parse_sweep(text: str) -> Sweep | None:
    """``optimizer.lr=1e-3:4e-3:3`` is 0.001, 0.002 and 0.004, to four digits; None for "". Raises ConfigError."""
    if not text:
        return None
    setting, _, ends = text.partition("=")
    try:
        first, last, count = (kind(part) for kind, part in zip((float, float, int), ends.split(":"), strict=True))
        if not (0 < first < last < float("inf") and 2 <= count <= 50):
            raise ValueError
    except ValueError:
        raise ConfigError(
            f"--sweep {text}: it must be section.key=FIRST:LAST:COUNT, 0 < FIRST < LAST and 2 to 50 values, as in "
            f"optimizer.lr=5e-4:3e-3:6"
        ) from None
    if setting.strip() in OURS:
        raise ConfigError(f"--sweep {text}: {setting} is decided by {OURS[setting.strip()]}")
    low, high = math.log(first), math.log(last)  # their ratio may be above what a number holds
    between = [math.exp(low + (high - low) * i / (count - 1)) for i in range(1, count - 1)]
    values = [float(f"{value:.4g}") for value in (first, *between, last)]
    if len(set(values)) < count:
        raise ConfigError(f"--sweep {text}: to four digits its {count} values are not {count} different ones")
    return Sweep(setting.strip(), tuple(values))


def check_cells(plan: Plan) -> None:
    """Reads what the cells will read, as ``train`` does before it starts: each model once an arm. Raises UserError."""
    from megatron_gspo.config.inputs import check_inputs
    from megatron_gspo.rollout.sglang.launcher import find_server_python
    from megatron_gspo.runs.launch import check_before_start

    for cell in {(cell.arm, cell.cold_start): cell for cell in plan.cells}.values():
        with _named(cell.arm.name):
            check_inputs(cell.config, plan.source)
            check_before_start(cell.config)
    if plan.base.rollout.servers_from:
        raise ConfigError(
            f"rollout.servers_from = {plan.base.rollout.servers_from}: cells that run at a time would share the "
            f"servers; name them in rollout.servers, or have each cell start its own"
        )
    if not plan.base.rollout.servers:
        find_server_python(plan.base.rollout.server_python)


def agree(plan: Plan, existing: Mapping[str, Any]) -> None:
    """Raises ConfigError, listing what differs, unless ``plan`` is the comparison of ``existing`` (a ``compare.json``).

    Seeds may differ: more of them may come later, and fewer may be asked for.
    """
    try:
        then, now = _identity(existing), _identity(plan.record)
    except (AttributeError, KeyError, TypeError) as error:
        raise ConfigError(f"{plan.out}/compare.json is no comparison's plan: {type(error).__name__}: {error}") from None
    differences = [
        f"{name} was {then.get(name)!r} and is {now.get(name)!r}"
        for name in dict.fromkeys([*then, *now])
        if then.get(name) != now.get(name)
    ]
    if differences:
        raise ConfigError(
            f"{plan.out} holds another comparison, whose cells would not compare with these: "
            f"{'; '.join(differences[:8])}{' ...' if len(differences) > 8 else ''}. "
            f"Set them back, or name another --out"
        )


def _identity(record: Mapping[str, Any]) -> dict[str, Any]:
    """What makes two comparisons the same, flat: without seeds, and without what is about this start."""
    flat: dict[str, Any] = {name: record.get(name) for name in ("version", "losses", "replay", "cold_starts")}
    flat |= {name: record.get(name) for name in ("dense_twins", "sweep")}
    flat |= {name: value for name, value in _all_settings(record).items() if name not in WHERE}
    flat |= {f"{arm['name']}: {key}": value for arm in record.get("arms", ()) for key, value in arm["settings"].items()}
    return flat | {f"versions.{name}": value for name, value in record.get("versions", {}).items()}


def _all_settings(record: Mapping[str, Any]) -> dict[str, Any]:
    """A plan's settings. One that is younger than the plan had its default, which is what there was before it."""
    config = record.get("config", {})
    with contextlib.suppress(ConfigError):  # of a version with other settings, which are compared as they stand
        config = parse(config).model_dump(mode="json")
    return flatten(config)


def flatten(tree: Mapping[str, Any]) -> dict[str, Any]:
    """Sections of settings -> "section.key" -> value."""
    return {f"{section}.{key}": value for section, settings in tree.items() for key, value in settings.items()}


def _check(request: Request) -> None:
    for name, values, known in (("--losses", request.losses, policy_losses()), ("--replay", request.replay, REPLAY)):
        unknown = [value for value in values if value not in known]
        if unknown or not values or len(set(values)) < len(values):
            raise ConfigError(f"{name} {','.join(values)}: name each of {', '.join(known)} at most once")
    if request.seeds < 1 or request.first_seed < 0:
        raise ConfigError(
            f"--seeds {request.seeds} --first-seed {request.first_seed}: seeds count from 0, one at least"
        )
    for text in request.overrides:
        loss, setting = _loss_of(text), _override(text).partition("=")[0].strip()
        if loss is not None and loss not in request.losses:
            raise ConfigError(f"{text!r}: --losses {','.join(request.losses)} has no {loss}")
        if setting == "model.path" and loss is None and not request.cold_starts:
            continue  # the one cold start
        if setting and setting == request.sweep.partition("=")[0].strip():
            raise ConfigError(f"{text!r}: {setting} differs from cell to cell, and is decided by --sweep")
        if setting in OURS:
            raise ConfigError(f"{text!r}: {setting} differs from cell to cell, and is decided by {OURS[setting]}")


def _arms(request: Request, sweep: Sweep | None) -> Iterator[Arm]:
    for loss in request.losses:
        for value in sweep.values if sweep else (None,):
            yield from (Arm(loss, mode, value=value) for mode in request.replay)
            if request.dense_twins:
                yield Arm(loss, "off", dense=True, value=value)


def _cell(out: Path, base: RunConfig, arm: Arm, seed: int, model: str, overrides: Sequence[str]) -> Cell:
    """The base configuration with what the arm and the seed change.

    What only the base's own loss has, a clip range among it, is not another one's. A dense model
    has no router to put noise on, and no routes.
    """
    tree = base.model_dump(mode="json", exclude_none=True)
    if arm.loss != base.algorithm.name:
        common = algorithm_class(arm.loss).model_fields.keys() & Algorithm.model_fields.keys()
        common &= base.algorithm.model_fields_set  # defaults are each loss's own: the credit of dr-grpo, for one
        tree["algorithm"] = {name: value for name, value in tree["algorithm"].items() if name in common}
    tree["algorithm"]["name"] = arm.loss
    tree["replay"]["mode"] = arm.replay
    tree["model"]["path"] = model
    run_dir = out / "cells" / arm.name / f"seed_{seed:03d}"
    tree["train"] |= {"seed": seed, "run_dir": str(run_dir), "resume": True, "overwrite": False}
    if arm.dense:
        tree["sync"]["router_noise"] = 0.0
        tree["replay"].pop("engine_routes_every", None)
    with _named(arm.name):
        return Cell(arm, seed, model, parse(tree, f"seed {seed}", overrides), out)


def _record(
    request: Request, sweep: Sweep | None, base: RunConfig, arms: Sequence[Arm], cells: Sequence[Cell]
) -> dict[str, Any]:
    from megatron_gspo.report.manifest import versions

    first = {arm: next(cell.config for cell in cells if cell.arm == arm) for arm in arms}
    return {
        "version": VERSION,
        "config": base.model_dump(mode="json"),
        "losses": list(request.losses),
        "replay": list(request.replay),
        "seeds": [*range(request.first_seed, request.first_seed + request.seeds)],
        "cold_starts": list(request.cold_starts or (base.model.path,)),
        "dense_twins": list(request.dense_twins),
        "overrides": list(request.overrides),
        **({"sweep": {"setting": sweep.setting, "values": list(sweep.values)}} if sweep else {}),
        "arms": [
            {
                "name": arm.name,
                "loss": arm.loss,
                "replay": arm.replay,
                "dense": arm.dense,
                **({} if arm.value is None else {"family": arm.family, "value": arm.value}),
                "settings": _settings(first[arm], base),
            }
            for arm in arms
        ],
        "versions": versions(None),
    }


def _settings(config: RunConfig, base: RunConfig) -> dict[str, Any]:
    """What an arm sets otherwise than the base, and its clip range in any case."""
    own, common = (flatten(tree.model_dump(mode="json")) for tree in (config, base))
    differing = {name: value for name, value in own.items() if value != common.get(name) and name not in VARIES}
    clip_range = dict(zip(CLIPS, config.algorithm.clip_range() or (), strict=False))
    return {"algorithm.name": config.algorithm.name, "replay.mode": config.replay.mode} | differing | clip_range


def _with_cell_settings(tree: dict[str, Any]) -> dict[str, Any]:
    """The file's settings under those of ``CELL``."""
    merged = {**tree}
    for section, settings in CELL.items():
        merged[section] = {**tree.get(section, {}), **settings}
    return merged


@contextlib.contextmanager
def _named(arm: str) -> Iterator[None]:
    """Puts the arm's name in front of what is wrong with its configuration."""
    try:
        yield
    except UserError as error:
        raise type(error)(f"arm {arm}: {error}") from None


def _loss_of(override: str) -> str | None:
    """The loss before the colon of ``LOSS:section.key=value``; None without one."""
    name, _, _ = override.partition("=")
    loss, colon, _ = name.partition(":")
    return loss.strip() if colon else None


def _override(override: str) -> str:
    return override if _loss_of(override) is None else override.partition(":")[2]
