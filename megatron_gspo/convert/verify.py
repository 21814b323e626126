"""Two checkpoints of either kind, tensor by tensor."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
import torch.distributed as dist

from megatron_gspo.convert.kinds import home_of_config, kind_of
from megatron_gspo.convert.run import Show
from megatron_gspo.convert.sources import CRITIC, MegatronSource, Model, StoredTensors
from megatron_gspo.errors import ConfigError, WeightError
from megatron_gspo.megatron.checkpoint import POLICY
from megatron_gspo.megatron.groups import Groups
from megatron_gspo.parallel.exchange import gather_objects, together

Side = StoredTensors | MegatronSource


@dataclass(frozen=True)
class Difference:
    """What is wrong with one tensor of the second checkpoint, seen from the first."""

    name: str
    what: str
    """ "missing", "extra", "shape", "dtype", "values" or "unreadable"."""
    detail: str


@dataclass(frozen=True)
class Verdict:
    """What a comparison found."""

    first: str
    second: str
    tensors: int
    """In the first."""
    bytes: int
    """Of the first."""
    equal: int
    """Tensors whose bytes are the same in both."""
    digest: str
    """sha256 over the names and hashes of the first's tensors, sorted: the same whatever files hold them."""
    differences: tuple[Difference, ...] = field(default_factory=tuple)

    @property
    def held(self) -> bool:
        """Whether nothing differs."""
        return not self.differences


def verify_tensors(
    first: Path, second: Path, config: Path | None, groups: Groups, show: Show, *, model: str = POLICY
) -> Verdict:
    """Compares names, shapes, dtypes and bytes; ranks share the tensors. Collective.

    A head that is stored although it is tied counts as the embedding; ``model``: which one of a run's checkpoint.
    Raises ConfigError or WeightError for a directory that is no checkpoint.
    """
    a, b = together(lambda: tuple(_open(each, config, groups, model) for each in (first, second)), groups.world)
    if model != POLICY and not any(isinstance(side, MegatronSource) for side in (a, b)):
        raise ConfigError(
            f"{first} and {second} hold one model each: --model chooses among those of a run's checkpoint"
        )
    names_a, names_b = _names(a), _names(b)
    order = b if isinstance(b, MegatronSource) else a  # in which a parameter's tensors follow one another
    common = [name for name in (*order.names(), *sorted(_repeated(order))) if name in names_a & names_b]
    listed = common + sorted(names_a - names_b)
    rank, ranks = dist.get_rank(), dist.get_world_size()
    mine = listed[len(listed) * rank // ranks : len(listed) * (rank + 1) // ranks]
    compared = list(_compare_all(a, b, mine, names_b, show))
    parts = [item for part in gather_objects(compared, groups.world) for item in part]
    alone = [Difference(name, "missing", f"not in {second}") for name in sorted(names_a - names_b) + _unknown(a)]
    alone += [Difference(name, "extra", f"not in {first}") for name in sorted(names_b - names_a) + _unknown(b)]
    hashes = "".join(f"{name} {digest}\n" for name, digest, _, _ in sorted(parts, key=lambda part: part[0]))
    return Verdict(
        first=str(first),
        second=str(second),
        tensors=len(names_a),
        bytes=sum(size for _, _, size, _ in parts),
        equal=sum(difference is None and name in names_b for name, _, _, difference in parts),
        digest=hashlib.sha256(hashes.encode()).hexdigest(),
        differences=(*alone, *(difference for _, _, _, difference in parts if difference)),
    )


def _open(directory: Path, config: Path | None, groups: Groups, model: str) -> Side:
    if kind_of(directory) == "hugging-face":
        return StoredTensors(directory)
    home = home_of_config(directory, config, critic=model == CRITIC)
    return MegatronSource(directory, Model(home, groups, model), whole=False)


def _names(side: Side) -> set[str]:
    return {*side.names(), *_repeated(side)}


def _repeated(side: Side) -> dict[str, str]:
    return side.repeated if isinstance(side, MegatronSource) else {}


def _unknown(side: Side) -> list[str]:
    """Tensors in no Hugging Face name."""
    return side.unknown if isinstance(side, MegatronSource) else []


def _compare_all(
    a: Side, b: Side, names: Sequence[str], names_b: set[str], show: Show
) -> Iterator[tuple[str, str, int, Difference | None]]:
    """(name, hash in the first, bytes, what differs) of each of the first's tensors; of one that it alone has, None."""
    show.total(sum(_info_bytes(a, name) for name in names))
    for name in names:
        try:
            digest, size, difference = _compare(name, _reader(a), _reader(b if name in names_b else a))
        except WeightError as error:
            digest, size, difference = "", 0, Difference(name, "unreadable", str(error))
        show.moved(size)
        yield name, digest, size, difference
    a.release()
    b.release()


def _reader(side: Side) -> Callable[[str], torch.Tensor]:
    repeated = _repeated(side)
    return lambda name: side.read(repeated.get(name, name))


def _info_bytes(side: Side, name: str) -> int:
    repeated = _repeated(side)
    try:
        return side.info(repeated.get(name, name)).nbytes
    except WeightError:
        return 0


def _compare(
    name: str, read_a: Callable[[str], torch.Tensor], read_b: Callable[[str], torch.Tensor]
) -> tuple[str, int, Difference | None]:
    a, b = read_a(name), read_b(name)
    hash_a = _hash(a)
    if a.shape != b.shape:
        found = Difference(name, "shape", f"{tuple(a.shape)} and {tuple(b.shape)}")
    elif a.dtype != b.dtype:
        found = Difference(name, "dtype", f"{a.dtype} and {b.dtype}")
    elif (hash_b := _hash(b)) != hash_a:
        found = Difference(name, "values", f"{_how(a, b)}; sha256 {hash_a[:12]}... and {hash_b[:12]}...")
    else:
        return hash_a, a.nbytes, None
    return hash_a, a.nbytes, found


def _how(a: torch.Tensor, b: torch.Tensor) -> str:
    differ = int((a != b).sum())
    largest = float((a.double() - b.double()).abs().max())
    return f"{differ} of {a.numel()} elements differ, by {largest:.3g} at most"


def _hash(tensor: torch.Tensor) -> str:
    flat = tensor.detach().contiguous().reshape(-1).view(torch.uint8)
    return hashlib.sha256(flat.numpy().data).hexdigest()
