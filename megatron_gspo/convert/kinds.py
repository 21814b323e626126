"""What a directory holds, and whether another may replace it."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from megatron_gspo.errors import ConfigError
from megatron_gspo.hf.elsewhere import what_is_there
from megatron_gspo.hf.names import INDEX, SINGLE, holds_weights
from megatron_gspo.megatron.checkpoint_files import HEADER, METADATA, read_header

Kind = Literal["hugging-face", "megatron"]


def kind_of(directory: Path) -> Kind:
    """Raises ConfigError for a directory that is neither."""
    if not directory.is_dir():
        raise ConfigError(f"{directory}: no such directory")
    if (directory / METADATA).is_file():
        return "megatron"
    if holds_weights(directory):
        return "hugging-face"
    raise ConfigError(
        f"{directory}: neither {SINGLE} or {INDEX} (Hugging Face) nor {METADATA} (a Megatron distributed checkpoint): "
        f"{what_is_there(directory)}"
    )


def holds_checkpoint(directory: Path) -> bool:
    """Whether ``kind_of`` knows it."""
    try:
        kind_of(directory)
    except ConfigError:
        return False
    return True


def home_of_config(directory: Path, config: Path | None, *, critic: bool = False) -> Path:
    """The directory that holds ``config.json`` and the tokenizer of a checkpoint.

    ``config`` where it is given; else the checkpoint itself; else ``model.path`` of the run that wrote it, or of its
    ``critic`` what that started from.
    """
    candidates = [config] if config else [directory]
    if not config and (directory / HEADER).is_file():
        run = read_header(directory)["extra"].get("config", {})
        path = (run.get("critic", {}).get("path") if critic else "") or run.get("model", {}).get("path")
        candidates += [Path(path)] if path else []
    for candidate in candidates:
        if (candidate / "config.json").is_file():
            return candidate
    places = ", ".join(map(str, candidates))
    raise ConfigError(f"{directory}: no config.json in {places}: name the Hugging Face directory with --config")


def check_replaceable(destination: Path, *, overwrite: bool) -> None:
    """Raises ConfigError unless a conversion may put its result at ``destination``."""
    if not destination.exists() and not destination.is_symlink():
        return
    if not destination.is_dir() or destination.is_symlink():
        raise ConfigError(f"{destination} exists and is not a directory: name another destination")
    if not any(destination.iterdir()):
        return
    if not overwrite:
        raise ConfigError(f"{destination} exists: name another destination, or replace it with --overwrite")
    if not holds_checkpoint(destination):
        raise ConfigError(f"{destination} holds no checkpoint, so nothing replaces it: name another")
