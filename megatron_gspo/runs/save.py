"""Writing the policy as a Hugging Face directory: at once, or in the background while training goes on."""

from __future__ import annotations

import functools
import shutil
import sys
from collections.abc import Callable, Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import AbstractContextManager
from itertools import chain
from pathlib import Path

import torch
import torch.distributed as dist

from megatron_gspo.config import RunConfig
from megatron_gspo.data.tokenizer import open_tokenizer
from megatron_gspo.errors import MegatronGspoError
from megatron_gspo.hf.carried import Carried, find_carried
from megatron_gspo.hf.catalog import read_model
from megatron_gspo.hf.checkpoint import write_shards
from megatron_gspo.hf.critic import name_as_critic
from megatron_gspo.hf.directory import copy_companions, name_shards, name_stop_tokens, write_index
from megatron_gspo.megatron.checkpoint import POLICY, Models
from megatron_gspo.megatron.checkpoint_files import UNFINISHED, clear_leftovers, name_of, put_in_place
from megatron_gspo.megatron.groups import Groups
from megatron_gspo.megatron.network import Network
from megatron_gspo.parallel.exchange import agree, gather_objects, together
from megatron_gspo.storage import writing

SHARD_BYTES = 4 * 1024**3
EXPORTS = "exports"
"""In a run's directory: what ``train.save_hf_every`` writes, a directory an outer step."""


class HuggingFaceSave:
    """A directory that transformers and SGLang load, on its way to disk; each owner writes its own tensors.

    Every rank makes one and calls its methods; all are collective. It is written under another name and moved when it
    is whole. The configuration and the tokenizer are those of ``model.path``, of a critic of ``critic.path`` where that
    is set; ``dtype`` becomes the model's. Layers that the family carries without computing them (multi-token
    prediction) come from there unchanged; a critic has none.
    """

    def __init__(self, config: RunConfig, groups: Groups, directory: Path, *, critic: bool = False) -> None:
        self._config, self._world, self.directory, self._critic = config, groups.world, directory, critic
        self._unfinished = directory.with_name(directory.name + UNFINISHED)
        self._home = Path((config.critic.path if critic else "") or config.model.path)
        self._carried = None if critic else together(self._find_carried, groups.world)
        self._on_first_rank(self._begin)

    def _find_carried(self) -> Carried:
        return find_carried(self._home, read_model(self._home)[1])

    def write(self, tensors: Iterable[tuple[str, torch.Tensor]]) -> dict[str, str]:
        """Writes this rank's tensors; not collective. Returns {tensor name: file name}. Raises WriteError."""
        if dist.get_rank() == 0 and self._carried is not None:
            tensors = chain(tensors, self._carried.tensors())
        with self._refusals():
            return write_shards(self._unfinished, tensors, owner=dist.get_rank(), max_bytes=SHARD_BYTES)

    def publish(self, weight_map: dict[str, str]) -> None:
        """Gives the directory its name, when every rank has written."""
        parts = gather_objects(weight_map, self._world)
        self._on_first_rank(lambda: self._publish({name: file for part in parts for name, file in part.items()}))

    def discard(self) -> None:
        """Removes what there is of it: a full disk needs the room. Not collective."""
        if dist.get_rank() == 0:
            shutil.rmtree(self._unfinished, ignore_errors=True)

    def _begin(self) -> None:
        shutil.rmtree(self._unfinished, ignore_errors=True)
        self._unfinished.mkdir(parents=True)

    def _publish(self, weight_map: dict[str, str]) -> None:
        write_index(self._unfinished, name_shards(self._unfinished, weight_map))
        for line in copy_companions(self._home, self._unfinished, dtype=self._config.model.dtype):
            _warn_once(line)
        if self._critic:
            name_as_critic(self._unfinished)
        if self._config.rollout.stop_tokens:
            name_stop_tokens(self._unfinished, open_tokenizer(self._config).stop_ids)
        put_in_place(self._unfinished, self.directory)

    def _refusals(self) -> AbstractContextManager[None]:
        return writing(self.directory, "the export", "train.resume = true goes on from the newest checkpoint")

    def _on_first_rank(self, action: Callable[[], None]) -> None:
        def act() -> None:
            if dist.get_rank() == 0:
                with self._refusals():
                    action()

        together(act, self._world)


