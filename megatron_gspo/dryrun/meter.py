"""What a process that computes with fake tensors would hold, send and compute, counted operation by operation.

Memory is that of storages: one counts from the operation that makes it until nothing refers to it, as with the caching
allocator, in blocks of 512 bytes. Each has a part, the one that was current when it was made.
"""

from __future__ import annotations

import contextlib
import math
import weakref
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.attention.varlen  # defines the operations
from torch._subclasses.fake_tensor import FakeTensor, unset_fake_temporarily
from torch.distributed._meta_registrations import create_fakework
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

from megatron_gspo.dryrun.result import HOST, Moment
from megatron_gspo.errors import ConfigError

BLOCK = 512
"""Bytes that CUDA's caching allocator rounds an allocation up to."""
COALESCED = {
    torch.ops.c10d.reduce_scatter_tensor_coalesced_.default,
    torch.ops.c10d.allgather_into_tensor_coalesced_.default,
    torch.ops.c10d.allreduce_coalesced_.default,
}
"""Collectives that fake tensors know no form of; the others they do."""
ATTENTION = torch.ops.torch_attn._varlen_attn.default
ATTENTION_BACKWARD = torch.ops.torch_attn._varlen_attn_backward.default


class Meter(TorchDispatchMode):
    """Counts while it is active. It is entered behind a ``FakeTensorMode``, and so sees every operation first.

    Operations whose tensors are all real (boundaries of sequences, which the host reads) are run for real.
    """

    def __init__(self) -> None:
        super().__init__()
        self.phase, self.part, self.site = "build", "weights", "layers"
        self.microbatches = 1
        """Of the training pass."""
        self.live: Counter[str] = Counter()
        self.host = 0
        """The most bytes in host memory."""
        self.peaks: dict[Moment, tuple[int, dict[str, int]]] = {}
        """(phase, site) -> the most bytes at one time, and which parts they were."""
        self.collectives: dict[tuple[str, str, str], list[int]] = defaultdict(lambda: [0, 0])
        """(phase, kind, group's ranks) -> [count, bytes]."""
        self.flops: Counter[str] = Counter()
        self._parts: dict[int, tuple[weakref.ref[Any], str, int]] = {}
        """Storage -> (itself, its part, its bytes)."""

    # ------------------------------------------------------------------------------------------------------- places

    @contextlib.contextmanager
    def at(self, **changes: str) -> Iterator[None]:
        """Within it another ``phase``, ``part`` or ``site``."""
        before = {name: getattr(self, name) for name in changes}
        vars(self).update(changes)
        try:
            yield
        finally:
            vars(self).update(before)

    def within(self, site: str, function: Callable[..., Any], part: str | None = None) -> Callable[..., Any]:
        """The function, with what it makes counted as ``part`` (default ``site``)."""

        def call(*args: Any, **kwargs: Any) -> Any:
            with self.at(site=site, part=part or site):
                return function(*args, **kwargs)

        return call

    def belongs(self, tensors: Sequence[torch.Tensor], part: str) -> None:
        """Counts the storages of tensors as another part from here on."""
        for storage in (tensor.untyped_storage() for tensor in tensors):
            found = self._parts.get(storage._cdata)
            if found is not None:
                reference, before, size = found
                self.live[before] -= size
                self.live[part] += size
                self._parts[storage._cdata] = reference, part, size

    # ---------------------------------------------------------------------------------------------------- operations

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, torch.Tensor)]
        if tensors and not any(isinstance(tensor, FakeTensor) for tensor in tensors):
            with unset_fake_temporarily():
                return func(*args, **kwargs)
        if func is torch.ops.aten._local_scalar_dense.default:
            return _number(tensors[0])
        if func.namespace == "c10d":
            self._collective(func, args)
            if func in COALESCED:
                return create_fakework(args, return_first_arg=False)
        result = func(*args, **kwargs)
        self._computed(func, args, kwargs, result)
        for leaf in tree_leaves(result):
            if isinstance(leaf, FakeTensor):
                self._made(leaf)
        if func is ATTENTION_BACKWARD:
            self._look(_inside_backward(args[1], args[2]))
        return result

    def _made(self, tensor: torch.Tensor) -> None:
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key in self._parts:
            return
        size = math.ceil(storage.nbytes() / BLOCK) * BLOCK
        part = self._part()
        self._parts[key] = weakref.ref(storage, lambda _: self._freed(key)), part, size
        self.live[part] += size
        self.host = max(self.host, self.live[HOST])
        self._look()

    def _look(self, passing: int = 0) -> None:
        """Whether this is the fullest moment of its kind, with ``passing`` bytes inside a kernel."""
        moment, total = Moment(self.phase, self.site), sum(self.live.values()) - self.live[HOST] + passing
        if total > self.peaks.get(moment, (0, {}))[0]:
            parts = {name: size for name, size in self.live.items() if name != HOST}
            parts["passing"] = parts.get("passing", 0) + passing
            self.peaks[moment] = total, {name: size for name, size in parts.items() if size}

    def _part(self) -> str:
        """Of what is made now: where no place has a name for it, what forward keeps, or what comes and goes.

        What forward makes and does not keep is gone when backward, the fullest time, begins.
        """
        forward = self.phase == "train" and torch._C._current_graph_task_id() == -1
        return self.part or ("activations" if forward else "passing")

    def _freed(self, key: int) -> None:
        _, part, size = self._parts.pop(key)
        self.live[part] -= size

    def _collective(self, func: Any, args: Any) -> None:
        group = next(_group(arg) for arg in args if _is_group(arg))
        lists = [leaf for leaf in args if isinstance(leaf, (torch.Tensor, list))]
        sizes = [sum(t.nbytes for t in tree_leaves(leaf) if isinstance(t, torch.Tensor)) for leaf in lists]
        entry = self.collectives[self.phase, func._opname.strip("_"), group]
        entry[0] += 1
        entry[1] += max(sizes, default=0)

    def _computed(self, func: Any, args: Any, kwargs: Any, result: Any) -> None:
        if func is ATTENTION:
            self.add_flops(4 * _causal_scores(args[0], args[3], args[4]))
        elif func is ATTENTION_BACKWARD:
            self.add_flops(10 * _causal_scores(args[1], args[6], args[7]))
        elif func is torch.ops.aten._grouped_mm.default:
            self.add_flops(2 * args[0].numel() * args[1].shape[-1])
        elif func._overloadpacket in flop_registry:
            self.add_flops(flop_registry[func._overloadpacket](*args, **kwargs, out_val=result))

    def add_flops(self, flops: int) -> None:
        """Floating-point operations of the current phase."""
        self.flops[self.phase] += flops


