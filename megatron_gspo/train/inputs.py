"""What a reinforcement-learning run reads besides weights: prompts of one file or of several sources, and rewards."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from megatron_gspo.config import RunConfig
from megatron_gspo.config.training import DataConfig
from megatron_gspo.data.curriculum import Curriculum
from megatron_gspo.data.cursor import PromptCursor, PromptOrder
from megatron_gspo.data.formats import Paths
from megatron_gspo.data.mixture import MixtureCursor, Source, mix
from megatron_gspo.data.prompts import CompletionSet, PromptSet, load_prompts
from megatron_gspo.data.tokenizer import Tokenizer, open_tokenizer, turn_end_fix, turn_end_problem
from megatron_gspo.errors import DataError
from megatron_gspo.rewards.interface import RewardServers
from megatron_gspo.rewards.references import ReferenceCheck
from megatron_gspo.rewards.registry import Reward
from megatron_gspo.suites.catalog import read_all_asked
from megatron_gspo.suites.task import Task
from megatron_gspo.train.models import check_models
from megatron_gspo.train.progress import fingerprint
from megatron_gspo.train.reward import find_reward, find_source_rewards
from megatron_gspo.train.suite_inputs import load_suites


@dataclass(frozen=True)
class Questions:
    """What is asked of a policy: all that is read before anything is started."""

    tokenizer: Tokenizer
    prompts: PromptSet
    eval_prompts: PromptSet | None
    chat_template: bool
    """Whether prompts were rendered with the chat template."""
    sources: tuple[Source, ...]
    """What ``prompts`` is mixed of; empty where it is one file."""
    suites: tuple[Task, ...]
    """As ``Run.suites``."""

    def describe(self) -> str:
        """One line."""
        held_out = f", {len(self.eval_prompts)} held out" if self.eval_prompts else ""
        problem = turn_end_problem(self.tokenizer) if self.chat_template else ""
        warning = f"; warning: {problem} ({turn_end_fix(self.tokenizer)})" if problem else ""
        parts = ", ".join(f"{source.name} {len(source.prompts)}" for source in self.sources)
        mixed = f" of {len(self.sources)} sources ({parts})" if parts else ""
        return f"{len(self.prompts)} prompts{mixed}{held_out}{describe_looked(self.prompts)}{warning}"

    def fingerprints(self) -> dict[str, str]:
        """Setting -> fingerprint of what was read through it. Reads a long file once more."""
        sets = {"data.sources" if self.sources else "data.path": self.prompts, "data.eval_path": self.eval_prompts}
        return {name: loaded.looked.fingerprint() if loaded else fingerprint(()) for name, loaded in sets.items()}

    def close(self) -> None:
        """Gives back what graders keep."""
        for task in self.suites:
            task.reward.close()


@dataclass(frozen=True)
class Inputs(Questions):
    """What a reinforcement-learning run reads besides weights: questions, and what grades the answers."""

    reward: Reward
    references: Mapping[str, ReferenceCheck] | None = None
    """As ``Run.references``."""
    source_rewards: Mapping[str, Reward] = field(default_factory=dict)
    """As ``Run.source_rewards``."""

    def close(self) -> None:
        """Gives back what graders and rewards keep."""
        super().close()
        self.close_rewards()

    def close_rewards(self) -> None:
        """Gives back what rewards keep, each once."""
        rewards = (self.reward, *self.source_rewards.values())
        for reward in {id(reward): reward for reward in rewards}.values():
            reward.close()


def describe_looked(read: PromptSet | CompletionSet) -> str:
    """ " (1 skipped, first: line 3: ...)", and of a long file how much of it was looked at."""
    parts = [] if read.looked.whole else [f"{read.looked.rows} rows looked at, the others are when they are drawn"]
    if read.skipped:
        parts.append(f"{read.skipped} skipped, first: {read.problems[0]}")
    return f" ({'; '.join(parts)})" if parts else ""


def load_inputs(config: RunConfig) -> Inputs:
    """Reads prompts and finds the reward. Raises UserError."""
    return with_rewards(config, load_questions(config))


def load_questions(config: RunConfig) -> Questions:
    """Reads prompts, before anything is started or written. Raises UserError."""
    read_all_asked(config.eval.suites)  # before what takes long
    check_models(config)
    tokenizer = open_tokenizer(config)

    def load(data: DataConfig, path: str, limit: int | None, *, whole: bool = False) -> PromptSet:
        return load_prompts(
            path,
            tokenizer=tokenizer,
            format=data.format,
            fields=Paths.named_by(data),
            chat_template=data.chat_template,
            max_prompt_tokens=config.rollout.max_prompt_tokens,
            skip_bad=data.skip_bad,
            limit=limit,
            whole=whole,
        )

    data = config.data
    sources = tuple(
        Source(source.name, source.weight, load(data.of_source(source), source.path, source.limit))
        for source in data.sources
    )
    prompts = mix(sources) if sources else load(data, data.path, data.limit)
    if len(prompts) < config.train.prompts_per_step:
        raise DataError(
            f"{', '.join(data.paths.values())}: {len(prompts)} prompts, fewer than train.prompts_per_step = "
            f"{config.train.prompts_per_step}: a prompt would be drawn twice in a step"
        )
    eval_prompts = load(data, data.eval_path, config.eval.prompts, whole=True) if data.eval_path else None
    suites = tuple(load_suites(config, tokenizer))
    return Questions(tokenizer, prompts, eval_prompts, data.chat_template, sources, suites)


def with_rewards(config: RunConfig, questions: Questions, servers: RewardServers | None = None) -> Inputs:
    """The questions with what grades the answers; ``servers``: those that were started for it. Raises UserError."""
    reward = find_reward(config, questions.tokenizer, servers=servers)
    of_sources = find_source_rewards(config, questions.tokenizer, reward, servers)
    return Inputs(**vars(questions), reward=reward, source_rewards=of_sources)


def make_order(config: RunConfig, inputs: Inputs) -> PromptOrder:
    """The order in which training visits its prompts."""
    data, seed = config.data, config.train.seed
    order: PromptOrder
    if inputs.sources:
        parts = [(source.name, len(source.prompts), source.weight) for source in inputs.sources]
        order = MixtureCursor(parts, seed, data.shuffle)
    else:
        order = PromptCursor(len(inputs.prompts), seed, data.shuffle)
    return order if data.curriculum == "off" else Curriculum(order, seed, data.curriculum_floor)
