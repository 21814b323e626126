"""A run from its configuration to its report: what every rank executes."""

from __future__ import annotations

import contextlib
import functools
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.distributed as dist

from megatron_gspo.config import RunConfig
from megatron_gspo.data.cursor import PromptCursor
from megatron_gspo.errors import EngineUnavailableError, NonFiniteError, RolloutError, RunStopped, SyncError
from megatron_gspo.megatron.checkpoint import POLICY, Models
from megatron_gspo.megatron.groups import Groups, make_groups, start_distributed
from megatron_gspo.megatron.policy import Policy
from megatron_gspo.parallel.exchange import broadcast_object, together
from megatron_gspo.platforms import here
from megatron_gspo.rewards.interface import RewardServers
from megatron_gspo.runs.adapters import save_adapters
from megatron_gspo.runs.checkpoints import Checkpoints
from megatron_gspo.runs.experiment import contents
from megatron_gspo.runs.outage import Outages
from megatron_gspo.runs.recording import Agreed, MakeRecorder, Recorder, open_recorder
from megatron_gspo.runs.resume import Resumption, find_resumption, identify
from megatron_gspo.runs.reward_serving import reward_servers
from megatron_gspo.runs.save import save_models
from megatron_gspo.runs.serving import rollout_servers
from megatron_gspo.runs.stopping import StopRequest
from megatron_gspo.runs.watching import Watch
from megatron_gspo.train.assembly import Run, build_run
from megatron_gspo.train.evaluate import evaluate
from megatron_gspo.train.inputs import Inputs, Questions, load_questions, with_rewards
from megatron_gspo.train.profile import Profiles
from megatron_gspo.train.progress import Progress, seed_generators
from megatron_gspo.train.sft import Examples, fine_tune, load_examples
from megatron_gspo.train.step import empty_text, outer_step
from megatron_gspo.train.suite_inputs import suite_notes
from megatron_gspo.train.suites import evaluate_suites
from megatron_gspo.train.survey import survey_references
from megatron_gspo.types import RolloutRecord, StepReport
from megatron_gspo.versions import untested

Evaluation = Callable[[Run, int], dict[str, float]]
"""(run, the version of the servers' weights) -> metrics, on every rank."""


def train(config: RunConfig, make_recorder: MakeRecorder) -> None:
    """Trains as the configuration says; every rank of the world calls it.

    Raises MegatronGspoError; RunStopped, once a checkpoint is saved, when a signal asked a rank to stop.
    """
    start_distributed(config.train.collective_timeout_s)
    groups = make_groups(config.parallel)
    watch = Watch(config)
    with watch.running():
        _train(config, make_recorder, groups, watch)


