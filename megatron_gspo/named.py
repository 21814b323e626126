"""What a configuration names by where it lies: ``package.module:attribute`` or ``path/to/file.py:attribute``."""

from __future__ import annotations

import importlib
import importlib.util
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

from megatron_gspo.errors import ConfigError


def find_named(name: str, setting: str) -> Any:
    """What ``name`` stands for, imported. Raises ConfigError, after ``setting``, for whatever keeps it from being had:
    importing runs the user's code, which may raise anything."""
    where, _, attribute = name.rpartition(":")
    try:
        return getattr(module_of(where), attribute)
    except (Exception, SystemExit) as error:
        raise ConfigError(f'{setting} = "{name}": {type(error).__name__}: {error}') from None


def module_of(where: str) -> ModuleType:
    """A module by its name; a file by its path, imported once per process, under a name that no package can have."""
    if not where.endswith(".py"):
        return importlib.import_module(where)
    path = Path(where).resolve()
    name = f"megatron_gspo_named:{path}"
    if name in sys.modules:
        return sys.modules[name]
    spec = importlib.util.spec_from_file_location(name, path)
    if spec is None or spec.loader is None:
        raise ImportError(f"{path} is not a Python file")
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # before it runs: dataclasses and pickle look their module up there
    try:
        spec.loader.exec_module(module)
    except BaseException:
        del sys.modules[name]
        raise
    return module
