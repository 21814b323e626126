"""What Megatron-Core asks of CUDA, answered by a process that has none.

Megatron-Core runs on gloo and CPU tensors without a changed line, as long as the names in this file answer. They are
replaced in the running process by ``install``, which is called once before the process groups are made and does
nothing where CUDA is available. Each entry says who asks.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator
from typing import Any

import torch

from megatron_gspo.megatron.rotary import rotate_packed
from megatron_gspo.platforms import here

CPU = torch.device("cpu")

_installed = False


def install() -> None:
    """Mends Megatron on every machine, and installs the stand-ins where there is no CUDA; once."""
    global _installed
    if _installed:
        return
    _installed = True
    _mend_megatron()
    if not here().stands_in:
        return
    for name, replacement in _CUDA_NAMES.items():
        setattr(torch.cuda, name, replacement)
    for name in ("zeros", "ones", "empty", "tensor", "arange", "full"):
        setattr(torch, name, _on_cpu(getattr(torch, name)))
    torch.Tensor.cuda = lambda self, *args, **kwargs: self  # type: ignore[method-assign]
    torch.Tensor.type = _tensor_type(torch.Tensor.type)  # type: ignore[method-assign]
    _install_in_megatron()


class _Stream:
    """The one stream, on which everything has already happened (the all-to-all token dispatcher makes a side stream).

    A class, since annotations of other packages name ``torch.cuda.Stream`` as a type.
    """

    _only: _Stream | None = None

    def __new__(cls, *args: Any, **kwargs: Any) -> _Stream:
        if cls._only is None:
            cls._only = super().__new__(cls)
        return cls._only

    def __init__(self, *args: Any, **kwargs: Any) -> None: ...

    def wait_stream(self, stream: _Stream) -> None: ...

    def wait_event(self, event: _Event) -> None: ...

    def synchronize(self) -> None: ...

    def record_event(self, event: _Event | None = None) -> _Event:
        return event or _Event()


class _Event:
    """An event that has already happened."""

    def __init__(self, *args: Any, **kwargs: Any) -> None: ...

    def record(self, stream: _Stream | None = None) -> None: ...

    def wait(self, stream: _Stream | None = None) -> None: ...

    def synchronize(self) -> None: ...

    def query(self) -> bool:
        return True


@contextlib.contextmanager
def _stream(stream: _Stream | None) -> Iterator[None]:
    yield


_CUDA_NAMES: dict[str, Any] = {
    "current_device": lambda: CPU,  # every buffer is made on torch.cuda.current_device()
    "synchronize": lambda device=None: None,  # pipeline send and receive
    "empty_cache": lambda: None,  # the optimizer's offload path
    "current_stream": lambda device=None: _Stream(),  # token dispatcher, gradient buckets
    "default_stream": lambda device=None: _Stream(),
    "Stream": _Stream,  # token dispatcher
    "stream": _stream,
    "Event": _Event,  # token dispatcher
    "get_rng_state": lambda device="cuda": torch.get_rng_state(),  # random-state tracker, recompute
    "set_rng_state": lambda state, device="cuda": torch.set_rng_state(state),
    "manual_seed": torch.manual_seed,
}


def _on_cpu(factory: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
    """``device="cuda"`` means the CPU, and pinned memory does not exist (schedules, distributed optimizer, DDP)."""

    @functools.wraps(factory)
    def make(*args: Any, **kwargs: Any) -> torch.Tensor:
        if str(kwargs.get("device", "")).startswith("cuda"):
            kwargs["device"] = CPU
        kwargs.pop("pin_memory", None)
        return factory(*args, **kwargs)

    return make


_CUDA_TYPES = {
    torch.float32: "torch.cuda.FloatTensor",
    torch.float64: "torch.cuda.FloatTensor",  # the distributed optimizer knows no doubles; its fp32 branch keeps them
    torch.float16: "torch.cuda.HalfTensor",
    torch.bfloat16: "torch.cuda.BFloat16Tensor",
}


def _tensor_type(original: Callable[..., Any]) -> Callable[..., Any]:
    """The distributed optimizer and gradient clipping compare ``tensor.type()`` with the names of CUDA types."""

    def type_(self: torch.Tensor, dtype: Any = None, *args: Any, **kwargs: Any) -> Any:
        if dtype is None and self.dtype in _CUDA_TYPES:
            return _CUDA_TYPES[self.dtype]
        return original(self) if dtype is None else original(self, dtype, *args, **kwargs)

    return type_


def _install_in_megatron() -> None:
    """Recompute and the random-state tracker keep the "CUDA" generator's state: here it is the CPU's."""
    from megatron.core.tensor_parallel import random

    random._get_cuda_rng_state = lambda *args, **kwargs: torch.get_rng_state()
    random._set_cuda_rng_state = lambda state, *args, **kwargs: torch.set_rng_state(state)


def _mend_megatron() -> None:
    """With or without a GPU: the router's products, rotary embeddings, and a name that 0.16.1 takes for a class.

    Transformer Engine's products of float32, which 0.19.2 takes for a router's gradients where it is installed, are of
    TF32. (0.16.1 asks for them without having imported them.)
    """
    from megatron.core.models.common.embeddings import rope_utils
    from megatron.core.transformer import multi_latent_attention
    from megatron.core.transformer.moe import moe_utils

    moe_utils.te_general_gemm = None  # selects torch's
    if not isinstance(multi_latent_attention.TELinear, type):
        multi_latent_attention.TELinear = type("TELinear", (), {})  # a mock, and no type to isinstance: nothing is one
    rope_utils._apply_rotary_pos_emb_thd = rotate_packed


@contextlib.contextmanager
def keep_float64() -> Iterator[None]:
    """Within it ``Tensor.float`` leaves float64 as it is: the distributed optimizer casts gradients with it."""
    original = torch.Tensor.float

    def float_(self: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        return self if self.dtype == torch.float64 else original(self, *args, **kwargs)

    torch.Tensor.float = float_  # type: ignore[method-assign, assignment]
    try:
        yield
    finally:
        torch.Tensor.float = original  # type: ignore[method-assign]
