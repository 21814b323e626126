"""Checks of what is installed and of the machine."""

from __future__ import annotations

import os

from megatron_gspo.doctor.check import Check, error, ok, warning
from megatron_gspo.doctor.facts import Facts
from megatron_gspo.doctor.machine import gib
from megatron_gspo.doctor.nodes import check_ranks
from megatron_gspo.report.text import count
from megatron_gspo.versions import TRAINER, installed, untested, untested_here


def check_versions(facts: Facts) -> Check:
    """The trainer's own packages against the tested ranges."""
    detail = ", ".join(f"{name} {installed(name) or 'missing'}" for name in TRAINER)
    problems = untested_here()
    if problems:
        return error("; ".join(problems), "install what requirements/trainer.txt names: make install")
    return ok(detail)


def check_engine_version(facts: Facts) -> Check:
    """sglang in the servers' environment, asked there: this process never imports it."""
    if facts.supervised:
        return ok("supervised fine-tuning draws no rollouts")
    if facts.config.rollout.named:
        return ok("running servers are named, which say their version themselves")
    engine = facts.engine
    assert engine is not None
    version = engine.versions.get("sglang")
    line = untested("sglang", version)
    if line:
        return error(f"{engine.python}: {line}", "run `make install`, or set rollout.server_python")
    return ok(f"sglang {version} in {engine.python}")


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
