"""What differs between a run on CPUs and one on GPUs: this table, and nothing else asks whether there is CUDA.

What an operation does by device lies where the operation is, in one function each, whose both sides are tested:
``parallel.grouped.product_form`` and ``parallel.dispatch.ordered_sum`` of experts, and attention's
``megatron.attention.attention_kernel``. docs/gpu.md lists them with what has run on which card.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

DeviceType = Literal["cpu", "cuda"]


@dataclass(frozen=True)
class Platform:
    """One of two kinds of machine."""

    device_type: DeviceType
    """Where tensors lie, and what a server that we start is told."""
    backend: Literal["gloo", "nccl"]
    """Of the process groups of training: nccl knows no CPU tensors, and gloo moves those of a GPU through the host."""
    one_rank_a_device: bool
    """A rank has a GPU of its own, by its ``LOCAL_RANK``; nccl refuses two ranks on one. Cores are shared."""
    stands_in: bool
    """Megatron-Core asks torch.cuda for streams, events and devices; ``megatron.cpu`` answers where there are none."""
    deterministic: bool
    """Deterministic algorithms cost nothing on a CPU, and are on; on a GPU ``train.deterministic`` asks for them."""
    half_kernels: bool
    """There are attention kernels for half types alone, which take sequences of any lengths in one call."""


CPU = Platform(
    device_type="cpu", backend="gloo", one_rank_a_device=False, stands_in=True, deterministic=True, half_kernels=False
)
CUDA = Platform(
    device_type="cuda", backend="nccl", one_rank_a_device=True, stands_in=False, deterministic=False, half_kernels=True
)
PLATFORMS: dict[str, Platform] = {"cpu": CPU, "cuda": CUDA}


def here() -> Platform:
    """This process's."""
    import torch  # seconds, which a command that reads a run does not have

    return CUDA if torch.cuda.is_available() else CPU


def release_unused() -> None:
    """Gives device memory that torch keeps for later back to whoever else uses the device."""
    import torch

    if here() is CUDA:
        torch.cuda.empty_cache()
