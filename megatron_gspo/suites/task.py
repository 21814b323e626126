"""A suite that is ready to be asked: prompts of this tokenizer, a grader, a way to draw that the model has room for."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from megatron_gspo.algorithm.evaluation import CONFIDENCE, INTERVAL_METHOD, estimates, majority, mean_with_interval
from megatron_gspo.config import RewardConfig, RunConfig
from megatron_gspo.data.tokenizer import Tokenizer
from megatron_gspo.errors import ConfigError, DataError, MegatronGspoError
from megatron_gspo.rewards.interface import RewardContext
from megatron_gspo.rewards.registry import Reward, resolve_reward
from megatron_gspo.rollout.engine import EVALUATION, Sampling
from megatron_gspo.suites.base import Measured, Problem, Suite
from megatron_gspo.suites.catalog import Asked
from megatron_gspo.suites.contamination import MOST_ROWS, find_overlap, training_texts
from megatron_gspo.suites.files import read_problems
from megatron_gspo.types import Prompt

Answers = list[list[str | None]]
"""Final answers by prompt and response."""
ANSWERS_SHOWN = 200
"""Characters of an extracted answer that ``result.json`` keeps."""


@dataclass(frozen=True)
class Task:
    """What is asked, how often, and who judges."""

    suite: Suite
    problems: list[Problem]
    prompts: list[Prompt]
    """Of the problems, in their order."""
    sampling: Sampling
    reward: Reward
    directory: Path
    """Of the data."""
    record: dict[str, Any]
    """What decides the result, as ``result.json`` has it: data, sampling, grader."""
    warnings: tuple[str, ...]

    @property
    def name(self) -> str:
        """The suite's."""
        return self.suite.name

    @property
    def longest_prompt(self) -> int:
        """Tokens."""
        return max(len(prompt.token_ids) for prompt in self.prompts)


def make_task(
    asked: Asked,
    data: Path,
    config: RunConfig,
    tokenizer: Tokenizer,
    *,
    positions: int,
    seeded: bool,
    alone: bool = True,
) -> Task:
    """Reads, renders and counts, before anything is started. ``positions``: tokens of a prompt and its response
    together that the engine gives the model.

    Raises ConfigError or DataError: data that are not there or not of the suite's format, a grader that is not there, a
    prompt that leaves no room for a response.
    """
    suite, draw = asked.suite, asked.draw
    found = read_problems(asked, data, alone=alone)
    prompts = [_render(suite, problem, tokenizer, config.data.chat_template) for problem in found.problems]
    longest = max(len(prompt.token_ids) for prompt in prompts)
    room = positions - longest
    if room < 1:
        raise ConfigError(
            f"suite {suite.name}: its longest prompt has {longest} tokens, and the model has room for {positions}: "
            f"nothing is left for a response"
        )
    warnings = list(found.warnings)
    if room < draw.max_tokens:
        warnings.append(f"responses are cut at {room} tokens, not {draw.max_tokens}: the model has no more positions")
    settings = RewardConfig(
        function=suite.reward, options=dict(suite.reward_options), timeout_s=config.reward.timeout_s
    )
    reward = resolve_reward(settings, RewardContext.of(config, functools.partial(tokenizer.decode, skip_special=False)))
    sampling = Sampling(
        group_size=draw.k,
        temperature=draw.temperature or 1.0,
        max_tokens=min(draw.max_tokens, room),
        stop_token_ids=tokenizer.stop_ids,
        seed=config.train.seed if seeded else None,
        outer_step=EVALUATION,
        greedy=draw.temperature == 0.0,
        top_p=draw.top_p,
        top_k=draw.top_k,
    )
    record = {
        "data": found.record,
        "sampling": {
            "k": draw.k,
            "temperature": draw.temperature,
            "top_p": draw.top_p,
            "top_k": draw.top_k,
            "max_tokens": sampling.max_tokens,
            "stop_token_ids": list(tokenizer.stop_ids),
            "seed": sampling.seed,
            "source": draw.source,
        },
        "chat_template": config.data.chat_template,
        "chat_template_kwargs": dict(config.data.chat_template_kwargs),
        "grader": {"reward": suite.reward, "options": dict(suite.reward_options)},
    }
    return Task(suite, found.problems, prompts, sampling, reward, found.directory, record, tuple(warnings))


