"""The algorithms that a configuration can name, without importing torch.

Adding one is a file and an entry here (docs/extending.md shows both); one of your own needs no entry.
"""

from __future__ import annotations

import importlib
import importlib.util
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

from megatron_gspo.errors import ConfigError

ALGORITHMS: dict[str, str] = {
    "gspo": "megatron_gspo.algorithm.gspo:Gspo",
    "gspo-token": "megatron_gspo.algorithm.gspo_token:GspoToken",
    "grpo": "megatron_gspo.algorithm.grpo:Grpo",
    "ppo": "megatron_gspo.algorithm.ppo:Ppo",
    "dapo": "megatron_gspo.algorithm.dapo:Dapo",
    "dr-grpo": "megatron_gspo.algorithm.dr_grpo:DrGrpo",
    "cispo": "megatron_gspo.algorithm.cispo:Cispo",
    "gmpo": "megatron_gspo.algorithm.gmpo:Gmpo",
    "sapo": "megatron_gspo.algorithm.sapo:Sapo",
    "luspo": "megatron_gspo.algorithm.luspo:Luspo",
    "vespo": "megatron_gspo.algorithm.vespo:Vespo",
    "dppo": "megatron_gspo.algorithm.dppo:Dppo",
    "reinforce++": "megatron_gspo.algorithm.reinforce:ReinforcePlusPlus",
    "reinforce++-baseline": "megatron_gspo.algorithm.reinforce:ReinforcePlusPlusBaseline",
    "rloo": "megatron_gspo.algorithm.reinforce:Rloo",
    "sft": "megatron_gspo.algorithm.sft:Sft",
}
"""Name -> ``module:Class``, imported when it is named."""


def find(name: object) -> Any:
    """What a name stands for: an entry of ``ALGORITHMS``, ``package.module:Class`` or ``path/to/file.py:Class``.

    Raises ConfigError when there is no such thing.
    """
    if not isinstance(name, str):
        raise ConfigError(f'name = {name!r}: it must be a string, as in name = "gspo"')
    where, colon, attribute = ALGORITHMS.get(name, name).rpartition(":")
    if not colon:
        raise ConfigError(
            f'name = "{name}" is no algorithm (known: {", ".join(ALGORITHMS)}; one of your own is package.module:Class '
            f"or path/to/file.py:Class)"
        )
    try:
        return getattr(_module(where), attribute)
    except (ImportError, AttributeError, OSError, SyntaxError) as error:
        raise ConfigError(f'name = "{name}": {type(error).__name__}: {error}') from None


def policy_losses() -> list[str]:
    """Names of the entries that learn from drawn responses."""
    return [name for name in ALGORITHMS if find(name).draws_responses]


def _module(where: str) -> ModuleType:
    if not where.endswith(".py"):
        return importlib.import_module(where)
    path = Path(where).resolve()
    name = f"megatron_gspo_algorithm_{path.stem}"
    loaded = sys.modules.get(name)
    if loaded is not None and loaded.__file__ == str(path):  # one class, however often it is named
        return loaded
    spec = importlib.util.spec_from_file_location(name, path)
    if spec is None or spec.loader is None:
        raise ImportError(f"{where} is no Python file")
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    try:
        spec.loader.exec_module(module)
    except BaseException:
        del sys.modules[name]
        raise
    return module
