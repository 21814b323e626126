"""An evaluation by itself: servers that hold the subject, responses, grades. No trainer ranks."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from megatron_gspo.config import RunConfig
from megatron_gspo.config.rollouts import EIGHT_BITS
from megatron_gspo.data.prompts import PromptSet
from megatron_gspo.data.tokenizer import Tokenizer, open_tokenizer, response_text
from megatron_gspo.errors import ConfigError, EngineUnavailableError
from megatron_gspo.evaluation.answering import answer
from megatron_gspo.evaluation.lengths import check_room, read_prompts
from megatron_gspo.evaluation.subject import Subject
from megatron_gspo.hf.catalog import read_model
from megatron_gspo.hf.checkpoint import HfReader
from megatron_gspo.hf.family import ModelShape
from megatron_gspo.platforms import here
from megatron_gspo.report.evaluation_files import EvaluationDirectory
from megatron_gspo.rewards.interface import RewardContext, RewardServers
from megatron_gspo.rewards.registry import Reward, check_reward
from megatron_gspo.rewards.scoring import guarded
from megatron_gspo.rollout.addresses import named
from megatron_gspo.rollout.engine import Progress, Sampling, local_servers, make_engine
from megatron_gspo.rollout.sglang.probe import ServerState, probe
from megatron_gspo.runs.reward_serving import started
from megatron_gspo.runs.waiting import starting_servers
from megatron_gspo.sync.base import NamedTensor, make_weight_sync
from megatron_gspo.sync.head import HEAD, with_head
from megatron_gspo.sync.peers import Peers
from megatron_gspo.train.engine_dtype import sent, sent_names, served_directory
from megatron_gspo.train.grade import Graded, evaluation_sampling
from megatron_gspo.train.models import check_engine, engine_holds_head, placed_here, served, unread
from megatron_gspo.train.reward import check_reward_server, find_reward
from megatron_gspo.train.survey import usable_questions
from megatron_gspo.types import Prompt, ServerAccess


@dataclass(frozen=True)
class Questions:
    """What is asked, and how the answers are judged."""

    tokenizer: Tokenizer
    prompts: PromptSet
    reward: Reward | None
    """None where its servers (``[reward_server]``) are still to be started: ``judged`` fills it in."""
    sampling: Sampling


@dataclass(frozen=True)
class Examination:
    """The answers."""

    graded: list[Graded]
    engine_version: str
    servers: tuple[str, ...]
    """URLs that the configuration named; empty when servers were started for this."""
    note: str | None
    """What could not be made sure of."""


def read_questions(subject: Subject, *, greedy: bool) -> Questions:
    """Reads prompts and finds the reward, before anything is started or written. Raises UserError."""
    config = subject.config
    directory = check_engine_reads(subject)
    tokenizer = open_tokenizer(config, directory)
    prompts = read_prompts(config, tokenizer)
    check_room(config, directory, prompts)
    sampling = evaluation_sampling(config, tokenizer.stop_ids, seeded=is_seeded(config), greedy=greedy)
    if config.reward_server.model:
        check_reward(config.reward, RewardContext.of(config))
        check_reward_server(config)
        return Questions(tokenizer, prompts, None, sampling)
    return with_reward(subject, Questions(tokenizer, prompts, None, sampling))


def with_reward(subject: Subject, questions: Questions, servers: RewardServers | None = None) -> Questions:
    """With what grades the answers, and without what has a reference that it cannot use. Raises UserError."""
    config, tokenizer = subject.config, questions.tokenizer
    reward = find_reward(config, tokenizer, trains=False, servers=servers)
    usable = usable_questions(config, questions.prompts, reward, tokenizer)
    return replace(questions, prompts=usable, reward=reward)


@contextlib.contextmanager
def judged(
    subject: Subject, questions: Questions, logs: Path, *, phase: Callable[[str], None]
) -> Iterator[tuple[Questions, Reward]]:
    """The questions and what grades the answers, as long as this is: its servers are started first where it has some.
    ``phase`` hears what happens now. Raises UserError, and what ``LocalServers`` raises."""
    if questions.reward is not None:
        yield questions, questions.reward
        return
    with started(subject.config, logs, ranks=0, say=phase) as servers:
        questions = with_reward(subject, questions, servers)
        assert questions.reward is not None, "it was found just now"
        yield questions, questions.reward


def check_engine_reads(subject: Subject) -> Path:
    """The subject's directory, or that of the model it was trained from. Raises ConfigError for a model that the engine
    would take for another one."""
    config = subject.config
    directory = subject.model or Path(config.model.path)
    _, shape = read_model(directory)
    check_engine(config.rollout.engine, directory, shape)
    if config.rollout.named and (problem := unread(config.rollout.engine, directory, shape)):
        raise ConfigError(
            f"{directory}: {problem}, so that servers that were started from it compute something else; let one be "
            f"started here, which is sent the weights: rollout.servers=[]"
        )
    return directory


def is_seeded(config: RunConfig) -> bool:
    """Whether responses are drawn from seeds here."""
    return config.rollout.is_seeded(on_gpu=here().device_type == "cuda")


@dataclass(frozen=True)
class Examiner:
    """Servers that hold the subject, for as many evaluations as there are."""

    subject: Subject
    tokenizer: Tokenizer
    urls: tuple[str, ...]
    key: str
    note: str | None
    vocab_size: int

    def examine(
        self,
        prompts: Sequence[Prompt],
        reward: Reward,
        sampling: Sampling,
        out: EvaluationDirectory,
        *,
        progress: Progress,
    ) -> Examination:
        """Asks every question of the subject; what ``out`` has from before is not asked again. ``progress`` hears of
        each group that arrives. Raises RolloutError and RewardError."""
        config = self.subject.config
        decode = response_text(self.tokenizer, special_tokens=config.reward.special_tokens)
        engine = make_engine(
            self.urls, config.rollout, vocab_size=self.vocab_size, decode=decode, access=ServerAccess(self.key)
        )
        with contextlib.closing(reward), guarded(reward):
            graded = asyncio.run(answer(engine, reward, prompts, sampling, out, progress=progress))
        return Examination(graded, engine.version, self.urls if config.rollout.named else (), self.note)


@contextlib.contextmanager
def examiner(subject: Subject, tokenizer: Tokenizer, logs: Path, *, phase: Callable[[str], None]) -> Iterator[Examiner]:
    """Servers for ``subject.model``: those of ``rollout.servers`` when they hold it, else local ones for the length of
    this. ``phase`` hears what happens now. Raises ConfigError and RolloutError."""
    config, model = subject.config, subject.model
    assert model is not None, "a checkpoint is exported first"
    _, shape = read_model(model)
    with _servers(config, model, shape, logs, phase) as (urls, key, note):
        yield Examiner(subject, tokenizer, urls, key, note, shape.vocab_size)


@contextlib.contextmanager
def _servers(
    config: RunConfig, model: Path, shape: ModelShape, logs: Path, phase: Callable[[str], None]
) -> Iterator[tuple[tuple[str, ...], str, str | None]]:
    """URLs of servers that hold ``model`` as weight version 0, their key, and what could not be made sure of."""
    if config.rollout.named:
        urls, key = named(config.rollout)
        yield urls, key, check_served(probe(urls, timeout_s=10.0, key=key), model)
        return
    device = here().device_type
    placement = placed_here(config, ranks=0)
    rollout = served(config, placement, model)
    servers = local_servers(rollout)(
        rollout,
        served_directory(rollout, model, logs, placement.sizes),
        logs,
        device=device,
        dtype=config.rollout.engine_dtype or config.model.dtype,
        seed=config.train.seed,
        placement=placement,
    )
    with contextlib.ExitStack() as stack:
        with starting_servers(rollout, device, phase):
            stack.enter_context(servers)
        if unread(config.rollout.engine, model, shape) or rollout.engine_dtype == EIGHT_BITS:
            send(config, model, servers.urls, ServerAccess(servers.key))
        yield servers.urls, servers.key, None


def send(config: RunConfig, model: Path, urls: Sequence[str], access: ServerAccess) -> None:
    """Puts the weights in ``model`` onto servers, as version 0. Raises SyncError or WeightError."""
    family, shape = read_model(model)
    reader = HfReader(model)
    names = [name for name in reader.names() if not (shape.tied_embeddings and name == HEAD)]
    tensors: Iterator[NamedTensor] = ((name, reader.read(name)) for name in names)
    if engine_holds_head(config.rollout.engine, shape):
        tensors, names = with_head(tensors), [*names, HEAD]
    dtype = config.rollout.engine_dtype
    tensors, names = sent(dtype, tensors, family, shape), sorted(sent_names(dtype, set(names), family, shape))
    settings = config.sync.model_copy(update={"method": "tensor"})
    sync = make_weight_sync(settings, urls, Peers(), model_path=model, expected_names=names, access=access)
    try:
        sync.push(tensors, 0)
    finally:
        sync.close()


def check_served(states: list[ServerState], model: Path) -> str | None:
    """Refuses servers that hold other weights than those in ``model``; returns what cannot be known, if anything.

    Weight version 0 says that no trainer has pushed others since the server started. Raises EngineUnavailableError for
    one that does not answer, ConfigError for one that holds something else.
    """
    note = None
    for state in states:
        if state.error is not None or state.model_path is None:
            raise EngineUnavailableError(f"{state.url} cannot be asked what it serves: {state.error}")
        served = Path(state.model_path)
        if state.weight_version != "0" or (served.exists() and served.resolve() != model.resolve()):
            raise ConfigError(
                f"{state.url} serves {served}, weights of version {state.weight_version}, and {model}, version 0, is "
                f"to be evaluated: start it with that and --weight-version 0, or let one be started: rollout.servers=[]"
            )
        if not served.exists():
            note = f"{state.url} serves {served}, which is not on this machine: that it is {model} was not checked"
    return note
