"""A sum of bytes against what is free: in words, as a finding, and what would make it smaller."""

from __future__ import annotations

from megatron_gspo.doctor.check import Check, error, ok, warning
from megatron_gspo.doctor.estimate import Estimate
from megatron_gspo.doctor.machine import gib

TIGHT = 0.85
"""Share of the free memory above which an estimate is too near to it."""
RANK_PROCESS = 400 * 2**20
"""Resident bytes of a rank on a CPU before it has a model: Python, torch, Megatron."""
SERVER_PROCESS = 2 * 2**30
"""Resident bytes of a local CPU server's three processes without a model."""


def spell(needed: Estimate) -> str:
    """ "weights 1.2 GiB + gradients 2.4 GiB + ... = 9 GiB", the terms that are zero left out."""
    terms = " + ".join(f"{name.replace('_', ' ')} {gib(size)}" for name, size in vars(needed).items() if size)
    return f"{terms} = {gib(needed.total)}"


def against(text: str, needed: int, free: int, fix: str) -> Check:
    """An error where more is needed than is free, a warning where it is more than ``TIGHT`` of it."""
    if needed > free:
        return error(text, fix)
    if needed > TIGHT * free:
        return warning(f"{text}: more than {TIGHT:.0%}", fix)
    return ok(text)


def largest(needed: Estimate) -> str:
    """What makes the largest term smaller."""
    fixes = {
        "weights": "parallel.tensor, pipeline or expert; model.dtype",
        "gradients": "parallel.tensor, pipeline or expert",
        "optimizer": 'parallel.data (its states are shared out), optimizer.offload, optimizer.state_dtype = "bfloat16"',
        "activations": 'train.microbatch_tokens, or model.recompute = "full"',
        "logprobs": "model.logprob_chunk, or parallel.tensor",
        "reference": "algorithm.kl_loss_coef = 0 and kl_reward_coef = 0 need no reference policy",
        "critic": 'algorithm.credit = "group" needs no critic',
        "critic_states": 'critic.offload, critic.state_dtype = "bfloat16"',
    }
    largest = max(vars(needed), key=lambda name: vars(needed)[name])
    return f"{largest.replace('_', ' ')} are most of it: {fixes[largest]}"
