"""When every rollout server is lost: the run is saved, waits, and draws anew with the same seeds."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeVar

from megatron_gspo.errors import EngineUnavailableError, NoServerError
from megatron_gspo.parallel.exchange import broadcast_object
from megatron_gspo.runs.recording import Recorder
from megatron_gspo.train.assembly import Run

T = TypeVar("T")
LOOK_S = 1.0
"""Seconds between two looks at servers that are all away."""


@dataclass(frozen=True)
class Outages:
    """What a run does where it draws responses. Every method is collective."""

    run: Run
    recorder: Recorder
    save: Callable[[], str]
    """Saves the run as it was before the draw; what is saved, in words."""
    stop: Callable[[], None]
    """Raises RunStopped when the run was asked to stop."""

    def outlast(self, version: int, draw: Callable[[], T], *, savable: bool = True) -> T:
        """``draw``'s result, which needs servers with ``version``; begun anew each time that all of them were lost.

        What ``draw`` has done before it fails must leave no trace but the prompts that it took. ``savable``: whether
        the run may be saved as it is. Raises EngineUnavailableError when none has returned in time.
        """
        cursor, waited_since = self.run.cursor.state_dict(), None
        while True:
            try:
                return draw()
            except NoServerError as error:
                if not self.run.fleet.survives:
                    raise
                self.run.cursor.load_state_dict(cursor)
                waited_since = waited_since or time.monotonic()
                self._wait(version, str(error), waited_since, savable=savable)

    def _wait(self, version: int, why: str, since: float, *, savable: bool) -> None:
        wait_s = self.run.config.rollout.wait_for_servers_s
        self._say()
        saved = self.save() if savable else "what was done since the last checkpoint is not saved"
        text = f"no rollout server is left ({why}); {saved}"
        if wait_s:
            self.recorder.phase("waiting for a rollout server")
            self.recorder.note(f"warning: {text}; waiting {wait_s:g} s for one to return (rollout.wait_for_servers_s)")
        while self._time_left(since):
            self.stop()
            time.sleep(LOOK_S)
            if self._ready(version):
                self._say()
                self.recorder.note(f"goes on with {', '.join(self.run.fleet.up)}")
                return
        raise EngineUnavailableError(
            f"{text}, and none has returned within rollout.wait_for_servers_s = {wait_s:g} s; train.resume = true "
            f"continues"
        )

    def _ready(self, version: int) -> bool:
        try:
            return self.run.ready(version)
        except NoServerError:  # the router
            return False

    def _time_left(self, since: float) -> bool:
        """By the first rank's clock."""
        left = time.monotonic() < since + self.run.config.rollout.wait_for_servers_s
        return broadcast_object(left, 0, self.run.groups.world)

    def _say(self) -> None:
        for notes in (self.run.fleet.notes, self.run.notes):
            while notes:
                self.recorder.note(notes.pop(0))
