"""What a process without a GPU replaces in itself to compute as one with a GPU would, on fake tensors.

For a process of its own: nothing is put back. Each entry says what is the same on both sides and what is not.
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch.utils._python_dispatch import _disable_current_modes

from megatron_gspo import platforms
from megatron_gspo.batching import packing
from megatron_gspo.dryrun import kernels
from megatron_gspo.dryrun.meter import Meter
from megatron_gspo.dryrun.result import HOST
from megatron_gspo.kernels import choice, products
from megatron_gspo.megatron import adamw, attention, cpu, experts
from megatron_gspo.megatron import model as network
from megatron_gspo.parallel import dispatch, grouped, logprobs

DRY = platforms.Platform(
    device_type="cpu", backend="gloo", one_rank_a_device=False, stands_in=True, deterministic=False, half_kernels=True
)
"""Labelled CPU, since backward on fake CUDA tensors stops the process; what it chooses is a GPU's."""


def install(meter: Meter, machine: choice.Machine) -> None:
    """All of them, once, before groups and models are made."""
    for module in list(sys.modules.values()):
        if getattr(module, "__name__", "").startswith("megatron_gspo.") and hasattr(module, "here"):
            replace(module, here=lambda: DRY)
    cpu.install()
    replace(choice.Machine, here=classmethod(lambda cls: machine))
    replace(torch.cuda, get_device_capability=lambda *_: (machine.capability, 0))
    replace(torch.nn.Module, to=lambda self, *_, **__: self)  # all is there already
    replace(kernels, computed=meter.add_flops)
    sys.modules.update(kernels.modules())
    _replace_collectives()
    _replace_forms()
    _name_places(meter)


def replace(where: Any, **names: Any) -> None:
    """Puts something else under names of a module or a class, for good."""
    for name, value in names.items():
        setattr(where, name, value)


def _replace_collectives() -> None:
    """Objects have no bytes in a fake tensor: every rank says what this one says."""

    def gather(objects: list[Any], own: Any, group: Any = None) -> None:
        objects[:] = [own] * len(objects)

    new_group = dist.new_group
    replace(
        dist,
        all_gather_object=gather,
        broadcast_object_list=lambda *_, **__: None,
        new_group=lambda *args, **settings: new_group(*args, **{**settings, "backend": "fake"}),
    )


def _replace_forms() -> None:
    """What an operation does by device: the forms that CUDA tensors take."""
    replace(dispatch, exchange_sizes=balanced, ordered_sum=_sum_of_rows)
    replace(products, _writes_float32=lambda _: True)
    form = grouped.product_form
    replace(grouped, product_form=lambda outputs, inputs, dtype, _: form(outputs, inputs, dtype, "cuda"))
    positions = _for_real(packing.zigzag_positions)
    replace(attention, query_runs=_for_real(attention.query_runs), zigzag_positions=positions)
    replace(network, zigzag_positions=positions)


def _for_real(function: Callable[..., Any]) -> Callable[..., Any]:
    """Of boundaries of sequences, which are real: what is made on the way must be too."""

    @functools.wraps(function)
    def call(*args: Any, **kwargs: Any) -> Any:
        with _disable_current_modes():
            return function(*args, **kwargs)

    return call


def balanced(from_n: torch.Tensor, to_o: torch.Tensor, choices: int) -> tuple[list[int], list[int]]:
    """``dispatch.exchange_sizes`` of experts that get the same number of tokens each."""
    owners = len(to_o)
    sent = [choices // owners + (owner < choices % owners) for owner in range(owners)]
    return [sent[0]] * len(from_n), sent


def _sum_of_rows(rows_RH: torch.Tensor, rows_TF: torch.Tensor) -> torch.Tensor:
    """``dispatch.ordered_sum``: CUDA's bag adds half types in float32 without a float32 copy of them."""
    rows_TF + 0  # the bag's offsets, of that size
    return rows_RH.new_empty(len(rows_TF), rows_RH.shape[1])


def _name_places(meter: Meter) -> None:
    """Whose memory is whose: the head's, that of rows on their way, the host's."""
    for name in ("plan_dispatch", "to_experts", "from_experts", "probs_to_experts"):
        replace(experts, **{name: meter.within("dispatch", getattr(experts, name))})
    for site, function in {"head": logprobs._VocabParallelLogprobs, "dispatch": dispatch._Dispatched}.items():
        for name in ("forward", "backward"):
            replace(function, **{name: staticmethod(meter.within(site, getattr(function, name)))})
    replace(adamw.HostMemory, __init__=meter.within("layers", adamw.HostMemory.__init__, HOST))
