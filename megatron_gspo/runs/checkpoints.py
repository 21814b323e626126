"""A run's checkpoints: when one is saved, what is in it, and which stay."""

from __future__ import annotations

import contextlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Self

import torch.distributed as dist

from megatron_gspo.config import RunConfig
from megatron_gspo.errors import RunStopped
from megatron_gspo.megatron.checkpoint import POLICY, Models, begin_save, load_checkpoint
from megatron_gspo.megatron.checkpoint_files import clear_leftovers, move_latest, name_of, retire
from megatron_gspo.megatron.checkpoint_write import PendingSave
from megatron_gspo.parallel.exchange import together
from megatron_gspo.runs.resume import Resumption
from megatron_gspo.runs.save import Exports
from megatron_gspo.runs.uploads import CheckpointHook
from megatron_gspo.storage import writing
from megatron_gspo.train.progress import Progress


class Checkpoints:
    """Saves after the outer steps that the configuration names. Every method is collective.

    A checkpoint counts once ``latest`` names it; only then are older ones removed. With ``checkpoint_async`` that is
    when every rank has written: at the end of a later outer step, before the next save at the latest.

    Left with an exception, it removes what is on its way to disk: a full one needs the room.
    """

    def __init__(self, config: RunConfig, models: Models, identity: Mapping[str, Any]) -> None:
        self._train, self._models, self._identity = config.train, models, dict(identity)
        self._root = Path(config.train.run_dir).absolute() / "checkpoints"  # a thread writes it, and a reward may chdir
        self._pending: PendingSave | None = None
        self._newest: Path | None = None
        self._saved_at = 0
        self._world = models[POLICY].groups.world
        self._exports = Exports(config, models[POLICY])
        self._hook = CheckpointHook(config.train)
        self._on_first_rank(lambda: clear_leftovers(self._root))

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: object, error: BaseException | None, traceback: object) -> None:
        if error is not None:
            self._exports.discard()
            if self._pending is not None:
                self._pending.discard()
        self._wait_for_hook(error)

    def _wait_for_hook(self, error: BaseException | None) -> None:
        if error is None or isinstance(error, RunStopped):
            together(self._hook.finish, self._world)  # all wait for the first rank here, where nothing times out
        elif isinstance(error, Exception):
            self._hook.finish()
        if error is None and self._newest is not None and dist.get_rank() == 0:
            with contextlib.suppress(OSError):  # it goes the next time
                self._retire(self._newest)  # one that was busy had to stay

    def restore(self, resumption: Resumption, progress: Progress) -> None:
        """Models and progress as they were. Raises WeightError or DataError when they cannot be."""
        load_checkpoint(self._models, resumption.directory)
        for name, model in self._models.items():
            if name in resumption.extra:
                model.load_state_dict(resumption.extra[name])
        progress.load_state_dict(resumption.extra, self._train.resume_changes)
        self._saved_at = progress.outer_steps
        if dist.get_rank() == 0:
            self._hook.add_unless_done(resumption.directory)

    def after_step(self, progress: Progress, *, last: bool) -> None:
        """Saves when it is time; always when ``last``, which also waits until it is on disk. Exports, too."""
        self._exports.after_step(progress.outer_steps, last=last)
        self._publish(wait=last)
        every, done = self._train.checkpoint_every, progress.outer_steps
        if last or (every and done % every == 0):
            self._save(progress, background=self._train.checkpoint_async and not last)

    def keep(self, progress: Progress) -> str:
        """Saves now, where that was not done after the last step; says what there is."""
        self._publish(wait=True)
        self._save(progress, background=False)
        done = progress.outer_steps
        return f"outer step {done} is saved" if done else "nothing is done yet that could be saved"

    def _save(self, progress: Progress, *, background: bool) -> None:
        done = progress.outer_steps
        if done > self._saved_at:
            self._publish(wait=True)
            extra = progress.state_dict() | self._identity
            extra |= {name: state for name, model in self._models.items() if (state := model.state_dict())}
            self._pending = begin_save(self._models, self._root / name_of(done), extra, background=background)
            self._saved_at = done
            self._publish(wait=not background)

    def _publish(self, *, wait: bool) -> None:
        """Finishes the save in flight, if there is one and it is written (or with ``wait``)."""
        if self._pending is None or not (wait or self._pending.written()):
            return
        pending, self._pending = self._pending, None
        pending.finish()
        self._on_first_rank(lambda: self._move_on(pending.directory))

    def _move_on(self, newest: Path) -> None:
        with writing(newest.parent, then="train.resume = true continues from the checkpoint that `latest` names"):
            move_latest(newest)
            self._newest = newest
            self._hook.add(newest)
            self._retire(newest)

    def _retire(self, newest: Path) -> None:
        with self._hook.pruning() as busy:
            retire(newest, keep_last=self._train.keep_last, keep_every=self._train.keep_every, busy=busy)

    def _on_first_rank(self, action: Any) -> None:
        together(lambda: action() if dist.get_rank() == 0 else None, self._world)