def _causal_scores(query: torch.Tensor, cu_queries: torch.Tensor, cu_keys: torch.Tensor) -> int:
    """Scores that queries see, times numbers of all heads: a product of forward is twice that many operations.

    Forward has two products of that size, backward makes the scores again and has five.
    """
    with unset_fake_temporarily():
        lengths = list(zip(cu_queries.diff().tolist(), cu_keys.diff().tolist(), strict=True))
    return query.shape[1] * query.shape[2] * sum(q * k - q * (q - 1) // 2 for q, k in lengths)


def _inside_backward(query: torch.Tensor, key: torch.Tensor) -> int:
    """Bytes that flash attention's backward allocates for itself: float32 sums of the query's gradient, and, of grouped
    keys and values, gradients for each query head."""
    grouped = query.shape[1] != key.shape[1]
    return 4 * query.numel() + grouped * 2 * query.itemsize * key.shape[0] * query.shape[1] * query.shape[2]


def _number(tensor: torch.Tensor) -> float:
    """What the host reads of a fake tensor: 1 for a norm or a count of steps. A size would decide what follows."""
    if tensor.dtype.is_floating_point:
        return 1.0
    raise ConfigError(
        "this step reads a size from the GPU that depends on the data, and a dry run has none: plan --verify cannot "
        "say what such a layout holds"
    )


def _is_group(value: Any) -> bool:
    return isinstance(value, torch.ScriptObject) and "ProcessGroup" in str(value._type())


def _group(value: Any) -> str:
    return dist.ProcessGroup.unbox(value).group_name
