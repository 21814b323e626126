"""The algorithms that a configuration can name, without importing torch.

Adding one is a file and an entry here (docs/extending.md shows both); one of your own needs no entry.
"""

from __future__ import annotations

from typing import Any

from megatron_gspo.errors import ConfigError
from megatron_gspo.named import find_named

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
    "gpg": "megatron_gspo.algorithm.gpg:Gpg",
    "clip-cov": "megatron_gspo.algorithm.covariance:ClipCov",
    "kl-cov": "megatron_gspo.algorithm.covariance:KlCov",
    "distill": "megatron_gspo.algorithm.distill:Distill",
    "sft": "megatron_gspo.algorithm.sft:Sft",
}
"""Name -> ``module:Class``, imported when it is named."""


def find(name: object) -> Any:
    """What a name stands for: an entry of ``ALGORITHMS``, ``package.module:Class`` or ``path/to/file.py:Class``.

    Raises ConfigError when there is no such thing.
    """
    if not isinstance(name, str):
        raise ConfigError(f'name = {name!r}: it must be a string, as in name = "gspo"')
    if name not in ALGORITHMS and ":" not in name:
        raise ConfigError(
            f'name = "{name}" is no algorithm (known: {", ".join(ALGORITHMS)}; one of your own is package.module:Class '
            f"or path/to/file.py:Class)"
        )
    return find_named(ALGORITHMS.get(name, name), "name")


def policy_losses() -> list[str]:
    """Names of the entries that learn from drawn responses."""
    return [name for name in ALGORITHMS if find(name).draws_responses]
