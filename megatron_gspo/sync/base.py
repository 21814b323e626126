"""Weight sync: the trainer's weights, in Hugging Face names, onto every rollout server."""

from __future__ import annotations

import functools
import pkgutil
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Protocol, TypeVar

import torch

from megatron_gspo.config import SyncConfig
from megatron_gspo.errors import NoAnswerError, SyncError
from megatron_gspo.hf.checkpoint import HfReader, buckets
from megatron_gspo.rollout.engine import make_control
from megatron_gspo.sync.peers import Peers
from megatron_gspo.sync.verify import Reset
from megatron_gspo.types import OPEN, ServerAccess

NamedTensor = tuple[str, torch.Tensor]
"""A Hugging Face name and its whole tensor, where the trainer has it."""
Names = list[str]
R = TypeVar("R")

METHODS = {
    "disk": "megatron_gspo.sync.disk:DiskSync",
    "tensor": "megatron_gspo.sync.tensor:TensorSync",
    "distributed": "megatron_gspo.sync.distributed:DistributedSync",
    "ipc": "megatron_gspo.sync.ipc:IpcSync",
}
"""Adding a method is one file with a subclass of ``BucketSync`` and one entry here (and in ``SyncConfig``)."""
AUTO, CHOSEN = "auto", "megatron_gspo.sync.auto:ChosenSync"
HOST_BUCKET_MB, CARD_BUCKET_MB = 64, 512
"""Megabytes of a bucket in host memory, and of one that stays in GPU memory, where each request costs more than its
bytes."""


class WeightSync(Protocol):
    """Called by all trainer ranks."""

    @property
    def wants_all(self) -> bool:
        """Whether the next push must have every tensor: servers are fresh, or verifying overwrites what they have."""
        ...

    def push(self, tensors: Iterator[NamedTensor], version: int, names: Collection[str] | None = None) -> str:
        """Replaces the servers' weights by ``tensors`` and their version by ``version``; returns what was verified, on
        rank 0, or "". ``names``: those that come, the same on every rank, where not all tensors do (``wants_all``).

        ``tensors`` yields on the rank that owns a tensor, once over all ranks, and is exhausted on every rank, since
        producing it may be collective. They may be views of live weights: nothing reads them after the push. No rank
        holds more than a bucket. Raises SyncError on all ranks if anything failed on one; the servers' version is then
        one that no rollout accepts.
        """
        ...

    def close(self) -> None:
        """Removes what the method keeps between pushes."""
        ...

    def fill(self, tensors: Iterator[NamedTensor], version: int, urls: Sequence[str] | None = None) -> str:
        """Sends ``tensors`` to those servers alone that do not hold ``version``: started again, or new. Returns which
        they were and what was verified, on rank 0; "" when all hold it, and then ``tensors`` is not touched.

        ``urls``: all servers from now on, when they are others than before. Raises SyncError as ``push`` does.
        """
        ...

    def reach(self, urls: Sequence[str]) -> None:
        """Sends to these alone from now on, of the servers that there are: others are gone. Collective."""
        ...

    def describe(self) -> dict[str, str]:
        """For people and the manifest: {"method", "path"}, "path" as far as it is known by now. Collective."""
        ...


def make_weight_sync(
    config: SyncConfig,
    urls: Sequence[str],
    peers: Peers,
    *,
    model_path: str | Path,
    expected_names: Collection[str] | None = None,
    access: ServerAccess = OPEN,
    shared: bool = False,
    engine: str = "sglang",
    health_every_s: float = 20.0,
) -> WeightSync:
    """The configured method.

    ``model_path`` is the Hugging Face directory that the servers started from (its ``config.json`` goes beside the
    weights of "disk"). One push must cover ``expected_names`` exactly; when absent, the names in ``model_path``'s
    safetensors files. A server ignores a tensor whose name it does not know, and keeps the old weights of one that it
    is not sent; neither is an error to it.

    "auto" asks the servers at the first push (``sync.auto``). ``shared``: the servers may run as another user, who must
    be able to read the files of "disk". ``engine``: whose servers they are, and ``health_every_s``: seconds of silence
    between questions whether one is there.
    """

    def make(config: SyncConfig) -> BucketSync:
        kind = BucketSync if config.method == AUTO else pkgutil.resolve_name(METHODS[config.method])
        sync: BucketSync = kind(config, urls, peers, model_path, expected_names, access, engine, health_every_s)
        sync.shared = shared
        return sync

    sync: WeightSync = pkgutil.resolve_name(CHOSEN)(make(config), make) if config.method == AUTO else make(config)
    return sync


