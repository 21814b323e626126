"""Environments as ``packages.py`` finds them: this process's own, and that of the servers, which is asked."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from packaging.requirements import InvalidRequirement, Requirement

from megatron_gspo.doctor import packages
from megatron_gspo.errors import DependencyError


@dataclass(frozen=True)
class Environment:
    """What one Python has."""

    python: str
    versions: Mapping[str, str]
    """Package -> version, of those in ``packages.PACKAGES`` that are there."""
    nccl: str = ""
    """The version of the NCCL that torch brought; empty where none did."""
    cuda: str = ""
    """What torch was built for; empty for a CPU."""
    wants: tuple[str, ...] = field(default=(), repr=False)
    """The requirements of its SGLang."""

    def text(self) -> str:
        """ "torch 2.14.1, triton 3.8.0, NCCL 2.30.7, CUDA 13.0"."""
        parts = [f"{name} {self.versions[name]}" for name in ("torch", "triton") if name in self.versions]
        parts += [f"NCCL {self.nccl}"] if self.nccl else []
        return ", ".join([*parts, f"CUDA {self.cuda}" if self.cuda else "for a CPU"])

    def wanted(self, package: str) -> str:
        """What its SGLang asks of a package, as a specifier; empty where it asks nothing."""
        for text in self.wants:
            try:
                need = Requirement(text)
            except InvalidRequirement:
                continue
            if need.name == package and need.marker is None:
                return str(need.specifier)
        return ""


def own_environment() -> Environment:
    """Of this process."""
    return _environment(sys.executable, packages.look())


def environment_of(python: Path) -> Environment:
    """Of another Python, asked there. Raises DependencyError with what went wrong."""
    clean = {key: value for key, value in os.environ.items() if key not in ("PYTHONPATH", "PYTHONHOME")}
    try:
        done = subprocess.run(
            [str(python), "-I", packages.__file__],
            capture_output=True,
            text=True,
            errors="replace",
            timeout=30,
            env=clean,
            check=False,
        )
    except (OSError, subprocess.TimeoutExpired) as caught:
        raise DependencyError(f"{python}: cannot be run: {caught}") from None
    if done.returncode:
        last = (done.stderr.strip().splitlines() or [f"exit status {done.returncode}"])[-1]
        raise DependencyError(f"{python} does not say what it has ({last})")
    try:
        return _environment(str(python), json.loads(done.stdout))
    except (ValueError, KeyError, TypeError):
        raise DependencyError(f"{python} does not say what it has, but {done.stdout[:80]!r}: is it a Python?") from None


def _environment(python: str, said: Mapping[str, Any]) -> Environment:
    return Environment(python, said["versions"], said["nccl"], said["cuda"], tuple(said["wants"]))
