"""Starting the ranks of a run on this machine, as torchrun would, and passing on how they ended."""

from __future__ import annotations

import contextlib
import logging
import os
import signal
import sys
import uuid
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import psutil
from torch.distributed.elastic.multiprocessing.api import DefaultLogsSpecs, SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
from torch.distributed.launcher.api import LaunchConfig, elastic_launch

from megatron_gspo.calls import server_key
from megatron_gspo.config import RunConfig
from megatron_gspo.data.files import check_readable
from megatron_gspo.errors import ConfigError, WeightError
from megatron_gspo.hf.catalog import read_model
from megatron_gspo.hf.checkpoint import HfReader
from megatron_gspo.hf.layout import check_layout, check_recompute, check_replay
from megatron_gspo.limits import allow_open_files, name_of
from megatron_gspo.megatron.checkpoint_files import is_distributed, latest_in
from megatron_gspo.parallel.rendezvous import keep_to_loopback, private_store
from megatron_gspo.rewards.interface import RewardContext
from megatron_gspo.rewards.registry import check_reward
from megatron_gspo.runs.restarts import Restarts
from megatron_gspo.suites.catalog import read_all_asked
from megatron_gspo.supervise import STOPS
from megatron_gspo.train.models import check_models
from megatron_gspo.train.reward import check_reward_server


def check_before_start(config: RunConfig) -> None:
    """What can be said within seconds, without a process group and without a server: raises UserError."""
    if too_few := allow_open_files():
        raise ConfigError(too_few)
    _, shape = read_model(config.model.path)
    check_layout(config.parallel, shape)
    check_recompute(config.model, config.parallel, shape)
    check_replay(config.replay, shape)
    check_models(config)
    if not is_distributed(Path(config.model.path)):
        HfReader(config.model.path)
    for path in config.data.paths.values():
        check_readable(path)
    read_all_asked(config.eval.suites)
    if config.algorithm.draws_responses:
        for reward in {source.name: source.reward_config(config.reward) for source in config.data.sources}.values():
            check_reward(reward, RewardContext.of(config))
        check_reward(config.reward, RewardContext.of(config))
        check_reward_server(config)
        if config.rollout.named:
            server_key()
        if config.data.eval_path:
            check_readable(config.data.eval_path)


def launch(
    config_path: Path,
    overrides: Sequence[str],
    *,
    ranks: int,
    servers: Sequence[str] = (),
    run_dir: Path | None = None,
    restarts: Restarts | None = None,
) -> int:
    """Runs ``train`` on ``ranks`` processes, which talk to ``servers`` (URLs).

    SIGTERM and SIGUSR1 go on to the ranks, which finish their outer step, save and stop. Ranks that fail otherwise, and
    not by a mistake of the user's, are started again as ``restarts`` says. Returns 0, the exit status (1, 2, or 75 when
    stopped so) of the rank that failed first, or 128 + the signal that ended the run.
    """
    # Several ranks on few cores fight over them when each starts a thread a core.
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    for name in list(logging.root.manager.loggerDict):
        if name.startswith("torch.distributed.elastic"):  # each has a level of its own; a rank says itself what failed
            logging.getLogger(name).setLevel(logging.CRITICAL)
    asked: list[int] = []
    for number in STOPS:
        signal.signal(number, lambda number, frame: _pass_on(number, asked))
    command = ("-m", "megatron_gspo.cli", "train", str(config_path), *overrides)
    more: tuple[str, ...] = ()
    while True:
        status, failed, said = _run_once((*command, *more), ranks, servers, run_dir)
        again = restarts.after(failed) if restarts and failed and not asked else None
        if again is None:
            if failed and not said:
                print(f"error: {failed}", file=sys.stderr)
            if failed and restarts and not asked and (words := restarts.given_up()):
                print(f"error: {words}", file=sys.stderr)
            return status
        line, more = again
        print(line, file=sys.stderr, flush=True)


def _run_once(
    command: Sequence[str], ranks: int, servers: Sequence[str], run_dir: Path | None
) -> tuple[int, str, bool]:
    """One start of the ranks: its exit status, what failed ("" for what no further start would mend, and a run that is
    done), and whether a rank has said so."""
    try:
        # On SIGTERM it would kill the ranks 30 s later, in their step.
        with ranks_here(ranks, servers, signals_to_handle="SIGINT,SIGHUP,SIGQUIT") as config:
            elastic_launch(config, sys.executable)(*command)
    except ChildFailedError as error:
        rank, failure = error.get_first_failure()
        if -failure.exitcode in STOPS:  # before it could take it as a request
            return _ended_by(signal.Signals(-failure.exitcode), run_dir), "", True
        if failure.exitcode < 0:  # it could not say so itself
            return 1, f"rank {rank} was ended by {name_of(-failure.exitcode)}", False
        if failure.exitcode in (2, os.EX_TEMPFAIL):
            return failure.exitcode, "", True
        return 1, f"rank {rank} failed", True
    except SignalException as error:  # Ctrl-C, or a scheduler's end of the job; the ranks have been ended with it
        return _ended_by(error.sigval, run_dir), "", True
    return 0, "", True


@contextlib.contextmanager
def ranks_here(ranks: int, servers: Sequence[str] = (), **settings: Any) -> Iterator[LaunchConfig]:
    """So many processes on this machine, which torch does not start again; further settings are ``LaunchConfig``'s.

    Ranks and torch's launcher meet in files of a private directory, and what gloo and nccl listen on is loopback,
    unless one of ``servers`` (URLs) is on another machine.
    """
    keep_to_loopback(servers)
    os.environ["TORCH_DISABLE_SHARE_RDZV_TCP_STORE"] = "1"  # else the launcher listens for ranks that never call
    with private_store() as directory:
        yield LaunchConfig(
            run_id=uuid.uuid4().hex,
            min_nodes=1,
            max_nodes=1,
            nproc_per_node=ranks,
            rdzv_backend="c10d",
            rdzv_endpoint=str(directory / "rendezvous"),
            rdzv_configs={"store_type": "file"},
            logs_specs=DefaultLogsSpecs(
                log_dir=str(directory / "logs")
            ),  # else a directory in /tmp, and it stays there
            max_restarts=0,
            monitor_interval=0.1,
            **settings,
        )


def _pass_on(number: int, asked: list[int]) -> None:
    asked.append(number)
    for rank in psutil.Process().children():
        with contextlib.suppress(psutil.NoSuchProcess):
            rank.send_signal(number)


def _ended_by(number: signal.Signals, run_dir: Path | None) -> int:
    print(f"error: ended by {number.name}{what_is_left(run_dir)}", file=sys.stderr)
    return 128 + number


def what_is_left(run_dir: Path | None) -> str:
    """What to say of a run that was ended: where ``train.resume = true`` would go on."""
    if run_dir is None:
        return ""
    try:
        latest = latest_in(run_dir / "checkpoints")
    except WeightError:
        return ""
    if latest is None:
        return f": {run_dir} has no checkpoint to go on from" if run_dir.exists() else ": nothing was written yet"
    return f": the same command with train.resume=true train.overwrite=false goes on from {latest}"
