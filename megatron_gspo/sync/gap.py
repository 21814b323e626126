"""A gap between engine and trainer, made on purpose: what the servers receive differs from the trainer's weights.

In float32 on a CPU, engine and trainer compute the same, and replaying the engine's routes (R3) has nothing to mend.
These put a gap there, on the stream that goes out and nowhere else. Both are off by default.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Collection, Iterator

import torch

from megatron_gspo.hf import fp8
from megatron_gspo.sync.base import NamedTensor


def with_router_noise(
    tensors: Iterator[NamedTensor], routers: Collection[str], *, relative: float, seed: int, version: int
) -> Iterator[NamedTensor]:
    """The stream with Gaussian noise on the tensors named in ``routers``; all others are passed on as they are.

    w + relative * rms(w) * z, with z ~ N(0, 1) drawn from (seed, name, version): alike at every layout, anew at every
    weight version. In float32 at least, rounded to the tensor's dtype at the end.
    """
    for name, tensor in tensors:
        yield name, add_noise(tensor, relative, noise_seed(seed, name, version)) if name in routers else tensor


def add_noise(tensor: torch.Tensor, relative: float, seed: int) -> torch.Tensor:
    """A new tensor: ``tensor`` with noise of ``relative`` times its root mean square."""
    wide = tensor.to(torch.promote_types(tensor.dtype, torch.float32))
    generator = torch.Generator().manual_seed(seed)
    noise = torch.randn(wide.shape, generator=generator, dtype=wide.dtype).to(wide.device)
    return (wide + relative * wide.square().mean().sqrt() * noise).to(tensor.dtype)


def noise_seed(seed: int, name: str, version: int) -> int:
    """In [0, 2**63): a hash, so that no two tensors or versions share a stream."""
    key = json.dumps([seed, name, version]).encode()
    return int.from_bytes(hashlib.sha256(key).digest()[:8], "big") >> 1


def in_dtype(
    tensors: Iterator[NamedTensor], dtype: torch.dtype, kept: Collection[str] = frozenset()
) -> Iterator[NamedTensor]:
    """The stream, rounded to ``dtype``; those named in ``kept`` as they are: an engine holds expert biases in float32,
    whatever its dtype."""
    for name, tensor in tensors:
        yield name, tensor if name in kept else tensor.to(dtype)


def in_eight_bits(
    tensors: Iterator[NamedTensor], chosen: Callable[[str], bool], kept: Collection[str] = frozenset()
) -> Iterator[NamedTensor]:
    """The stream with each matrix that is ``chosen`` as its eight bits and, behind them, their scales; all others in
    bfloat16 but for those named in ``kept``. A tensor at a time; the tensors are not changed.

    Raises WeightError for a chosen one with elements that are not finite, once the stream is exhausted: producing it
    may be collective.
    """
    failure: Exception | None = None
    for name, tensor in tensors:
        if failure is not None:
            continue
        if not chosen(name):
            yield name, tensor if name in kept else tensor.to(fp8.READ)
            continue
        try:
            narrow, scale = fp8.quantise(name, tensor)
        except Exception as error:
            failure = error
            continue
        yield name, narrow
        yield name + fp8.SCALE, scale
    if failure is not None:
        raise failure