class BucketSync:
    """The order of every method: rank 0 begins, every rank sends its tensors in buckets, rank 0 finishes.

    Each of the three ends in a collective that spreads failures, so that no rank waits for one that has raised.

    The version is written last, after every bucket of every rank and what confirms them; until then the servers report
    one that is no version, so that rollouts from half-written weights are refused.
    """

    shared = False
    """As in ``make_weight_sync``."""
    _verified = False
    _filled = False
    """Whether the servers have every tensor, from a push that succeeded."""
    _reset: Reset | None = None
    _pushed = ""
    """The version that every server was left with."""
    _unverified = ""
    _remark = ""
    """On rank 0: what the method has to say of the next push that succeeds."""

    def __init__(
        self,
        config: SyncConfig,
        urls: Sequence[str],
        peers: Peers,
        model_path: str | Path,
        expected_names: Collection[str] | None,
        access: ServerAccess = OPEN,
        engine: str = "sglang",
        health_every_s: float = 20.0,
    ) -> None:
        self._health_every_s = health_every_s
        self.config = config
        self.peers = peers
        self.access = access
        self._engine = engine
        self.serve(urls)
        self.model_path = Path(model_path)
        self.expected_names = frozenset(HfReader(model_path).names() if expected_names is None else expected_names)

    def serve(self, urls: Sequence[str]) -> None:
        """Sends to these servers from now on."""
        timeout_s, every_s = self.config.timeout_s, self._health_every_s
        self.servers = make_control(self._engine, urls, timeout_s, self.access.key, every_s)

    @property
    def wants_all(self) -> bool:
        """See ``WeightSync.wants_all``."""
        return not self._filled or self.config.verify == "every"

    def push(self, tensors: Iterator[NamedTensor], version: int, names: Collection[str] | None = None) -> str:
        """See ``WeightSync.push``."""
        if names is not None and self.wants_all:
            raise SyncError(f"a push of {len(names)} tensors, and the servers have no others yet")
        expected = self.expected_names if names is None else frozenset(names)
        verifying = self.config.verify == "every" or (self.config.verify == "first" and not self._verified)
        try:
            begin = functools.partial(self._start, version, verifying=verifying, whole=names is None)
            place = self.peers.together(lambda: begin() if self.peers.lead else "")[0]
            self._agree(place)
            sent = self.peers.together(lambda: self._stream(place, tensors))
            said = self.peers.together(
                lambda: self._complete(place, version, sent, expected) if self.peers.lead else ""
            )[0]
        except SyncError:
            self._filled = False
            if self.peers.lead:
                self._abandon()
            raise
        finally:
            self._rest()
        self._filled = True
        self._verified = self._verified or verifying
        self._pushed = self.access.version_name(version)
        self._unverified = ""
        self._remark = ""
        return said

    def fill(self, tensors: Iterator[NamedTensor], version: int, urls: Sequence[str] | None = None) -> str:
        """See ``WeightSync.fill``."""
        if urls is not None and tuple(urls) != self.servers.urls:
            self.close()
            self.serve(urls)
        wanted = self.access.version_name(version)
        empty = self.peers.together(lambda: self._without(wanted) if self.peers.lead else ())[0]
        if not empty:
            return ""
        self.close()  # what was shared with a server that is gone serves nobody
        given = (self.peers, self.model_path, self.expected_names, self.access, self._engine, self._health_every_s)
        part = type(self)(self.config, empty, *given)
        part.shared = self.shared
        try:
            said = part.push(tensors, version)
        finally:
            part.close()
        return "; ".join(filter(None, (f"weights of version {version} went to {', '.join(empty)}", said)))

    def reach(self, urls: Sequence[str]) -> None:
        """See ``WeightSync.reach``."""
        if tuple(urls) != self.servers.urls:
            self.close()  # what was shared with a server that is gone serves nobody
            self.serve(urls)

    def _without(self, version: str) -> tuple[str, ...]:
        """The servers that report another version."""
        found = zip(self.servers.urls, self.servers.versions(), strict=True)
        return tuple(url for url, reported in found if reported != version)

    def describe(self) -> dict[str, str]:
        """See ``WeightSync.describe``."""
        return {"method": self.config.method, "path": self._path()}

    def close(self) -> None:
        """See ``WeightSync.close``."""

    def _start(self, version: int, *, verifying: bool, whole: bool) -> str:
        # A version of ours may have an ending while trainer and servers take turns.
        if self._pushed and not all(found.startswith(self._pushed) for found in self.servers.versions()):
            if not whole:
                restarted = ", ".join(self._without(self._pushed))
                raise SyncError(f"{restarted}: started again since the last push, and this one is not of all weights")
            self.close()  # one was started again since: what was shared with it serves nobody
            self.serve(self.servers.urls)
            verifying = verifying or self.config.verify == "first"
        self.servers.flush_when_idle()
        self.servers.set_version(f"{self.access.version_name(version)}-incomplete")
        place = self._begin()
        self._reset = self._begin_verifying() if verifying else None
        return place

    def _begin_verifying(self) -> Reset | None:
        """None, with the reason in ``_unverified``, for servers that cannot tell, unless "every" asks for it."""
        try:
            return Reset(self.servers)
        except NoAnswerError:
            raise
        except SyncError as error:
            if self.config.verify == "every":
                raise
            self._unverified = f"warning: the first sync is not verified: {error}"
            return None

    def _stream(self, place: str, tensors: Iterator[NamedTensor]) -> list[tuple[Names, str]]:
        self._open(place)
        try:
            return send_all(tensors, self._bucket_mb() * 1_000_000, lambda bucket: self._send(place, bucket))
        finally:
            self._flush()

    def _complete(self, place: str, version: int, sent: list[list[tuple[Names, str]]], expected: frozenset[str]) -> str:
        check_names([name for rank in sent for names, _ in rank for name in names], expected)
        self._finish(place, sent)
        said = self._unverified if self._reset is None else self._reset.check()
        self.servers.flush_when_idle()  # whatever was cached since _start comes from half-written weights
        self.servers.set_version(self.access.version_name(version))
        self.servers.check_version(self.access.version_name(version))
        return "; ".join(filter(None, (said, self._remark)))

    def _begin(self) -> str:
        """On rank 0, with generation idle; the result reaches ``_send`` on every rank."""
        raise NotImplementedError

    def _bucket_mb(self) -> int:
        return self.config.bucket_mb or HOST_BUCKET_MB

    def _path(self) -> str:
        """Over what the method sends."""
        raise NotImplementedError

    def _agree(self, place: str) -> None:
        """On every rank, before ``_open``: what ranks must ask each other. Raises SyncError on all of them, or none."""

    def _open(self, place: str) -> None:
        """On every rank, before its first ``_send``."""

    def _send(self, place: str, bucket: list[NamedTensor]) -> str:
        """On the owner; the result reaches ``_finish`` with the bucket's names."""
        raise NotImplementedError

    def _flush(self) -> None:
        """On every rank, after its last ``_send``, also when one failed: what is under way arrives, or is given up."""

    def _finish(self, place: str, sent: list[list[tuple[Names, str]]]) -> None:
        """On rank 0, when every rank has sent its tensors; ``sent[rank]`` holds (names, ``_send``'s result)."""
        raise NotImplementedError

    def _rest(self) -> None:
        """On every rank, at the end of a push: what only a sync needs of a GPU's memory goes back."""

    def _abandon(self) -> None:
        """On rank 0, after a failure: leaves the servers able to begin again."""


