"""Check of the trainer's environment against the servers', and of both against the driver."""

from __future__ import annotations

from packaging.specifiers import SpecifierSet
from packaging.version import InvalidVersion, Version

from megatron_gspo.doctor.check import Check, error, ok, warning
from megatron_gspo.doctor.facts import Facts
from megatron_gspo.doctor.installed import Environment

INSTALL = "make install DEVICE=cuda: one torch, with its NCCL and triton, for both"
DRIVER = "a newer driver (580 or later runs CUDA 13), or a torch for an older CUDA in both environments"


def check_pair(facts: Facts) -> list[Check]:
    """One line of what both have; on GPUs, one for each thing that does not fit."""
    trainer, servers = facts.environment, facts.engine
    sides = {"the trainer's": trainer} | ({"the servers'": servers} if servers else {})
    problems = [line for side, environment in sides.items() for line in _against_driver(facts, side, environment)]
    if servers and facts.machine.gpus:
        problems += _between(facts, trainer, servers)
    text = "; ".join(f"{side} {environment.text()}" for side, environment in sides.items())
    driver = f"; a driver for CUDA {facts.machine.driver}" if facts.machine.driver else ""
    return problems or [ok(text + driver)]


def _against_driver(facts: Facts, side: str, environment: Environment) -> list[Check]:
    """A driver runs what was built for its own major version of CUDA, or an older one."""
    driver, torch = facts.machine.driver, f"{side} torch {environment.versions.get('torch', '(missing)')}"
    if not driver:
        return []
    if not environment.cuda:
        return [warning(f"{torch} is built for a CPU, on a machine whose driver runs CUDA {driver}", INSTALL)]
    if int(environment.cuda.split(".")[0]) > int(driver.split(".")[0]):
        return [
            error(f"{torch} is built for CUDA {environment.cuda}, the driver runs {driver}: no GPU is found", DRIVER)
        ]
    return []


def _between(facts: Facts, trainer: Environment, servers: Environment) -> list[Check]:
    checks = []
    torch, wanted = servers.versions.get("torch", ""), servers.wanted("torch")
    if wanted and not _within(torch, wanted):
        text = f"the servers' torch is {torch or 'missing'}, their SGLang asks for {wanted}, and so do its kernels"
        checks.append(error(text, "make install DEVICE=cuda"))
    if trainer.nccl != servers.nccl and trainer.nccl and servers.nccl:
        text = f"NCCL {trainer.nccl} in the trainer, {servers.nccl} in the servers: they form no process group"
        needed = _needs_nccl(facts)
        why = ": ncclInvalidUsage" if needed else ' (sync.method = "distributed" over nccl would need one)'
        checks.append((error if needed else warning)(text + why, f'{INSTALL}; or sync.backend = "gloo"'))
    for name in ("torch", "triton"):
        ours, theirs = trainer.versions.get(name, "missing"), servers.versions.get(name, "missing")
        if _plain(ours) != _plain(theirs):
            checks.append(warning(f"{name} {ours} in the trainer, {theirs} in the servers", INSTALL))
    return checks


def _needs_nccl(facts: Facts) -> bool:
    """Whether weights go to the local servers over NCCL: "auto", of method and backend, takes it where they lie on
    cards of their own."""
    config = facts.config
    if config.sync.method not in ("auto", "distributed"):
        return False
    apart = not facts.problem("placement") and not facts.placement.colocated
    if config.sync.method == "auto" and not apart:
        return False
    return config.sync.backend == "nccl" or (config.sync.backend == "auto" and apart)


def _within(version: str, specifier: str) -> bool:
    try:
        return Version(version) in SpecifierSet(specifier)
    except InvalidVersion:
        return False


def _plain(version: str) -> str:
    """Without what a build adds: "2.14.1+cu130" is 2.14.1."""
    return version.partition("+")[0]
