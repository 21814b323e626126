"""Files and directories that a configuration reads: which are not there, and which command makes them.

A maker is found in two places. A comment in the TOML file names it,

    # .cache/mine is made by: python prepare.py .cache/mine

or the path lies in the ``train.run_dir`` of another TOML file in the same directory, as a cold start's ``hf`` does.
What that command itself needs and lacks is made first.
"""

from __future__ import annotations

import os
import re
import shlex
import tomllib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from megatron_gspo.config.run import RunConfig
from megatron_gspo.errors import DataError

MODELS = ("model.path", "algorithm.reference")
INPUTS = ("model.path", "algorithm.reference", "data.path", "data.eval_path")
"""Settings that name what a run reads."""
MADE_BY = re.compile(r"^[ \t]*#[ \t]*(?P<path>\S+) is made by:?[ \t]+(?P<command>\S.*?)[ \t]*$", re.MULTILINE)
HUB_NAME = re.compile(r"[A-Za-z0-9][\w.-]{0,95}/[A-Za-z0-9][\w.-]{0,95}")
MOST_FILES = 200
"""TOML files of a directory that are read in search of a maker."""


def check_inputs(config: RunConfig, source: Path, names: Sequence[str] = INPUTS) -> None:
    """Raises DataError for a missing input of the TOML file ``source`` when it is known how to come by it.

    One of which nothing is known is left to whoever reads it, who says in his own words what is wrong.
    """
    for name, path in missing(config, names).items():
        if hint := advice(path, source, is_model=name in MODELS):
            raise DataError(f"{name} = {path}: {lack(path, name)} -> {hint}")


def missing(config: RunConfig, names: Sequence[str] = INPUTS) -> dict[str, str]:
    """Setting -> path, of the inputs that this configuration reads and that are not there."""
    supervised = not config.algorithm.draws_responses
    read = {
        "model.path": config.model.path,
        "algorithm.reference": config.algorithm.reference if config.algorithm.uses_reference else "",
        "critic.path": config.critic.path if config.algorithm.uses_critic else "",
        "data.path": config.data.path,
        "data.eval_path": "" if supervised else config.data.eval_path,
    }
    if "data.path" in names and config.data.sources:
        names = [*(name for name in names if name != "data.path"), *config.data.paths]
        read |= config.data.paths
    return {name: read[name] for name in names if read[name] and not _is_there(read[name], name in MODELS)}


def lack(path: str, name: str) -> str:
    """What is wrong with the missing input ``path`` of the setting ``name``."""
    if name not in MODELS:
        return "no such data file"
    if os.path.isfile(path):
        return "a file, where a model's directory is needed"
    return "no config.json in it" if _is_there(path, is_model=False) else "no such model directory"


def advice(path: str, source: Path, *, is_model: bool = False) -> str:
    """What to do about a path of ``source`` that is not there; empty where nothing is known."""
    if commands := list(dict.fromkeys(_commands(path, source, frozenset()))):
        return f"make it: {' && '.join(commands)}"
    if not Path(path).is_absolute():
        for directory in _real(source).parents:
            if _is_there(str(directory / path), is_model):
                return f"paths are relative to the working directory, and it is there from {directory}: cd {directory}"
    if is_model and HUB_NAME.fullmatch(path) and not Path(path).parent.exists():
        return (
            f"a directory is needed; if this is a name on the Hugging Face Hub: hf download {path} --local-dir "
            f"{Path(path).name}, and name that"
        )
    return ""


def _commands(path: str, source: Path, seen: frozenset[Path]) -> Iterator[str]:
    """The commands that make ``path``, in order; those that make what the last one needs come first."""
    text = _text(source)
    for made in MADE_BY.finditer(text):
        if _lies_in(path, made["path"]):
            yield made["command"]
            return
    for other in _neighbours(source):
        if _real(other) in seen or not _trains(other, path):
            continue
        for needed in _inputs_of(other):
            if not _is_there(needed, is_model=False):
                yield from _commands(needed, other, seen | {_real(source), _real(other)})
        yield f"megatron-gspo train {shlex.quote(str(other))}"
        return


def _neighbours(source: Path) -> list[Path]:
    own = _real(source)
    return [path for path in sorted(source.parent.glob("*.toml"))[:MOST_FILES] if _real(path) != own]


def _trains(toml: Path, path: str) -> bool:
    """Whether the run of ``toml`` writes ``path``: it lies in its run directory, and a model of it is saved."""
    train = _section(toml, "train")
    run_dir = train.get("run_dir")
    if not isinstance(run_dir, str) or not run_dir or not _lies_in(path, run_dir):
        return False
    in_hf = _lies_in(path, f"{run_dir}/hf")
    return not in_hf or train.get("save_hf", True) is True


def _inputs_of(toml: Path) -> list[str]:
    """``model.path`` and ``data.path`` as they stand in a TOML file."""
    values = (_section(toml, name).get("path") for name in ("model", "data"))
    return [value for value in values if isinstance(value, str) and value]


def _section(toml: Path, name: str) -> dict[str, Any]:
    try:
        section = tomllib.loads(_text(toml)).get(name)
    except (ValueError, RecursionError):  # somebody else's file, of which nothing is asked but a hint
        return {}
    return section if isinstance(section, dict) else {}


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, ValueError):
        return ""


def _lies_in(path: str, directory: str) -> bool:
    try:
        inside, around = _real(path), _real(directory)
    except (OSError, ValueError):  # a null character
        return False
    return inside == around or around in inside.parents


def _real(path: str | Path) -> Path:
    """Without links; ``Path.resolve`` raises for links in a circle, and this leaves them."""
    return Path(os.path.realpath(path))


def _is_there(path: str, is_model: bool) -> bool:
    """A model directory is there when its ``config.json`` is."""
    try:
        return (Path(path) / "config.json").is_file() if is_model else Path(path).exists()
    except (OSError, ValueError):
        return False