def send_all(
    tensors: Iterable[NamedTensor], limit: int, send: Callable[[list[NamedTensor]], R]
) -> list[tuple[Names, R]]:
    """Sends buckets of at most ``limit`` bytes; returns each one's names and result.

    A failure to send is raised only when ``tensors`` is exhausted: other ranks take part in producing them.
    """
    sent: list[tuple[Names, R]] = []
    failure: Exception | None = None
    for bucket in buckets(((name, tensor.detach().contiguous()) for name, tensor in tensors), limit):
        if failure is None:
            try:
                sent.append(([name for name, _ in bucket], send(bucket)))
            except Exception as error:
                failure = error
    if failure is not None:
        raise failure
    return sent


def check_names(names: Sequence[str], expected: frozenset[str]) -> None:
    """Raises SyncError for a name sent twice, and for names that differ from ``expected``."""
    distinct = set(names)
    twice = sorted(name for name, count in Counter(names).items() if count > 1)
    if twice:
        raise SyncError(f"{len(twice)} tensors were sent by more than one owner, first {twice[0]}")
    if distinct != expected:
        missing, unknown = sorted(expected - distinct), sorted(distinct - expected)
        raise SyncError(
            f"the trainer sent {len(names)} tensors, the servers' model has {len(expected)}: "
            f"missing {missing[:3]}, unknown {unknown[:3]}"
        )


def on_host(bucket: list[NamedTensor]) -> list[NamedTensor]:
    """A bucket's tensors in host memory."""
    return [(name, tensor.cpu()) for name, tensor in bucket]


def own_storage(tensor: torch.Tensor) -> torch.Tensor:
    """The tensor in a storage of its own size: of a view, pickle writes the whole storage."""
    return tensor if tensor.untyped_storage().nbytes() == tensor.nbytes else tensor.clone()
