"""An evaluation by itself: servers that hold the subject, responses, grades. No trainer ranks."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch

from megatron_gspo.config import RunConfig
from megatron_gspo.data.prompts import PromptSet
from megatron_gspo.data.tokenizer import Tokenizer, open_tokenizer, response_text
from megatron_gspo.errors import ConfigError, EngineUnavailableError
from megatron_gspo.hf.catalog import read_model
from megatron_gspo.hf.checkpoint import HfReader
from megatron_gspo.rewards.registry import Reward, resolve_reward
from megatron_gspo.rollout.engine import Progress, Sampling, local_servers, make_engine
from megatron_gspo.rollout.probe import ServerState, probe
from megatron_gspo.train.grade import Graded, evaluation_sampling, grade
from megatron_gspo.train.limits import check_room, read_prompts
from megatron_gspo.train.models import check_engine
from megatron_gspo.train.subject import Subject
from megatron_gspo.train.survey import usable_questions
from megatron_gspo.train.waiting import starting_servers


@dataclass(frozen=True)
class Questions:
    """What is asked, and how the answers are judged."""

    tokenizer: Tokenizer
    prompts: PromptSet
    reward: Reward
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
    directory = subject.model or Path(config.model.path)
    _, shape = read_model(directory)
    check_engine(config.rollout.engine, directory, shape)
    if stacked := HfReader(directory).stacked():
        raise ConfigError(
            f"{directory}: its experts are stacked ({stacked[0]}, ...), and servers do not read them so: megatron-gspo "
            f"convert, there and back, writes them one by one"
        )
    tokenizer = open_tokenizer(config, directory)
    prompts = read_prompts(config, tokenizer)
    check_room(config, directory, prompts)
    seeded = config.rollout.is_seeded(on_gpu=torch.cuda.is_available())
    sampling = evaluation_sampling(config, tokenizer.stop_ids, seeded=seeded, greedy=greedy)
    reward = resolve_reward(config.reward)
    return Questions(tokenizer, usable_questions(config, prompts, reward, tokenizer), reward, sampling)


def examine(
    subject: Subject, questions: Questions, logs: Path, *, phase: Callable[[str], None], progress: Progress
) -> Examination:
    """Asks every question of ``subject.model``. ``phase`` hears what happens now, ``progress`` each group that arrives.

    Servers are those of ``rollout.servers`` when they hold this model, else local ones for the length of this.
    Raises ConfigError, RolloutError and RewardError.
    """
    config, model = subject.config, subject.model
    assert model is not None, "a checkpoint is exported first"
    _, shape = read_model(model)
    with _servers(config, model, logs, phase) as (urls, note):
        phase(f"drawing {len(questions.prompts)} x {questions.sampling.group_size} responses")
        decode = response_text(questions.tokenizer, special_tokens=config.reward.special_tokens)
        engine = make_engine(urls, config.rollout, vocab_size=shape.vocab_size, decode=decode)
        graded = asyncio.run(
            grade(
                engine,
                questions.reward,
                questions.prompts.prompts,
                questions.sampling,
                weight_version=0,
                progress=progress,
            )
        )
    return Examination(graded, engine.version, config.rollout.servers, note)


@contextlib.contextmanager
def _servers(
    config: RunConfig, model: Path, logs: Path, phase: Callable[[str], None]
) -> Iterator[tuple[tuple[str, ...], str | None]]:
    """URLs of servers that hold ``model`` as weight version 0, and what could not be made sure of."""
    if config.rollout.servers:
        yield config.rollout.servers, check_served(probe(config.rollout.servers, timeout_s=10.0), model)
        return
    device = "cuda" if torch.cuda.is_available() else "cpu"
    servers = local_servers(config.rollout)(
        config.rollout,
        model,
        logs,
        device=device,
        dtype=config.rollout.engine_dtype or config.model.dtype,
        seed=config.train.seed,
    )
    with contextlib.ExitStack() as stack:
        with starting_servers(config.rollout, device, phase):
            stack.enter_context(servers)
        yield servers.urls, None


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
