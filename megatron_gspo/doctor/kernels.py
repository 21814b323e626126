"""Checks of kernels, the trainer's and the servers': which are missing, and what each costs."""

from __future__ import annotations

import importlib.util
from pathlib import Path

from megatron_gspo.doctor.check import Check, error, ok, warning
from megatron_gspo.doctor.facts import Facts
from megatron_gspo.kernels.choice import choose_kernels
from megatron_gspo.kernels.modules import MODULES, has_module, missing_modules
from megatron_gspo.versions import installed

MAKE = "make kernels, after make install DEVICE=cuda"
TRAINERS = {
    "transformer-engine": "attention runs on torch's variable-length kernel, or sequence by sequence where that cannot",
    "apex": "the gradient of a weight outside of experts and head is written and then added, in two passes",
    "triton": "what has a Triton kernel here runs on torch's operations, in more passes over memory",
}
"""Kernels of the trainer -> what is so without them on a GPU."""
FIXES = {"transformer-engine": MAKE, "apex": MAKE, "triton": "pip install the triton that torch names"}
SERVERS = {
    "sglang-kernel": "no server starts on a GPU",
    "flashinfer-python": "sampling runs on torch, attention on Triton where FlashAttention 3 does not run",
    "torch-memory-saver": "a server cannot give its memory back while the trainer computes",
}
"""Packages of the servers -> what is so without them on a GPU."""
FIRST = "sglang-kernel"
"""The one without which nothing runs."""


def check_kernels(facts: Facts) -> list[Check]:
    """Those of this environment: what ``kernels.modules`` says of each."""
    missing = {name: missing_modules(name) for name in TRAINERS}
    have = [f"{name} {installed(name) or ''}".strip() for name, modules in missing.items() if not modules]
    absent = [name for name, modules in missing.items() if modules]
    model = facts.config.model
    text = f"optional kernels: {', '.join(have) or 'none'}" + (f"; without {', '.join(absent)}" if absent else "")
    text += f"; {choose_kernels(model.kernels, model.dtype)}"
    if _is_other_apex():
        text += " (a package named apex is installed, but not NVIDIA's)"
        return [warning(text, "pip uninstall apex, or build NVIDIA's from source")]
    if facts.machine.gpus and absent:
        return [warning(f"{_what_is_missing(name, missing[name])}: {TRAINERS[name]}", FIXES[name]) for name in absent]
    return [ok(text)]


def _what_is_missing(name: str, modules: list[str]) -> str:
    """A package, or the part that it was built without."""
    return f"{name} is missing" if modules == list(MODULES[name]) else f"{name} has no {', '.join(modules)}"


def check_server_kernels(facts: Facts) -> list[Check]:
    """Those of the environment of local servers, which a CPU server never imports."""
    engine = facts.engine
    if engine is None:
        return [ok("no server is started here")]
    have = [f"{name} {engine.versions[name]}" for name in SERVERS if name in engine.versions]
    absent = [name for name in SERVERS if name not in engine.versions]
    if not facts.machine.gpus or not absent:
        return [ok(", ".join(have) if have else "none, and a server on a CPU uses none")]
    fix = "make install DEVICE=cuda"
    return [(error if name == FIRST else warning)(f"{name} is missing: {SERVERS[name]}", fix) for name in absent]


def _apex_directories() -> list[Path]:
    spec = importlib.util.find_spec("apex") if has_module("apex") else None
    return [Path(place) for place in (spec.submodule_search_locations if spec else None) or ()]


def _is_other_apex() -> bool:
    """Whether an apex is installed that is not NVIDIA's, without importing a package that may be anything."""
    return has_module("apex") and not any(
        (place / "optimizers/fused_adam.py").is_file() for place in _apex_directories()
    )