def _train(config: RunConfig, make_recorder: MakeRecorder, groups: Groups, watch: Watch) -> None:
    set_determinism(config)
    supervised = not config.algorithm.draws_responses
    inputs = together(lambda: load_examples(config) if supervised else load_questions(config), groups.world)
    first = dist.get_rank() == 0
    prints, named = broadcast_object(
        together(lambda: (inputs.fingerprints(), contents(config)) if first else None, groups.world), 0, groups.world
    )
    identity = identify(config, prints, named)
    resumption = find_resumption(config, identity, groups)
    notes: list[str] = []
    if isinstance(inputs, Questions) and not config.reward_server.model:
        inputs, notes = judged(config, inputs, groups)
    if isinstance(inputs, Questions):
        notes += suite_notes(config, inputs.suites, groups)
    with StopRequest() as stop, contextlib.ExitStack() as ending:
        if isinstance(inputs, Questions):
            ending.callback(inputs.close)
        try:
            with (
                open_recorder(make_recorder, config, groups, resumption) as recorder,
                watch.recording(recorder),
            ):
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
    recorder: Agreed

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

    def check_stop(self, progress: Progress) -> None:
        """While it waits for servers: raises RunStopped when a rank was asked to stop. Collective."""
        if stopping := self.stop.asked(self.groups.world):
            raise RunStopped(
                f"stopped by {stopping} after outer step {progress.outer_steps} of {self.config.train.outer_steps}, "
                f"while it waited for a rollout server: train.resume = true continues from the last checkpoint"
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
            check_non_finite(config, progress)
            session.end_step(progress, checkpoints)
    return models


def judged(
    config: RunConfig, questions: Questions, groups: Groups, servers: RewardServers | None = None
) -> tuple[Inputs, list[str]]:
    """The questions with what grades the answers, references looked at: nothing that is wrong with them is found later.
    Collective."""
    inputs = together(lambda: with_rewards(config, questions, servers), groups.world)
    return survey_references(config, inputs, groups)


def reinforce(session: Session, questions: Questions) -> Models:
    """Trains on questions; what grades the answers is made first where that needs servers, which are started for it.
    Returns what was trained."""
    config, recorder = session.config, session.recorder
    if isinstance(questions, Inputs):
        return train_policy(session, questions)
    waiting: list[str] = []  # what becomes of them is found in another thread, and said between steps
    with reward_servers(config, session.groups.world, recorder.note, waiting.append) as servers:
        inputs, notes = judged(config, questions, session.groups, servers)
        try:
            for note in notes:
                recorder.note(note)
            return train_policy(session, inputs, waiting, servers.urls)
        finally:
            inputs.close_rewards()


def train_policy(
    session: Session, inputs: Inputs, waiting: list[str] | None = None, reward_urls: Sequence[str] = ()
) -> Models:
    """Builds what a run needs, brings it to the checkpoint if there is one, and trains; returns what was trained.
    ``waiting``: a list of what there is to say between steps, which others fill. ``reward_urls``: for the manifest."""
    config, recorder = session.config, session.recorder
    with rollout_servers(config, session.groups, recorder) as serving:
        placement = serving.placement
        run = build_run(
            config,
            session.groups,
            inputs,
            serving.urls,
            serving.access,
            colocated=placement.colocated,
            local=serving.local,
        )
        run = replace(run, entering=recorder.enter, notes=run.notes if waiting is None else waiting)
        described = {"version": run.engine.version, "seeded": run.seeded, "urls": list(serving.urls)}
        apart = {"placement": placement.record(), "reward_servers": list(reward_urls)}
        recorder.engine({**described, **apart, "sync": run.sync.describe()})
        if untested_engine := untested("sglang", run.engine.version):
            recorder.note(f"warning: {untested_engine}")
        progress = Progress(run.cursor)
        try:
            with session.restore(run.models, progress) as checkpoints:
                outages = Outages(
                    run,
                    recorder,
                    save=functools.partial(checkpoints.keep, progress),
                    stop=functools.partial(session.check_stop, progress),
                )
                for _ in outer_steps(run, progress, recorder, outages):
                    session.end_step(progress, checkpoints)
                    if not run.fleet.survives:
                        serving.check()
        except (EngineUnavailableError, SyncError) as error:
            raise with_advice(error, run) from error
        finally:
            run.sync.close()
    return run.models


def with_advice(error: EngineUnavailableError | SyncError, run: Run) -> Exception:
    """What servers have failed at, and what to do where that is not known yet: those that take turns with the trainer
    are not started again within a run, since their memory is its own by turns."""
    if not run.turns.forgets or "train.resume" in str(error):
        return error
    return type(error)(
        f"{error}; servers that take turns with the trainer are not started again within a run: train.resume = true "
        f"goes on from the last checkpoint, with all of them started anew"
    )


def outer_steps(run: Run, progress: Progress, recorder: Recorder, outages: Outages) -> Iterator[None]:
    """The outer loop: roll out, learn, sync, report; evaluate before the first step and then periodically. A draw that
    has lost every server is begun anew when one is back.

    Yields after each outer step, with ``progress`` at its end.
    """
    config = run.config
    run.push(progress.outer_steps)  # the servers' own reading is not trusted
    say(run, recorder)
    profiles = Profiles(config, run.groups)
    if config.eval.start and progress.outer_steps == 0 and (due := evaluations(run, 0)):
        recorder.phase("evaluating the cold start")
        seed_generators(config.train.seed, 0)
        recorder.initial(outages.outlast(0, lambda: measure(run, 0, due)))
    for number in range(progress.outer_steps, config.train.outer_steps):
        step = functools.partial(one_step, run, number, progress.optimizer_steps, recorder)
        with profiles.step(number):
            reports, records = outages.outlast(number, step)
        say(run, recorder)
        recorder.steps(reports[:-1])
        recorder.rollouts(number, records)
        version = number + 1
        if due := evaluations(run, version):
            measuring = functools.partial(measure, run, version, due)
            reports[-1].metrics |= outages.outlast(version, measuring, savable=False)
            say(run, recorder)
        recorder.steps(reports[-1:])
        progress.advance(reports)
        if progress.empty_steps:
            report_empty_step(config, progress, empty_text(number, reports[-1].metrics), recorder)
        check_non_finite(config, progress)
        yield


def evaluations(run: Run, outer_steps: int) -> list[Evaluation]:
    """What is evaluated after so many outer steps; all that ever is before the first and after the last."""
    settings = run.config.eval
    known: list[tuple[bool, int, Evaluation]] = [
        (run.eval_prompts is not None, settings.every, evaluate),
        (bool(run.suites), settings.suites_every, evaluate_suites),
    ]
    ends = outer_steps in (0, run.config.train.outer_steps)
    return [evaluation for there, every, evaluation in known if there and every and (ends or outer_steps % every == 0)]


def measure(run: Run, version: int, due: Sequence[Evaluation]) -> dict[str, float]:
    """The metrics of some evaluations of the weights that the servers hold. Collective."""
    return {name: value for evaluation in due for name, value in evaluation(run, version).items()}


def one_step(
    run: Run, number: int, first_step: int, recorder: Recorder
) -> tuple[list[StepReport], list[RolloutRecord]]:
    """One outer step, from the state that its number gives: it may have been begun before."""
    recorder.phase(f"outer step {number + 1} of {run.config.train.outer_steps}")
    seed_generators(run.config.train.seed, number)
    return outer_step(run, number, first_step=first_step)


def say(run: Run, recorder: Recorder) -> None:
    """Passes on what has been noted."""
    for notes in (run.fleet.notes, run.notes):
        while notes:
            recorder.note(notes.pop(0))


def check_non_finite(config: RunConfig, progress: Progress) -> None:
    """Raises NonFiniteError when ``train.max_non_finite_steps`` in a row were skipped."""
    most = config.train.max_non_finite_steps
    if progress.non_finite_steps >= most:
        raise NonFiniteError(
            f"something was not finite in the {progress.non_finite_steps} outer steps up to here "
            f"(train.max_non_finite_steps = {most})"
        )


def report_empty_step(config: RunConfig, progress: Progress, what: str, recorder: Recorder) -> None:
    """Says that a step was skipped; raises RolloutError when ``rollout.max_empty_steps`` in a row were."""
    most = config.rollout.max_empty_steps
    recorder.note(f"warning: {what}: skipped ({progress.empty_steps} in a row, at most {most})")
    if progress.empty_steps >= most:
        raise RolloutError(
            f"{what}, as in the {progress.empty_steps} outer steps up to here (rollout.max_empty_steps = {most})"
        )


def set_determinism(config: RunConfig) -> None:
    """torch's deterministic algorithms: always on a CPU, on a GPU when asked for."""
    torch.manual_seed(config.train.seed)
    if config.train.deterministic or here().deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.use_deterministic_algorithms(True)
