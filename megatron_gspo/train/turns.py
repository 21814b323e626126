"""Turns of trainer and servers on the same cards: who computes, who waits with what, and in which order they change.

    training   servers asleep; gradients and optimizer states on the cards
    updating   the servers' weights on the cards, for a push to fill; gradients gone, optimizer states in host memory
    serving    their cache too, and requests are let in

A weight version ends in "-asleep" while a server sleeps and in "-turning" while nobody can know: no response of such a
version is trained on, and a run that finds its servers in either knows what another has left behind. A call that fails
leaves servers of which nothing more is asked: two of SGLang's calls end a server that is not where they expect it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Protocol

from megatron_gspo.errors import ConfigError, SyncError
from megatron_gspo.platforms import release_unused
from megatron_gspo.rollout.engine import Control

Together = Callable[[Callable[[], Any]], Any]
WEIGHTS, CACHE = "weights", "kv_cache"
ASLEEP, TURNING = "-asleep", "-turning"


class Parked(Protocol):
    """What leaves the cards while servers compute (``megatron.network.Network``)."""

    def park(self) -> None:
        """Gives device memory up; safe to call again."""

    def unpark(self) -> None:
        """Takes it back; safe to call again."""


class Apart:
    """Servers have cards of their own, and nobody waits for anybody. Every method is collective."""

    forgets = False
    """Whether servers come to a push without the weights of the one before."""

    def begin(self) -> None:
        """Before any model is built."""

    def train(self, models: Sequence[Parked]) -> None:
        """Before passes and updates."""

    def update(self, models: Sequence[Parked]) -> None:
        """Before weights are pushed."""

    def serve(self, version: str) -> None:
        """After they were, as ``version``: responses may be asked for."""


class Colocated(Apart):
    """Trainer and servers take turns. Failures of the servers are SyncErrors on every rank."""

    forgets = True

    def __init__(self, control: Control | None, together: Together = lambda action: action()) -> None:
        """
        Args:
            control: of the servers, on the rank that asks them; None on all others.
            together: runs something on every rank, and raises on all what one raises.
        """
        self._control, self._together = control, together
        self._turn = "starting"

    def begin(self) -> None:
        """Servers that were just started, or that another run has left, go to sleep."""
        self._change("starting", "training", _begin)

    def train(self, models: Sequence[Parked]) -> None:
        """Servers sleep, then what training needs comes back. Nothing to do where they sleep already."""
        if self._turn != "training":
            self._change("serving", "training", _sleep)
        for model in models:
            model.unpark()

    def update(self, models: Sequence[Parked]) -> None:
        """What training needs leaves, on every rank, and then the servers' weights come back, with nothing in them.
        Servers that are awake, since nothing was trained, stay so."""
        self._together(lambda: _park(models))
        if self._turn != "serving":
            self._change("training", "updating", _wake_weights)

    def serve(self, version: str) -> None:
        """The cache comes back, empty, and requests are let in."""
        self._together(release_unused)  # what the push has left
        if self._turn != "serving":
            self._change("updating", "serving", lambda control: _wake_cache(control, version))

    def _change(self, before: str, after: str, ask: Callable[[Control], None]) -> None:
        if self._turn != before:
            raise SyncError(
                f"servers that take turns with the trainer: {after} follows {before}, and they are {self._turn}; "
                f"start the run again (train.resume = true), and servers of your own with it"
            )
        self._turn = "in an unknown state"
        self._together(lambda: ask(self._control) if self._control is not None else None)
        self._turn = after


def _park(models: Sequence[Parked]) -> None:
    for model in models:
        model.park()


def _begin(control: Control) -> None:
    """Raises ConfigError for servers that cannot sleep, SyncError where nobody knows whether they do."""
    for url, info in zip(control.urls, control.infos(), strict=True):
        if info.get("device", "cpu") != "cpu" and not info.get("enable_memory_saver"):
            raise ConfigError(
                f"{url} was started without --enable-memory-saver and cannot sleep while the trainer computes: start "
                f'it with that flag, or set placement.mode = "apart"'
            )
    found = control.versions()
    if all(version.endswith(ASLEEP) for version in found):
        return
    for url, version in zip(control.urls, found, strict=True):
        if version.endswith((ASLEEP, TURNING)):
            raise SyncError(f"{url} was left with weight version {version}, half asleep: start it again")
    _sleep(control)


def _sleep(control: Control) -> None:
    version = control.versions()[0]
    control.pause()
    control.flush_when_idle()  # a server that is not idle refuses, and does not die
    control.set_version(version + TURNING)
    control.sleep([CACHE, WEIGHTS])
    control.set_version(version + ASLEEP)


def _wake_weights(control: Control) -> None:
    control.set_version(control.versions()[0].removesuffix(ASLEEP) + TURNING)
    control.wake([WEIGHTS])


def _wake_cache(control: Control, version: str) -> None:
    control.check_version(version)
    control.set_version(version + TURNING)
    control.wake([CACHE])
    control.flush_when_idle()
    control.set_version(version)
    control.unpause()