def check_contamination(task: Task, config: RunConfig) -> tuple[dict[str, Any], list[str]]:
    """Whether the run's training prompts hold the task's problems: a record, and warnings. What cannot be read is said
    in the record."""
    path = ", ".join(config.data.paths.values())
    try:
        overlap = find_overlap(task.problems, training_texts(config.data))
    except MegatronGspoError as error:
        return {"training_prompts": path, "looked_at": 0, "problem": str(error)}, []
    record = {"training_prompts": path, "looked_at": overlap.looked, "problems": list(overlap.problems)}
    warnings = [overlap.warning(len(task.problems), path)]
    if not overlap.whole:
        warnings.append(f"only the first {MOST_ROWS} training prompts of {path} were compared with the problems")
    return record, [warning for warning in warnings if warning]


def figures(task: Task, rewards_PK: np.ndarray, answers: Answers | None) -> dict[str, Any]:
    """Estimates with intervals of [P, K] rewards, and of ``final_answers``: JSON values.

    ``accuracy`` (avg@K), ``pass@k``, ``maj@K`` where answers can vote, ``reward``, and what the suite measures besides.
    A response that was not graded (NaN) counts nowhere, and does not vote.
    """
    span = task.reward.range
    right_PK = np.where(np.isnan(rewards_PK), np.nan, rewards_PK == span[1])
    found = {name: strict(asdict(estimate)) for name, estimate in estimates(rewards_PK, span).items()}
    if answers is not None and rewards_PK.shape[1] > 1:
        votes = [
            majority(
                [None if np.isnan(right) else answer for answer, right in zip(one, rights, strict=True)], rights == 1
            )
            for one, rights in zip(answers, right_PK, strict=True)
            if not np.isnan(rights).all()
        ]
        found[f"maj@{rewards_PK.shape[1]}"] = asdict(mean_with_interval(np.array(votes)))
    more: dict[str, Measured] = {}
    if task.suite.measure is not None:
        more = task.suite.measure(task.problems, right_PK, task.directory)
    return {
        "prompts": rewards_PK.shape[0],
        "samples": rewards_PK.shape[1],
        "headline": task.suite.headline if task.suite.headline in (*found, *more) else "accuracy",
        "estimates": found,
        "interval": {"confidence": CONFIDENCE, "method": INTERVAL_METHOD},
        "measured": {name: asdict(one) for name, one in more.items()},
        "full_reward": span[1] if np.isfinite(span[1]) else None,
    }


def strict(values: dict[str, float]) -> dict[str, float | None]:
    """Without infinities, for which JSON has no word."""
    return {name: value if np.isfinite(value) else None for name, value in values.items()}


def final_answers(task: Task, prompts: Sequence[Prompt], responses: Sequence[Sequence[str]]) -> Answers | None:
    """The answers that vote, by prompt and response; None where the suite has none."""
    find = task.suite.answer
    if find is None:
        return None
    return [[find(prompt.text, one) for one in group] for prompt, group in zip(prompts, responses, strict=True)]


def _render(suite: Suite, problem: Problem, tokenizer: Tokenizer, chat_template: bool) -> Prompt:
    try:
        text = tokenizer.render(problem.question, chat_template)
        ids = tuple(tokenizer.encode(text))
    except DataError as error:
        raise DataError(f"suite {suite.name}, problem {problem.id}: {error}") from None
    return Prompt(f"{suite.name}/{problem.id}", text, ids, problem.answer, metadata=problem.metadata)
