"""A run from its configuration to its report: what every rank executes."""

from __future__ import annotations

import contextlib
import os
import secrets
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from megatron_gspo.platforms import here
from megatron_gspo.config import Placement, RunConfig
from megatron_gspo.data.cursor import PromptCursor
from megatron_gspo.errors import ConfigError, RolloutError, RunStopped
from megatron_gspo.parallel.exchange import agree, broadcast_object, together
from megatron_gspo.megatron.checkpoint import POLICY, Models
from megatron_gspo.megatron.groups import Groups, make_groups, start_distributed
from megatron_gspo.megatron.policy import Policy
from megatron_gspo.rollout.engine import local_servers
from megatron_gspo.runs.adapters import save_adapters
from megatron_gspo.runs.checkpoints import Checkpoints
from megatron_gspo.train.assembly import Inputs, Run, build_run, load_inputs
from megatron_gspo.train.engine_dtype import served_directory
from megatron_gspo.train.evaluate import evaluate
from megatron_gspo.runs.experiment import contents
from megatron_gspo.train.models import placed_here, served
from megatron_gspo.train.profile import Profiles
from megatron_gspo.train.progress import Progress, seed_generators
from megatron_gspo.runs.nodes import named_servers
from megatron_gspo.runs.recording import MakeRecorder, Recorder, open_recorder
from megatron_gspo.runs.resume import Resumption, find_resumption, identify
from megatron_gspo.runs.save import save_models
from megatron_gspo.train.sft import Examples, fine_tune, load_examples
from megatron_gspo.train.step import empty_text, outer_step
from megatron_gspo.runs.stopping import StopRequest
from megatron_gspo.train.survey import survey_references
from megatron_gspo.runs.waiting import starting_servers
from megatron_gspo.types import ServerAccess
from megatron_gspo.versions import untested


def train(config: RunConfig, make_recorder: MakeRecorder) -> None:
    """Trains as the configuration says; every rank of the world calls it.

    Raises MegatronGspoError; RunStopped, once a checkpoint is saved, when a signal asked a rank to stop.
    """
    start_distributed()
    groups = make_groups(config.parallel)
    set_determinism(config)
    supervised = not config.algorithm.draws_responses
    inputs = together(lambda: load_examples(config) if supervised else load_inputs(config), groups.world)
    first = dist.get_rank() == 0
    prints, named = broadcast_object(
        together(lambda: (inputs.fingerprints(), contents(config)) if first else None, groups.world), 0, groups.world
    )
    identity = identify(config, prints, named)
    resumption = find_resumption(config, identity, groups)
    notes: list[str] = []
    if isinstance(inputs, Inputs):
        inputs, notes = survey_references(config, inputs, groups)
    with StopRequest() as stop:
        try:
            with open_recorder(make_recorder, config, groups, resumption) as recorder:
                for note in (inputs.describe(), *notes):
                    recorder.note(note)
                if resumption is not None:
                    recorder.note(resumption.describe())
                session = Session(config, groups, identity, resumption, stop, recorder)
                models = supervise(session, inputs) if isinstance(inputs, Examples) else reinforce(session, inputs)
                if models[POLICY].adapted:
                    recorder.phase("saving")
                    save_adapters(models[POLICY], config, groups)
                if config.train.save_hf:
                    recorder.phase("saving")
                    save_models(models, config, groups)
        except RunStopped:
            dist.barrier(groups.world)  # torchrun ends the ranks that are left when one exits
            raise


@dataclass(frozen=True)
class Session:
    """One start of a run, fresh or resumed, before there is a policy."""

    config: RunConfig
    groups: Groups
    identity: dict[str, Any]
    resumption: Resumption | None
    stop: StopRequest
    recorder: Recorder

    def restore(self, models: Models, progress: Progress) -> Checkpoints:
        """The run's checkpoints, after ``models`` and ``progress`` were brought to the one to continue from."""
        checkpoints = Checkpoints(self.config, models, self.identity)
        if self.resumption is not None:
            self.recorder.phase("loading the checkpoint")
            checkpoints.restore(self.resumption, progress)
        return checkpoints

    def end_step(self, progress: Progress, checkpoints: Checkpoints) -> None:
        """Saves if it is time. Collective. Raises RunStopped when a rank was asked to stop."""
        total = self.config.train.outer_steps
        stopping = self.stop.asked(self.groups.world)
        checkpoints.after_step(progress, last=bool(stopping) or progress.outer_steps == total)
        if stopping and progress.outer_steps < total:
            raise RunStopped(
                f"stopped by {stopping} after outer step {progress.outer_steps} of {total}, which is saved: "
                f"train.resume = true continues"
            )


def supervise(session: Session, inputs: Examples) -> Models:
    """Supervised fine-tuning from its first or next step to the last; returns what was trained."""
    config, groups = session.config, session.groups
    policy = Policy(config, groups)
    progress = Progress(PromptCursor(len(inputs.completions), config.train.seed, config.data.shuffle))
    models: Models = {POLICY: policy}
    with session.restore(models, progress) as checkpoints:
        session.recorder.phase("fine-tuning")
        for report in fine_tune(config, groups, policy, inputs, progress, session.recorder.note):
            session.recorder.steps([report])
            session.end_step(progress, checkpoints)
    return models


