"""Checks of what is installed and of the machine."""

from __future__ import annotations

import importlib.util
import os
import subprocess
from pathlib import Path

from megatron_gspo.doctor.check import Check, error, ok, warning
from megatron_gspo.doctor.facts import Facts
from megatron_gspo.doctor.machine import gib
from megatron_gspo.doctor.nodes import check_ranks
from megatron_gspo.errors import UserError
from megatron_gspo.kernels.choice import choose_kernels
from megatron_gspo.report.text import count
from megatron_gspo.rollout.sglang.launcher import find_server_python
from megatron_gspo.versions import TRAINER, installed, untested, untested_here

ASK_VERSION = "from importlib.metadata import version; print(version('sglang'))"


def check_versions(facts: Facts) -> Check:
    """The trainer's own packages against the tested ranges."""
    detail = ", ".join(f"{name} {installed(name) or 'missing'}" for name in TRAINER)
    problems = untested_here()
    if problems:
        return error("; ".join(problems), "install what requirements/trainer.txt names: make install")
    return ok(detail)


def check_kernels(facts: Facts) -> Check:
    """Optional kernels. apex is known by what Megatron uses of it: the registry has another package of that name."""
    names = {"transformer-engine": "transformer_engine", "triton": "triton"}
    have = {package: installed(package) or "" for package, module in names.items() if _has_module(module)}
    if _has_fused_adam():
        have["apex"] = "with optimizers.FusedAdam"
    found = ", ".join(f"{package} {version}".strip() for package, version in have.items()) or "none"
    absent = ", ".join(name for name in ("transformer-engine", "apex", "triton") if name not in have)
    stranger = " (a package named apex is installed, but not NVIDIA's)" if _is_other_apex() else ""
    model = facts.config.model
    text = f"optional kernels: {found}{f'; without {absent}' if absent else ''}{stranger}"
    text += f"; {choose_kernels(model.kernels, model.dtype)}"
    if stranger:
        return warning(text, "pip uninstall apex, or build NVIDIA's from source")
    return ok(text)


def check_engine_version(facts: Facts) -> Check:
    """sglang in the servers' environment, asked there: this process never imports it."""
    if facts.supervised:
        return ok("supervised fine-tuning draws no rollouts")
    if facts.config.rollout.servers:
        return ok("rollout.servers names running servers, which say their version themselves")
    try:
        python = find_server_python(facts.config.rollout.server_python)
    except UserError as caught:
        return error(str(caught), "rollout.server_python")
    version, problem = _version_in(python)
    line = untested("sglang", version)
    if line:
        return error(f"{python}: {problem or line}", "run `make install`, or set rollout.server_python")
    return ok(f"sglang {version} in {python}")


def _version_in(python: Path) -> tuple[str | None, str]:
    """(version of sglang in the environment of ``python``, what went wrong)."""
    environment = {key: value for key, value in os.environ.items() if key not in ("PYTHONPATH", "PYTHONHOME")}
    try:
        done = subprocess.run(
            [str(python), "-I", "-c", ASK_VERSION],
            capture_output=True,
            text=True,
            errors="replace",
            timeout=30,
            env=environment,
            check=False,
        )
    except (OSError, subprocess.TimeoutExpired) as caught:
        return None, f"cannot be run: {caught}"
    if done.returncode:
        last = (done.stderr.strip().splitlines() or [f"exit status {done.returncode}"])[-1]
        return None, f"has no sglang ({last})"
    return done.stdout.strip(), ""


def check_devices(facts: Facts) -> list[Check]:
    """Accelerators, or cores, against the ranks of this machine; and whether its likes are full."""
    here = _check_gpus(facts) if facts.machine.gpus else _check_cores(facts)
    return [here, *filter(None, [check_ranks(facts)])]


def _check_gpus(facts: Facts) -> Check:
    machine, ranks, nodes = facts.machine, facts.ranks_per_node, facts.nodes
    gpus = len(machine.gpus)
    sizes = ", ".join(f"{gib(free)} of {gib(total)} free" for free, total in machine.gpus)
    text = f"{count(ranks, 'rank')}, {count(gpus, 'GPU')} ({sizes})"
    if ranks > gpus:
        elsewhere = "several machines under torchrun, and here --ranks for their world size"
        fix = f"--ranks-per-node {gpus}" if facts.asked_per_node else f"a smaller layout in [parallel]; or {elsewhere}"
        return error(f"{text}: nccl needs a GPU a rank", fix)
    return ok(text + (f" on each of {nodes} machines like this one" if nodes > 1 else ""))


def _check_cores(facts: Facts) -> Check:
    """A CPU has no limit but its patience."""
    machine = facts.machine
    setting = os.environ.get("OMP_NUM_THREADS")
    text = f"no GPU; {count(machine.cores, 'core')}, {gib(machine.free_memory)} free"
    ranks, nodes = facts.ranks_per_node, facts.nodes
    text += f"; {count(ranks, 'rank')}, {count(facts.local_servers, 'server')}"
    text += f" on each of {nodes} machines like this one" if nodes > 1 else ""
    try:
        threads = int(setting or 1)
    except ValueError:
        return warning(f"{text}; OMP_NUM_THREADS = {setting!r} is no number", "OMP_NUM_THREADS=1")
    text += f", {count(threads, 'thread')} a rank" + (
        "" if setting else " (train sets OMP_NUM_THREADS=1 when it is unset)"
    )
    if threads * ranks > machine.cores and threads > 1:
        return warning(f"{text}: {threads * ranks} threads spin on {machine.cores} cores", "OMP_NUM_THREADS=1")
    if ranks > 2 * machine.cores:
        there = f"ask doctor on one of the {nodes} nodes, if they are not like this machine; or fewer --ranks-per-node"
        fix = there if nodes > 1 else "a smaller layout in [parallel]"
        return warning(f"{text}: slow, though not wrong", fix)
    return ok(text)


def _has_module(name: str) -> bool:
    try:
        return importlib.util.find_spec(name) is not None
    except (ImportError, ValueError):
        return False


def _apex_directories() -> list[Path]:
    spec = importlib.util.find_spec("apex") if _has_module("apex") else None
    return [Path(place) for place in (spec.submodule_search_locations if spec else None) or ()]


def _has_fused_adam() -> bool:
    """Whether NVIDIA's apex is there, without importing a package that may be anything."""
    return any((place / "optimizers" / "fused_adam.py").is_file() for place in _apex_directories())


def _is_other_apex() -> bool:
    return _has_module("apex") and not _has_fused_adam()
