"""What to change: so that something fits where nothing does, or so that fewer cards do."""

from __future__ import annotations

from dataclasses import dataclass, replace

from megatron_gspo.plan.models import Model
from megatron_gspo.plan.rates import Gpu
from megatron_gspo.plan.search import Outcome, Plan, search
from megatron_gspo.plan.settings import Request

LORA = 32
"""The rank that is tried."""
FARTHEST = 8
"""Times as many GPUs that are tried at most."""


@dataclass(frozen=True)
class Change:
    """A change of what is asked for, after which a plan fits."""

    options: str
    """As the command takes it: ``--lora 32``."""
    plan: Plan


def to_fit(model: Model, gpu: Gpu, request: Request) -> list[Change]:
    """Each change that alone makes something fit: narrow moments, adapters, shorter responses, more GPUs."""
    tried = list(_alternatives(request))
    work = request.work
    if work.response_tokens >= 2048:
        shorter = replace(work, response_tokens=work.response_tokens // 2, mean_response=work.mean_response / 2)
        tried.append((f"--response-tokens {shorter.response_tokens}", replace(request, work=shorter)))
    found = _fitting(model, gpu, tried)
    gpus = request.gpus
    while gpus < FARTHEST * request.gpus:
        gpus *= 2
        if more := _fitting(model, gpu, [(f"--gpus {gpus}", replace(request, gpus=gpus))]):
            return found + more
    return found


def with_fewer(model: Model, gpu: Gpu, request: Request) -> list[Change]:
    """On half as many GPUs, and half of those, until none do: as it was asked for, else with what makes it fit."""
    found: list[Change] = []
    gpus = request.gpus // 2
    while gpus:
        asked = replace(request, gpus=gpus)
        same = _fitting(model, gpu, [(f"--gpus {gpus}", asked)])
        changes = same or _fitting(model, gpu, [(f"--gpus {gpus} {how}", other) for how, other in _alternatives(asked)])
        if not changes:
            break
        found += changes
        gpus //= 2
    return found


def _alternatives(request: Request) -> list[tuple[str, Request]]:
    """Other ways to hold the same model."""
    tried = []
    if not request.narrow:
        tried.append(("--narrow-states", replace(request, narrow=True)))
    if not request.lora:
        tried.append((f"--lora {LORA}", replace(request, lora=LORA)))
    return tried


def _fitting(model: Model, gpu: Gpu, tried: list[tuple[str, Request]]) -> list[Change]:
    outcomes: list[tuple[str, Outcome]] = [(options, search(model, gpu, request)) for options, request in tried]
    return [Change(options, outcome.plans[0]) for options, outcome in outcomes if outcome.plans]