def reinforce(session: Session, inputs: Inputs) -> Models:
    """Builds what a run needs, brings it to the checkpoint if there is one, and trains; returns what was trained."""
    config, recorder = session.config, session.recorder
    with rollout_servers(config, session.groups, recorder) as serving:
        placement = serving.placement
        run = build_run(
            config, session.groups, inputs, serving.urls, serving.access, colocated=placement.colocated
        )
        described = {"version": run.engine.version, "seeded": run.seeded, "urls": list(serving.urls)}
        recorder.engine({**described, "placement": placement.record(), "sync": run.sync.describe()})
        if untested_engine := untested("sglang", run.engine.version):
            recorder.note(f"warning: {untested_engine}")
        progress = Progress(run.cursor)
        try:
            with session.restore(run.models, progress) as checkpoints:
                for _ in outer_steps(run, progress, recorder):
                    session.end_step(progress, checkpoints)
                    serving.check()
        finally:
            run.sync.close()
    return run.models


def outer_steps(run: Run, progress: Progress, recorder: Recorder) -> Iterator[None]:
    """The outer loop: roll out, learn, sync, report; evaluate before the first step and then periodically.

    Yields after each outer step, with ``progress`` at its end.
    """
    config = run.config
    evaluating = bool(config.eval.every and run.eval_prompts)
    run.push(progress.outer_steps)  # the servers' own reading is not trusted
    say(run, recorder)
    profiles = Profiles(config, run.groups)
    if evaluating and config.eval.start and progress.outer_steps == 0:
        recorder.phase("evaluating the cold start")
        seed_generators(config.train.seed, 0)
        recorder.initial(evaluate(run, 0))
    for number in range(progress.outer_steps, config.train.outer_steps):
        recorder.phase(f"outer step {number + 1} of {config.train.outer_steps}")
        seed_generators(config.train.seed, number)
        with profiles.step(number):
            reports, records = outer_step(run, number, first_step=progress.optimizer_steps)
        say(run, recorder)
        recorder.steps(reports[:-1])
        recorder.rollouts(number, records)
        last = number + 1 == config.train.outer_steps
        if evaluating and (last or (number + 1) % config.eval.every == 0):
            reports[-1].metrics |= evaluate(run, number + 1)
        recorder.steps(reports[-1:])
        progress.advance(reports)
        if progress.empty_steps:
            report_empty_step(config, progress, empty_text(number, reports[-1].metrics), recorder)
        yield


def say(run: Run, recorder: Recorder) -> None:
    """Passes on what has been noted."""
    while run.notes:
        recorder.note(run.notes.pop(0))


def report_empty_step(config: RunConfig, progress: Progress, what: str, recorder: Recorder) -> None:
    """Says that a step was skipped; raises RolloutError when ``rollout.max_empty_steps`` in a row were."""
    most = config.rollout.max_empty_steps
    recorder.note(f"warning: {what}: skipped ({progress.empty_steps} in a row, at most {most})")
    if progress.empty_steps >= most:
        raise RolloutError(
            f"{what}, as in the {progress.empty_steps} outer steps up to here (rollout.max_empty_steps = {most})"
        )


@dataclass(frozen=True)
class Serving:
    """The rollout servers of a run, on every rank."""

    urls: tuple[str, ...]
    access: ServerAccess
    check: Callable[[], None]
    """Collective: raises EngineUnavailableError when a local server has died or lost its port."""
    placement: Placement


@contextlib.contextmanager
def rollout_servers(config: RunConfig, groups: Groups, recorder: Recorder) -> Iterator[Serving]:
    """The servers of the configuration, or local ones that the first rank starts. Collective.

    Raises ConfigError when local servers would have to serve ranks on other machines.
    """
    run = broadcast_object(secrets.token_hex(4), 0, groups.world)
    world, local = dist.get_world_size(), int(os.environ.get("LOCAL_WORLD_SIZE", dist.get_world_size()))
    placement = together(lambda: placed_here(config, ranks=local), groups.world)
    placement = broadcast_object(placement, 0, groups.world)  # one for all, whatever another machine looks like
    if config.rollout.named:
        urls, key = named_servers(config, groups, recorder)
        yield Serving(urls, ServerAccess(key, run), nothing, placement)
        return
    if local != world:
        raise ConfigError(
            f"{world} ranks, {local} of them on this machine: servers started here would not be reached by the others; "
            f"start servers on their nodes with `megatron-gspo serve`, and name them in rollout.servers_from"
        )
    with contextlib.ExitStack() as stack:
        urls, key, error = (), "", None
        check: Callable[[], None] = nothing
        if dist.get_rank() == 0:
            device = here().device_type
            logs = Path(config.train.run_dir) / "servers"
            recorder.phase("waiting for the servers")
            try:
                rollout = served(config, placement)
                servers = local_servers(rollout)(
                    rollout,
                    served_directory(rollout, config.model.path, logs, placement.sizes),
                    logs,
                    device=device,
                    dtype=config.rollout.engine_dtype or config.model.dtype,
                    seed=config.train.seed,
                    routes=config.replay.uses_engine_routes,
                    placement=placement,
                )
                with starting_servers(rollout, device, recorder.note):
                    urls, key, check = stack.enter_context(servers).urls, servers.key, servers.check
            except Exception as caught:
                error = caught
        agree(error, groups.world)
        urls, key = broadcast_object((urls, key), 0, groups.world)
        yield Serving(urls, ServerAccess(key, run), lambda: together(check, groups.world), placement)


def nothing() -> None:
    """What there is to check of servers that somebody else has started, and on other ranks than the first."""


def set_determinism(config: RunConfig) -> None:
    """torch's deterministic algorithms: always on a CPU, on a GPU when asked for."""
    torch.manual_seed(config.train.seed)
    if config.train.deterministic or here().deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.use_deterministic_algorithms(True)
