"""AdamW over a rank's shards of the parameters, with states where and as narrow as the settings say.

It stands where Megatron puts an optimizer that keeps its own master weights (its "precision aware" one, which only
Transformer Engine has): gradients come as ``decoupled_grad``, views of DDP's buffers that nobody copies, and new
weights are written into the buffers that are gathered. The arithmetic is torch's fused AdamW, which a CPU has too and
which keeps nothing beside its arguments; torch's foreach form, its default on a GPU, makes a copy of all states.
"""

from __future__ import annotations

import weakref
from typing import Any

import torch

from megatron_gspo.platforms import CUDA, here

PIECE = 2**24
"""Elements of a shard that are stepped at a time where states are brought to the device or widened: some 64 MiB of
each. A multiple of what a vector holds: the ends of a tensor may be rounded otherwise than the rest."""
MOMENTS = ("exp_avg", "exp_avg_sq")
_SEEDS = 2**63


class ShardedAdamW:
    """Steps flat shards; ``state[shard]`` has "param", the master weight, the two moments, and "step", a count.

    Master weights are at least float32: of a narrower shard a copy, else the shard itself. Moments are as wide, or
    bfloat16, rounded up or down by chance (``round_by_chance``).
    """

    def __init__(self, groups: list[dict[str, Any]], *, moments: torch.dtype | None, on_host: bool) -> None:
        """
        Args:
            groups: torch's groups of parameters, with "lr", "betas", "eps" and "weight_decay"; kept, not copied.
            moments: their dtype; None for that of the master weights.
            on_host: whether states stay in host memory, and come to the device piece by piece in a step.
        """
        self.param_groups, self.on_host, self._moments = groups, on_host, moments
        self.scale = 1.0
        """What gradients are multiplied by in the next step."""
        self.state: dict[torch.Tensor, dict[str, torch.Tensor]] = {}
        self._places: list[torch.Tensor] = []
        """In host memory, of the states that can be parked, in their order."""
        self._parked: list[tuple[dict[str, torch.Tensor], str]] = []
        shards = [shard for group in groups for shard in group["params"]]
        self._memory: list[HostMemory] = []
        """Locked for as long as this lives."""
        memory = self._lock(sum(_bytes_on_host(shard, moments) for shard in shards)) if on_host and shards else None
        for shard in shards:
            self.state[shard] = _new_state(shard, moments, memory)

    def dtypes(self, weight: torch.dtype) -> dict[str, torch.dtype]:
        """State -> its dtype, for weights of a dtype."""
        wide = torch.promote_types(weight, torch.float32)
        return {"param": wide, **dict.fromkeys(MOMENTS, self._moments or wide)}

    @torch.no_grad()
    def step(self) -> None:
        """One step on each shard's ``decoupled_grad``, which is scaled in place. Not while the states are parked."""
        assert not self._parked, "the states are in host memory: unpark first"
        number = 0
        for group in self.param_groups:
            for shard in group["params"]:
                self._step_shard(shard, group, number)
                number += 1
        if self.on_host:
            self._wait()

    @torch.no_grad()
    def park(self) -> None:
        """Moves the states to host memory, where checkpoints read them as they do with ``on_host``, and frees theirs.

        Nothing on the device is copied there; the host memory is kept for the next time.
        """
        if self._parked or self.on_host:
            return
        found = [(state, name) for shard, state in self.state.items() for name in _beside(shard, state)]
        if not self._places:
            memory = self._lock(sum(_aligned(state[name].nbytes) for state, name in found)) if found else None
            self._places = [memory.take(state[name].numel(), state[name].dtype) for state, name in found if memory]
        for (state, name), place in zip(found, self._places, strict=True):
            place.copy_(state[name], non_blocking=True)
        self._wait()
        for (state, name), place in zip(found, self._places, strict=True):
            state[name] = place
        self._parked = found

    @torch.no_grad()
    def unpark(self) -> None:
        """Brings back what ``park`` moved, bit for bit."""
        devices = {id(state): shard.device for shard, state in self.state.items()}
        for (state, name), place in zip(self._parked, self._places if self._parked else (), strict=True):
            state[name] = torch.empty_like(place, device=devices[id(state)]).copy_(place, non_blocking=True)
        self._parked = []
        self._wait()

    def _lock(self, size: int) -> HostMemory:
        self._memory.append(HostMemory(size))
        return self._memory[-1]

    def _wait(self) -> None:
        """Copies between host and device are on their way until here."""
        if here() is CUDA:
            torch.cuda.current_stream().synchronize()

    def _step_shard(self, shard: torch.Tensor, group: dict[str, Any], number: int) -> None:
        state = self.state[shard]
        state["step"] += 1
        step = int(state["step"])
        narrow = any(state[name].dtype != state["param"].dtype for name in MOMENTS)
        whole = shard.numel() if not (narrow or self.on_host) else PIECE
        for start in range(0, shard.numel(), whole):
            piece = slice(start, start + whole)
            seed = hash((number, step, start)) % _SEEDS
            self._step_piece(shard.detach()[piece], shard.decoupled_grad[piece], _cut(state, piece), group, step, seed)  # type: ignore[attr-defined]

    def _step_piece(
        self,
        weight: torch.Tensor,
        gradient: torch.Tensor,
        state: dict[str, torch.Tensor],
        group: dict[str, Any],
        step: int,
        seed: int,
    ) -> None:
        master = state["param"]
        here = {name: self._bring(tensor, weight, master.dtype) for name, tensor in state.items()}
        if self.scale != 1.0:
            gradient.mul_(self.scale)
        torch._fused_adamw_(
            [here["param"]],
            [gradient.to(master.dtype)],
            [here["exp_avg"]],
            [here["exp_avg_sq"]],
            [],
            [torch.full((), float(step), device=weight.device)],
            lr=float(group["lr"]),
            beta1=group["betas"][0],
            beta2=group["betas"][1],
            weight_decay=group["weight_decay"],
            eps=group["eps"],
            amsgrad=False,
            maximize=False,
        )
        _overwrite(weight, here["param"])
        for offset, (name, tensor) in enumerate(state.items()):
            _keep(tensor, here[name], seed + offset)

    def _bring(self, tensor: torch.Tensor, weight: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        """A state where it is stepped: itself, unless it lies in host memory or is narrower."""
        if _same_memory(tensor, weight):  # of a weight that is its own master
            return weight
        return tensor.to(weight.device, dtype, non_blocking=True, copy=self.on_host)


class HostMemory:
    """One block of host memory, cut into tensors of zeros; page-locked where a GPU copies from and to it.

    Locked as it is and not by torch's allocator, which rounds each block up to a power of two, and unlocked when this
    object goes: CUDA would refuse the next block that the system puts at its address. (Not run on a GPU yet.)
    """

    ALIGNED = 64

    def __init__(self, size: int) -> None:
        self._block = torch.zeros(size, dtype=torch.uint8, device="cpu")
        self._used = 0
        if here() is CUDA:
            address = self._block.data_ptr()
            torch.cuda.check_error(torch.cuda.cudart().cudaHostRegister(address, size, 0))
            # At the end of the process CUDA may be gone first, and unlocks all by itself.
            weakref.finalize(self, lambda: torch.cuda.cudart().cudaHostUnregister(address)).atexit = False

    def take(self, numel: int, dtype: torch.dtype) -> torch.Tensor:
        """[numel] of zeros."""
        size = numel * dtype.itemsize
        tensor = self._block[self._used : self._used + size].view(dtype)
        self._used += _aligned(size)
        return tensor


def round_by_chance(wide: torch.Tensor, seed: int) -> torch.Tensor:
    """bfloat16 of float32, up or down with the odds that make the expected value right; from the seed alone.

    To the nearest, a second moment would not change at all where its change in a step is less than 1/512 of it: with
    beta2 = 0.98 once it is within a tenth of where it goes, with 0.999 long before.
    """
    bits = wide.float().contiguous().view(torch.int32)
    chance = torch.Generator(wide.device).manual_seed(seed % _SEEDS)
    bits = bits + torch.randint(0, 2**16, bits.shape, dtype=torch.int32, device=wide.device, generator=chance)
    return bits.bitwise_and_(-(2**16)).view(torch.float32).to(torch.bfloat16)


def _new_state(shard: torch.Tensor, moments: torch.dtype | None, memory: HostMemory | None) -> dict[str, torch.Tensor]:
    shard = shard.detach()
    wide = torch.promote_types(shard.dtype, torch.float32)

    def zeros(dtype: torch.dtype) -> torch.Tensor:
        if memory is not None:
            return memory.take(shard.numel(), dtype)
        return torch.zeros(shard.numel(), dtype=dtype, device=shard.device)

    master = shard
    if wide != shard.dtype:
        master = zeros(wide)
        master.copy_(shard)
    return {
        "param": master,
        **{name: zeros(moments or wide) for name in MOMENTS},
        "step": torch.zeros((), dtype=torch.float32),
    }


def _bytes_on_host(shard: torch.Tensor, moments: torch.dtype | None) -> int:
    wide = torch.promote_types(shard.dtype, torch.float32)
    kinds = [*([wide] if wide != shard.dtype else []), *[moments or wide] * len(MOMENTS)]
    return sum(_aligned(shard.numel() * dtype.itemsize) for dtype in kinds)


def _aligned(size: int) -> int:
    return -(-size // HostMemory.ALIGNED) * HostMemory.ALIGNED


def _beside(shard: torch.Tensor, state: dict[str, torch.Tensor]) -> list[str]:
    """The states that lie in memory of their own: of a weight that is its own master, the moments."""
    return [name for name in ("param", *MOMENTS) if not _same_memory(state[name], shard)]


def _cut(state: dict[str, torch.Tensor], piece: slice) -> dict[str, torch.Tensor]:
    return {name: state[name][piece] for name in ("param", *MOMENTS)}


def _keep(kept: torch.Tensor, new: torch.Tensor, seed: int) -> None:
    """Puts a state back where it is kept."""
    narrower = kept.dtype == torch.bfloat16 and new.dtype != kept.dtype
    _overwrite(kept, round_by_chance(new, seed) if narrower else new)


def _overwrite(target: torch.Tensor, source: torch.Tensor) -> None:
    if not _same_memory(target, source):
        target.copy_(source, non_blocking=True)


def _same_memory(one: torch.Tensor, other: torch.Tensor) -> bool:
    """Whether they begin at the same element; asked of storages, which tensors of a dry run have, and no address."""
    storages = (tensor.untyped_storage()._cdata for tensor in (one, other))
    return one.storage_offset() == other.storage_offset() and len(set(storages)) == 1