def save_models(models: Models, config: RunConfig, groups: Groups) -> None:
    """Writes what was trained to ``hf`` (the policy), ``critic-hf``, ... in the run's directory. Collective."""
    for name, model in models.items():
        directory = "hf" if name == POLICY else f"{name}-hf"
        save_hugging_face(model, config, groups, Path(config.train.run_dir) / directory)


def save_hugging_face(model: Network, config: RunConfig, groups: Groups, directory: Path) -> None:
    """Writes a model now, one tensor at a time. Collective. Raises WriteError on every rank when one cannot."""
    save = HuggingFaceSave(config, groups, directory, critic=model.valued)
    error: Exception | None = None
    weight_map: dict[str, str] = {}
    tensors = model.weights()
    try:
        weight_map = save.write(tensors)
    except MegatronGspoError as caught:
        error = caught
        for _ in tensors:  # the others are gathering with this rank
            pass
    try:
        agree(error, groups.world)
        save.publish(weight_map)
    except Exception:
        save.discard()
        raise


class BackgroundSave:
    """The policy as it is now, written by a thread of each rank from copies in host memory. Methods are collective."""

    def __init__(self, policy: Network, config: RunConfig, directory: Path) -> None:
        self._world = policy.groups.world
        self._save = HuggingFaceSave(config, policy.groups, directory)
        tensors = list(policy.weights())
        executor = ThreadPoolExecutor(1, thread_name_prefix="export")
        self._writing: Future[dict[str, str]] = executor.submit(self._save.write, tensors)
        executor.shutdown(wait=False)

    def written(self) -> bool:
        """Whether every rank has written its share, or failed to."""
        return all(gather_objects(self._writing.done(), self._world))

    def discard(self) -> None:
        """Gives it up, written or not: what is still being written fails. Not collective."""
        self._save.discard()

    def finish(self) -> None:
        """Waits for all ranks and gives the directory its name. Raises WriteError on every rank when one failed."""
        try:
            weight_map = together(self._writing.result, self._world)
            self._save.publish(weight_map)
        except Exception:
            self._save.discard()
            raise


class Exports:
    """Hugging Face directories at the outer steps of ``train.save_hf_every``, in ``run_dir/exports``. Collective.

    One is written at a time: the next waits for it.
    """

    def __init__(self, config: RunConfig, policy: Network) -> None:
        self._config, self._policy = config, policy
        self._root = Path(config.train.run_dir).absolute() / EXPORTS  # a thread writes it, and a reward may chdir
        self._pending: BackgroundSave | None = None
        together(lambda: clear_leftovers(self._root) if dist.get_rank() == 0 else None, policy.groups.world)

    def after_step(self, outer_steps: int, *, last: bool) -> None:
        """Starts a save when it is time; when ``last``, also waits until it is on disk."""
        self._publish(wait=False)
        every = self._config.train.save_hf_every
        if every and outer_steps % every == 0:
            self._publish(wait=True)
            self._pending = BackgroundSave(self._policy, self._config, self._root / name_of(outer_steps))
        self._publish(wait=last)

    def discard(self) -> None:
        """Gives up what is on its way to disk. Not collective."""
        if self._pending is not None:
            self._pending.discard()

    def _publish(self, *, wait: bool) -> None:
        if self._pending is None or not (wait or self._pending.written()):
            return
        pending, self._pending = self._pending, None
        pending.finish()


@functools.cache
def _warn_once(text: str) -> None:
    """A line on the terminal, once a process: each export has it again."""
    print(f"warning: {text}", file=sys.stderr, flush=True)
